"""Products with Q8_0 weights, which the output matrix of most AGQ4 files has, run in the plugin's own kernels."""

from __future__ import annotations

from pathlib import Path

import architectures
import gguf
import numpy as np
import pytest
from low_level import QUICK

from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime import plugin
from agq_gguf.runtime.machine import kernels
from agq_gguf.runtime.model import Batch, Model

HAVE = ("avx512vnni", "avxvnni", "avx2")  # kernels with products of Q8_0
pytestmark = pytest.mark.skipif(
    all(kernel.name not in HAVE for kernel in kernels() if kernel.chosen), reason="the kernel leaves them to the host"
)


def product(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [tokens, k] times weights [rows, k / 32 * 34], as kernels/q8.h has it; and the sum of the terms' magnitudes.

    llama.cpp rounds the scales of activations to binary16; the plugin does not.
    """
    blocks = weights.reshape(len(weights), -1, 34)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float64)[..., 0]
    integers = blocks[:, :, 2:].copy().view(np.int8).astype(np.int64)
    parts = x.reshape(len(x), -1, 32)
    largest = np.abs(parts).max(-1, keepdims=True)
    q = np.rint(parts * (np.float32(127) / largest)).astype(np.int64)
    units = largest[..., 0].astype(np.float64) / 127
    terms = np.einsum("tbi,rbi->trb", q, integers) * units[:, None] * scales
    return terms.sum(-1), np.abs(terms).sum(-1)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13, 40])
def test_the_output_matrix(n: int, llama_agq: Path) -> None:
    tensor = next(t for t in gguf.GGUFReader(llama_agq).tensors if t.name == "output.weight")
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    with Model(llama_agq) as model, model.context(64, threads=2, embeddings="tokens") as context:
        batch = Batch(np.random.default_rng(n).integers(300, 420, n), first_logits=0)
        context.decode(batch)
        logits, states = context.logits(batch).copy(), context.embeddings(batch).copy()
    wanted, sizes = product(states, tensor.data)
    assert np.all(np.abs(logits - wanted) <= 1e-6 * sizes)


@pytest.mark.parametrize("n", [1, 9])
def test_a_matrix_for_each_head(n: int, tmp_path: Path) -> None:
    """DeepSeek's attn_v_b. llama.cpp's product, which the scalar kernel leaves it to, rounds activations otherwise."""
    path = tmp_path / "agq4.gguf"
    quantize(architectures.write_deepseek2(tmp_path / "f16.gguf"), path, options=QUICK)
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_v_b.weight"] == gguf.GGMLQuantizationType.Q8_0
    tokens = np.random.default_rng(n).integers(300, 420, n)
    found = []
    with Model(path) as model:
        for isa in ("scalar", ""):
            with plugin.options(isa=isa), model.context(64, threads=2, flash_attention="off") as context:
                batch = Batch(tokens, first_logits=0)
                context.decode(batch)
                found.append(context.logits(batch).copy())
    assert 0 < np.linalg.norm(found[0] - found[1]) < 0.02 * np.linalg.norm(found[0])
