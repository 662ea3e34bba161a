"""The trained LLaMA that the package ships, turned back into a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_checkpoints as tiny
import torch
import transformers

# Parts of a layer: GGUF, Hugging Face.
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def name_of(name: str) -> str:
    """Hugging Face's name of a tensor."""
    if name in OTHERS:
        return OTHERS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in Hugging Face's order: first those of even number, then the others."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def write(folder: Path, source: Path) -> None:
    """Writes model and tokenizer of a GGUF of architecture `llama` as transformers does."""
    reader = gguf.GGUFReader(source)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field, key
        return field.contents()

    heads, kv_heads = (value(f"llama.attention.head_count{kind}") for kind in ("", "_kv"))
    tokens = value("tokenizer.ggml.tokens")
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=value("llama.rope.freq_base"),  # type: ignore[call-arg]
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    weights = {}
    for tensor in reader.tensors:
        rows = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            rows = halves(rows, heads if ".attn_q." in tensor.name else kv_heads)
        weights[name_of(tensor.name)] = rows
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    pieces = list(zip(tokens, value("tokenizer.ggml.scores"), strict=True))
    tokenizer = tiny.sentencepiece_tokenizer(
        pieces, space_before=value("tokenizer.ggml.add_space_prefix"), chat_template=value("tokenizer.chat_template")
    )
    tokenizer.save_pretrained(folder)
