"""A running model on long texts, product by product: each equals the reference, given the input that it really had.

Whole-model logits of a long text cannot be compared as tightly as those of a short one: one activation that lies
between two int8 steps and falls the other way changes everything behind it (docs/design.md). Here nothing adds up.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models

from agq_gguf.format import blocks, reference
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.ggml import GgmlTensor, ggml
from agq_gguf.runtime.model import Batch, Model

N_TOKENS = 400
OPTIONS = QuantizeOptions(output_type="agq4", embedding_type="agq4", threads=1)


@pytest.fixture(scope="module", params=[0, 4], ids=["dense", "experts"])
def model(request: pytest.FixtureRequest, models: Path) -> Path:
    source = tiny_models.write_llama(
        models / f"long-{request.param}-f32.gguf", dtype="f32", n_embd=256, n_ff=384,
        n_expert=request.param, n_expert_used=request.param // 2,
    )  # fmt: skip
    path = models / f"long-{request.param}-agq4.gguf"
    quantize(source, path, options=OPTIONS)
    return path


def reference_product(weights: np.ndarray, x: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """[tokens, M], or [tokens, used, M] with experts; ``x`` is [1, tokens, slots, K] or [1, 1, tokens, K]."""
    if ids is None:
        return reference.matmul_reference(x[0, 0], blocks.unpack(weights))
    slots = np.broadcast_to(x[0], (len(ids), ids.shape[1], x.shape[-1]))
    out = [[None] * ids.shape[1] for _ in ids]
    for expert in np.unique(ids):
        rows, used = np.nonzero(ids == expert)
        results = reference.matmul_reference(np.ascontiguousarray(slots[rows, used]), blocks.unpack(weights[expert]))
        for t, u, y in zip(rows, used, results, strict=True):
            out[t][u] = y
    return np.array(out)


def test_every_product_of_a_long_text_equals_the_reference(model: Path) -> None:
    weights = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(model).tensors if t.tensor_type == blocks.TYPE_ID}
    look, found = ggml(), {}

    def callback(address: int, ask: bool) -> bool:
        node = GgmlTensor.from_address(address)
        if node.op not in (look.mul_mat, look.mul_mat_id):
            return False
        name = node.src[0].contents.name.decode()
        if name in weights and not ask:
            x = look.floats(node.src[1].contents).copy()
            ids = look.integers(node.src[2].contents)[0, 0].copy() if node.op == look.mul_mat_id else None
            y = look.floats(node)[0]
            found[name] = x, ids, (y[0] if ids is None else y).copy()
        return name in weights if ask else True

    tokens = np.random.default_rng(3).integers(3, 60, N_TOKENS).astype(np.int32)
    with Model(model) as opened, opened.context(512, threads=1, eval_callback=callback) as context:
        context.decode(Batch(tokens, first_logits=0))
    products = set(weights) - {"token_embd.weight"}  # whose rows are looked up
    assert set(found) == products
    for name, (x, ids, y) in found.items():
        wanted = reference_product(weights[name], x, ids)
        assert y.shape == wanted.shape, name
        assert len(y) == N_TOKENS, name
        error = np.linalg.norm(y - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert error.max() < 1e-5, name
