"""Tiny GGUF models with random weights, for tests: stock llama.cpp loads them, tokenizes and generates.

Every writer takes a path and returns it as a ``Path``; the same arguments give the same bytes. Norm weights carry a
few large channels, so that activations have outliers as in real models, and logits are spread enough to have a clear
argmax.
Run as a script, it writes one of each into a folder and loads them all in llama-cpp-python.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
FILE_TYPES = {"f16": 1, "f32": 0, "bf16": 32}
WORDS = ["the", "and", "of", "to", "in", "a", "cat", "dog", "key", "box", "red", "blue", "door", "house", "who", "what"]
WORDS += ["where", "said", "went", "found", "king", "queen"]
PROMPT = "the red key in the box"


# tokenizers


def _fill(pieces: list[str], vocab: int) -> tuple[list[str], int]:
    """Pads ``pieces`` with unused tokens to ``vocab``; returns the tokens and how many are real."""
    if len(pieces) > vocab:
        raise ValueError(f"this tokenizer needs a vocabulary of at least {len(pieces)}, not {vocab}")
    return pieces + [f"<unused_{i}>" for i in range(vocab - len(pieces))], len(pieces)


def _merge_chain(word: str, seen: set[str]) -> list[tuple[str, str]]:
    """Pairs that build ``word`` letter by letter; pairs whose product is in ``seen`` are left out."""
    pairs = [(word[:i], word[i]) for i in range(1, len(word)) if word[: i + 1] not in seen]
    seen.update(left + right for left, right in pairs)
    return pairs


def add_spm_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> list[int]:
    """SentencePiece-like (``llama``): 3 control tokens, 256 bytes, printable ASCII, a few words; at least ~420 tokens.

    Returns the tokens that a test should not generate.
    """
    chars = ["\u2581"] + [chr(c) for c in range(33, 127)]
    seen = set(chars)
    merged = [left + right for word in WORDS for left, right in _merge_chain("\u2581" + word, seen)]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + chars + merged
    tokens, real = _fill(pieces, vocab)
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (real - len(kinds)) + [gguf.TokenType.UNUSED] * (vocab - real)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(vocab - 259)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    return [0, 1, 2, *range(3 + 128, 3 + 256), *range(real, vocab)]


def _byte_chars() -> list[str]:
    """GPT-2's printable stand-in for each byte 0..255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain}
    table.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in table)})
    return [table[b] for b in range(256)]


def add_bpe_tokenizer(writer: gguf.GGUFWriter, vocab: int, pre: str = "gpt-2") -> list[int]:
    """Byte-level BPE (``gpt2``): 256 bytes, a few words, one end-of-text token; at least ~330 tokens.

    Returns the tokens that a test should not generate.
    """
    chars = _byte_chars()
    seen = set(chars)
    merges = [pair for word in WORDS for pair in _merge_chain("\u0120" + word, seen)]
    tokens, real = _fill(["<|endoftext|>"] + chars + [left + right for left, right in merges], vocab)
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (real - 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * (vocab - real))
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    return [0, *range(1 + 128, 1 + 256), *range(real, vocab)]


