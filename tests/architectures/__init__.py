"""Tiny GGUF models with random weights, one writer for each architecture of llama.cpp that tests run.

They are for seeing that quantized products run in graphs of every kind, and that graphs run in PyTorch: other norms
and positions, fused matrices, caps, scales, sliding windows, experts, encoders, recurrent layers, and shapes that AGQ4
cannot hold. Each file of this folder has one kind of layer; the tables below say which tests a model is made for.
`tiny_models` has the six architectures whose sizes tests choose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import tiny_models

from architectures import dense, encoders, experts, recurrent
from architectures.dense import (
    write_cohere2,
    write_gemma2,
    write_gemma3,
    write_gemma3n,
    write_gemma4,
    write_phi3,
    write_qwen2vl,
    write_qwen3,
    write_qwen3vl,
)
from architectures.encoders import write_gemma_embedding, write_t5
from architectures.experts import (
    write_deepseek2,
    write_glm4moe,
    write_gpt_oss,
    write_llama4,
    write_mixtral,
    write_qwen3moe,
)
from architectures.recurrent import write_rwkv7

__all__ = [
    "DECODERS",
    "DIFFUSION",
    "ENCODERS",
    "FIELD",
    "GRAPHS",
    "write_cohere2",
    "write_deepseek2",
    "write_gemma2",
    "write_gemma3",
    "write_gemma3n",
    "write_gemma4",
    "write_gemma_embedding",
    "write_glm4moe",
    "write_gpt_oss",
    "write_llama4",
    "write_mixtral",
    "write_phi3",
    "write_qwen2vl",
    "write_qwen3",
    "write_qwen3moe",
    "write_qwen3vl",
    "write_rwkv7",
    "write_t5",
]

Writers = dict[str, Callable[[Path | str], Path]]

# Decoders that are quantized, compared with their weights, and pruned.
DECODERS: Writers = {
    **{name: partial(tiny_models.WRITERS[name], dtype="f32") for name in ("llama", "qwen2", "gpt2", "bloom", "falcon")},
    "qwen3": write_qwen3,
    "gemma2": write_gemma2,
    "gemma3": write_gemma3,
    "phi3": write_phi3,
    "starcoder2": dense.write_starcoder2,
    "mpt": dense.write_mpt,
    "mixtral": write_mixtral,
    "qwen3moe": write_qwen3moe,
    "mamba": recurrent.write_mamba,
    "odd": dense.write_odd,
    "halves": dense.write_halves,
}

# Decoders with tensors that no other has: they are quantized and compared.
FIELD: Writers = {
    "deepseek2": write_deepseek2,
    "gemma3n": write_gemma3n,
    "glm4moe": write_glm4moe,
    "gpt-oss": write_gpt_oss,
    "granitehybrid": recurrent.write_granitehybrid,
    "grovemoe": experts.write_grovemoe,
    "lfm2": recurrent.write_lfm2,
    "rwkv7": write_rwkv7,
}

# Decoders with the tensors of others under other rules: their graphs are compared.
GRAPHS: Writers = {
    "gemma": dense.write_gemma,
    "granite": dense.write_granite,
    "smollm3": dense.write_smollm3,
    "llama31": dense.write_llama31,
    "yarn": dense.write_yarn,
    "qwen2vl": write_qwen2vl,
    "stablelm": dense.write_stablelm,
    "phi2": dense.write_phi2,
    "gptneox": dense.write_gptneox,
    "nemotron": dense.write_nemotron,
    "olmo2": dense.write_olmo2,
    "cohere2": write_cohere2,
    "glm4": dense.write_glm4,
    "qwen2moe": experts.write_qwen2moe,
}

# Encoders, which predict no next token.
ENCODERS: Writers = {
    "bert": tiny_models.write_bert,
    "gemma-embedding": write_gemma_embedding,
    "t5": encoders.write_t5,
}

# Models that are made for their embeddings; Qwen3's also predicts a next token.
EMBEDDERS: Writers = {
    "bert": tiny_models.write_bert,
    "gemma-embedding": write_gemma_embedding,
    "qwen3-embedding": partial(dense.write_qwen3, pooling=gguf.PoolingType.LAST),
}

# Models that fill gaps, which is not predicting the next token either.
DIFFUSION: Writers = {name: partial(encoders.write_diffusion, arch=name) for name in ("dream", "llada")}