def add_wordpiece_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """WordPiece (``bert``): 5 special tokens, words, letters at the start of and inside words; at least ~150 tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = special + ["\u2581" + c for c in letters] + letters + ["\u2581" + w for w in WORDS if len(w) > 1]
    tokens, real = _fill(pieces, vocab)
    kinds = [gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (real - 5)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * (vocab - real))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)


# weights


class TinyModel:
    """A GGUF file in the making: random tensors by name, the way checkpoints have them."""

    def __init__(self, path: Path | str, arch: str, dtype: str, seed: int, name: str = ""):
        self.path = Path(path)
        self.writer = gguf.GGUFWriter(self.path, arch)
        self.dtype = dtype
        self.rng = np.random.default_rng(seed)
        self.writer.add_name(name or f"tiny random {arch}")
        self.writer.add_file_type(FILE_TYPES[dtype])

    def matrix(self, name: str, *shape: int, gain: float = 1.0, row_scale: np.ndarray | float = 1.0) -> None:
        """Weight of shape (..., rows, inputs), normal, so that outputs are ``gain`` times as large as inputs."""
        data = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(gain / np.sqrt(shape[-1])) * row_scale
        kind = TYPES[self.dtype]
        self.writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)

    def embedding(self, name: str, rows: int, n_embd: int, size: float = 1.0) -> None:
        """Table of shape (rows, n_embd) whose values have standard deviation ``size``."""
        self.matrix(name, rows, n_embd, gain=size * float(np.sqrt(n_embd)))

    def output(self, name: str, rows: int, n_embd: int, *, quiet: list[int], gain: float = 2.5) -> None:
        """Output matrix (rows, n_embd), perhaps tied to the embedding.

        ``quiet`` rows are small, so greedy generation never picks them: end of text, unused tokens, and halves of UTF-8
        characters, on which llama-cpp-python's completion would wait for ever.
        """
        small = np.ones((rows, 1), np.float32)
        small[quiet] = 1 / 32
        self.matrix(name, rows, n_embd, gain=gain, row_scale=small)

    def norm(self, name: str, n: int, *, bias: bool = False, outliers: bool = True) -> None:
        """Norm weight near 1, with ``outliers`` n/64 channels of 8 to 20; a small bias if asked for. Both f32."""
        weight = self.rng.normal(1.0, 0.1, n).astype(np.float32)
        if outliers:
            weight[self.rng.choice(n, max(1, n // 64), replace=False)] = self.rng.uniform(8, 20)
        self.writer.add_tensor(f"{name}.weight", weight)
        if bias:
            self.bias(name, n)

    def bias(self, name: str, n: int) -> None:
        """Bias of n small values, f32."""
        self.writer.add_tensor(f"{name}.bias", self.rng.normal(0, 0.1, n).astype(np.float32))

    def linear(self, name: str, rows: int, inputs: int, *, gain: float = 1.0) -> None:
        """Weight (rows, inputs) and bias (rows)."""
        self.matrix(name, rows, inputs, gain=gain)
        self.bias(name, rows)

    def finish(self) -> Path:
        """Writes the file."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def add_sizes(
    model: TinyModel, n_layer: int, n_embd: int, n_ff: int, n_head: int, n_kv: int | list[int], context: int
) -> None:
    """Metadata of sizes; heads of keys and values may differ from layer to layer."""
    writer = model.writer
    writer.add_context_length(context)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_kv)


# models


def write_llama(
    path: Path | str,
    *,
    dtype: str = "f16",
    n_layer: int = 2,
    n_embd: int = 128,
    n_ff: int = 256,
    n_head: int = 4,
    n_kv: int = 2,
    vocab: int = 512,
    tied: bool = False,
    n_expert: int = 0,
    n_expert_used: int = 0,
    seed: int = 0,
    context: int = 1024,
    arch: str = "llama",
) -> Path:
    """LLaMA, or a mixture of experts (Mixtral's form) when ``n_expert`` > 0; ``arch="qwen2"`` adds q, k, v biases."""
    model = TinyModel(path, arch, dtype, seed)
    head = n_embd // n_head
    add_sizes(model, n_layer, n_embd, n_ff, n_head, n_kv, context)
    model.writer.add_vocab_size(vocab)
    model.writer.add_rope_dimension_count(head)
    model.writer.add_rope_freq_base(10000.0)
    model.writer.add_layer_norm_rms_eps(1e-5)
    if n_expert:
        model.writer.add_expert_count(n_expert)
        model.writer.add_expert_used_count(n_expert_used or 2)
    if arch == "qwen2":
        quiet = add_bpe_tokenizer(model.writer, vocab, pre="qwen2")
    else:
        quiet = add_spm_tokenizer(model.writer, vocab)
    if tied:
        model.output("token_embd", vocab, n_embd, quiet=quiet)
    else:
        model.embedding("token_embd", vocab, n_embd)
    project = model.linear if arch == "qwen2" else model.matrix
    for layer in range(n_layer):
        name = f"blk.{layer}."
        model.norm(name + "attn_norm", n_embd)
        project(name + "attn_q", n_embd, n_embd, gain=0.5)
        project(name + "attn_k", n_kv * head, n_embd, gain=0.5)
        project(name + "attn_v", n_kv * head, n_embd, gain=0.5)
        model.matrix(name + "attn_output", n_embd, n_embd, gain=0.5)
        model.norm(name + "ffn_norm", n_embd)
        experts, suffix = ((n_expert,), "_exps") if n_expert else ((), "")
        if n_expert:
            model.matrix(name + "ffn_gate_inp", n_expert, n_embd)
        model.matrix(name + "ffn_gate" + suffix, *experts, n_ff, n_embd)
        model.matrix(name + "ffn_up" + suffix, *experts, n_ff, n_embd, gain=0.5)
        model.matrix(name + "ffn_down" + suffix, *experts, n_embd, n_ff, gain=0.5)
    model.norm("output_norm", n_embd, outliers=False)
    if not tied:
        model.output("output", vocab, n_embd, quiet=quiet)
    return model.finish()


def write_qwen2(path: Path | str, **options: object) -> Path:
    """Qwen2: LLaMA with biases on q, k, v and NeoX rope; options as for ``write_llama``."""
    return write_llama(path, arch="qwen2", **options)  # type: ignore[arg-type]


def write_gpt2(
    path: Path | str, *, dtype: str = "f16", n_layer: int = 2, n_embd: int = 128, n_head: int = 4, vocab: int = 512,
    seed: int = 0, context: int = 256,
) -> Path:  # fmt: skip
    """GPT-2: learned positions, fused qkv, biases, GELU, tied output."""
    model = TinyModel(path, "gpt2", dtype, seed)
    add_sizes(model, n_layer, n_embd, 4 * n_embd, n_head, n_head, context)
    model.writer.add_layer_norm_eps(1e-5)
    quiet = add_bpe_tokenizer(model.writer, vocab)
    model.output("token_embd", vocab, n_embd, quiet=quiet)
    model.embedding("position_embd", context, n_embd, size=0.05)
    _fused_blocks(model, n_layer, n_embd, 3 * n_embd)
    model.norm("output_norm", n_embd, bias=True, outliers=False)
    return model.finish()


def write_bloom(
    path: Path | str, *, dtype: str = "f16", n_layer: int = 2, n_embd: int = 128, n_head: int = 4, vocab: int = 512,
    seed: int = 0, context: int = 256,
) -> Path:  # fmt: skip
    """BLOOM: ALiBi, norm behind the embedding, fused qkv, biases, tied output."""
    model = TinyModel(path, "bloom", dtype, seed)
    add_sizes(model, n_layer, n_embd, 4 * n_embd, n_head, n_head, context)
    model.writer.add_layer_norm_eps(1e-5)
    quiet = add_bpe_tokenizer(model.writer, vocab, pre="bloom")
    model.output("token_embd", vocab, n_embd, quiet=quiet)
    model.norm("token_embd_norm", n_embd, bias=True)
    _fused_blocks(model, n_layer, n_embd, 3 * n_embd)
    model.norm("output_norm", n_embd, bias=True, outliers=False)
    return model.finish()


def _fused_blocks(model: TinyModel, n_layer: int, n_embd: int, n_qkv: int) -> None:
    """Blocks of GPT-2 and BLOOM: fused qkv (n_qkv, n_embd), plain FFN, biases everywhere."""
    for layer in range(n_layer):
        name = f"blk.{layer}."
        model.norm(name + "attn_norm", n_embd, bias=True)
        model.linear(name + "attn_qkv", n_qkv, n_embd, gain=0.5)
        model.linear(name + "attn_output", n_embd, n_embd, gain=0.5)
        model.norm(name + "ffn_norm", n_embd, bias=True)
        model.linear(name + "ffn_up", 4 * n_embd, n_embd)
        model.linear(name + "ffn_down", n_embd, 4 * n_embd, gain=0.5)


def write_falcon(
    path: Path | str, *, dtype: str = "f16", n_layer: int = 2, n_embd: int = 128, n_head: int = 4, n_kv: int = 1,
    vocab: int = 512, seed: int = 0, context: int = 256,
) -> Path:  # fmt: skip
    """Falcon: multi-query attention, attention and FFN side by side on one norm, no biases on matrices, tied output."""
    model = TinyModel(path, "falcon", dtype, seed)
    add_sizes(model, n_layer, n_embd, 4 * n_embd, n_head, n_kv, context)
    model.writer.add_layer_norm_eps(1e-5)
    quiet = add_bpe_tokenizer(model.writer, vocab, pre="falcon")
    model.output("token_embd", vocab, n_embd, quiet=quiet)
    for layer in range(n_layer):
        name = f"blk.{layer}."
        model.norm(name + "attn_norm", n_embd, bias=True)
        model.matrix(name + "attn_qkv", n_embd + 2 * n_kv * (n_embd // n_head), n_embd, gain=0.5)
        model.matrix(name + "attn_output", n_embd, n_embd, gain=0.5)
        model.matrix(name + "ffn_up", 4 * n_embd, n_embd)
        model.matrix(name + "ffn_down", n_embd, 4 * n_embd, gain=0.5)
    model.norm("output_norm", n_embd, bias=True, outliers=False)
    return model.finish()


def write_bert(
    path: Path | str, *, dtype: str = "f16", n_layer: int = 2, n_embd: int = 128, n_ff: int = 256, n_head: int = 4,
    vocab: int = 512, seed: int = 0, context: int = 256,
) -> Path:  # fmt: skip
    """BERT encoder with mean pooling: post-norm, biases, not causal; load it with ``embedding=True``."""
    model = TinyModel(path, "bert", dtype, seed)
    add_sizes(model, n_layer, n_embd, n_ff, n_head, n_head, context)
    model.writer.add_layer_norm_eps(1e-12)
    model.writer.add_causal_attention(False)
    model.writer.add_pooling_type(gguf.PoolingType.MEAN)
    add_wordpiece_tokenizer(model.writer, vocab)
    model.embedding("token_embd", vocab, n_embd)
    model.embedding("position_embd", context, n_embd, size=0.3)
    model.writer.add_tensor("token_types.weight", model.rng.normal(0, 0.1, (2, n_embd)).astype(np.float32))
    model.norm("token_embd_norm", n_embd, bias=True)
    for layer in range(n_layer):
        name = f"blk.{layer}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            model.linear(name + part, n_embd, n_embd, gain=0.5)
        model.norm(name + "attn_output_norm", n_embd, bias=True)
        model.linear(name + "ffn_up", n_ff, n_embd)
        model.linear(name + "ffn_down", n_embd, n_ff, gain=0.5)
        model.norm(name + "layer_output_norm", n_embd, bias=True)
    return model.finish()


WRITERS: dict[str, Callable[..., Path]] = {
    "llama": write_llama,
    "qwen2": write_qwen2,
    "gpt2": write_gpt2,
    "bloom": write_bloom,
    "falcon": write_falcon,
    "bert": write_bert,
}


def _check(path: Path, embedding: bool) -> str:
    """Loads the model in llama-cpp-python; returns a line that tells what it said."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=2, verbose=False, embedding=embedding, logits_all=not embedding
    )
    tokens = model.tokenize(PROMPT.encode())
    if embedding:
        vector = np.array(model.embed(PROMPT))
        return f"{len(tokens)} tokens, embedding {vector.shape}, finite {bool(np.isfinite(vector).all())}"
    text = model.detokenize(tokens).decode()
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)])
    answer = model.create_completion(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]  # type: ignore[index]
    return f"{len(tokens)} tokens, back {text!r}, logit spread {logits.std():.2f}, says {answer!r}"


def main() -> None:
    """Writes one of each and loads it."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    cases: list[tuple[str, str, dict[str, object]]] = [(name, name, {}) for name in WRITERS]
    cases += [(f"llama-{kind}", "llama", {"dtype": kind}) for kind in ("f32", "bf16")]
    cases += [("llama-tied", "llama", {"tied": True}), ("llama-moe", "llama", {"n_expert": 4, "n_expert_used": 2})]
    for label, name, options in cases:
        path = WRITERS[name](folder / f"{label}.gguf", **options)
        print(f"{label}: {path.stat().st_size} bytes, {_check(path, name == 'bert')}")


if __name__ == "__main__":
    main()
