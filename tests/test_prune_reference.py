"""The independent forward of reference_pruning.py: itself without pruning, and the running plugin against it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference_model import ReferenceModel
from reference_pruning import PrunedReference, Rule, choose, importance


@pytest.fixture(scope="module")
def reference(llama_f16: Path) -> ReferenceModel:
    return ReferenceModel(llama_f16)


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [1, *rng.integers(300, 420, n - 1).tolist()]


def test_without_rules_it_is_the_plain_forward(reference: ReferenceModel) -> None:
    tokens = prompt(40)
    whole = reference.logits(tokens)
    np.testing.assert_allclose(PrunedReference(reference, {}, "first").run(tokens, list(range(40))), whole, atol=1e-9)
    pieces = PrunedReference(reference, {}, "first")
    for begin, end in ((0, 17), (17, 18), (18, 40)):
        found = pieces.run(tokens[begin:end], list(range(end - begin)))
        np.testing.assert_allclose(found, whole[begin:end], atol=1e-9)


def test_the_last_tokens_stay(reference: ReferenceModel) -> None:
    everything = Rule(share=1.0)
    for score, rule, kept in (
        ("first", everything, 1),
        ("first", Rule(share=1.0, keep=20), 20),
        ("recent", Rule(share=1.0, keep=3), 8),
        ("received", Rule(threshold=1e9, keep=3), 3),
    ):
        pruned = PrunedReference(reference, {0: rule}, score)
        pruned.run(prompt(70))
        assert (pruned.left_behind >= 0).tolist() == [False] + [True] * (69 - kept) + [False] * kept


@pytest.mark.parametrize("score", ["first", "received", "recent"])
def test_what_is_dropped_does_not_count(reference: ReferenceModel, score: str) -> None:
    """Behind a prompt with half of its tokens dropped behind layer 0, the model answers to the rest alone."""
    tokens = prompt(70)
    pruned = PrunedReference(reference, {0: Rule(share=0.5)}, score)
    last = pruned.run(tokens)
    left = pruned.left_behind
    assert (left == 0).sum() == 35 and left[0] == left[-1] == -1
    if score == "recent":
        assert (left[-8:] == -1).all()
    assert [len(np.concatenate(c.positions)) for c in pruned.caches] == [70, 35]
    unpruned = PrunedReference(reference, {}, score)
    assert np.abs(unpruned.run(tokens) - last).max() > 1e-3
    # A call shorter than the minimum is not pruned, and sees what the prompt left.
    pruned.run(tokens[:3])
    assert [len(np.concatenate(c.positions)) for c in pruned.caches] == [73, 38]
    # A mask in the unpruned forward says the same as removal.
    assert np.abs(masked_last_logits(reference, tokens, left) - last).max() < 1e-9


def masked_last_logits(reference: ReferenceModel, tokens: list[int], left: np.ndarray) -> np.ndarray:
    """Logits of the last token when, in layers behind 0, nobody attends to the tokens that left."""
    m = reference
    x = m.weight("token_embd.weight")[tokens]
    gone = left >= 0
    for i in range(m.n_layer):
        block = f"blk.{i}"
        h = m.norm(x, f"{block}.attn_norm.weight")
        q = m.rope(m.linear(h, f"{block}.attn_q.weight").reshape(len(x), m.n_head, -1))
        k = m.rope(m.linear(h, f"{block}.attn_k.weight").reshape(len(x), m.n_kv, -1))
        v = m.linear(h, f"{block}.attn_v.weight").reshape(len(x), m.n_kv, -1)
        k, v = (np.repeat(t, m.n_head // m.n_kv, axis=1) for t in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        if i > 0:
            scores[:, :, gone] = -np.inf
        with np.errstate(invalid="ignore"):
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = np.nan_to_num(weights / weights.sum(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1)
        x = x + m.linear(mixed, f"{block}.attn_output.weight")
        x = x + m.swiglu(m.norm(x, f"{block}.ffn_norm.weight"), block)
    return m.linear(m.norm(x[-1:], "output_norm.weight"), "output.weight")


def test_importance_of_even_attention_is_one() -> None:
    positions = np.arange(12)
    even = np.tril(np.ones((12, 12))) / np.arange(1, 13)[:, None]
    weights = np.repeat(even[None], 3, axis=0)
    np.testing.assert_allclose(importance(weights, positions, positions, "first"), 1 / np.arange(1, 13))
    received = importance(weights, positions, positions, "received")
    np.testing.assert_allclose(received[:-1], 1)
    assert received[-1] == 0  # nobody could
    recent = importance(weights, positions, positions, "recent")
    np.testing.assert_allclose(recent[:5], 1)
    np.testing.assert_allclose(recent[5:], np.arange(7, 0, -1) / 8)


def test_importance_by_hand() -> None:
    """Two heads, three tokens behind one cell of an earlier call."""
    weights = np.array(
        [
            [[0.5, 0.5, 0, 0], [0.2, 0.2, 0.6, 0], [0.1, 0.4, 0.3, 0.2]],
            [[0.9, 0.1, 0, 0], [0.6, 0.4, 0.0, 0], [0.3, 0.2, 0.1, 0.4]],
        ]
    )
    cells = np.arange(4)
    np.testing.assert_allclose(importance(weights, cells[1:], cells, "first"), [0.7, 0.4, 0.2])
    received = importance(weights, cells[1:], cells, "received")
    np.testing.assert_allclose(received[:2], [(0.3 + 0.3) / (1 / 3 + 1 / 4), 0.2 / (1 / 4)])


def test_choice() -> None:
    values = np.array([0.5, 1.5, 0.1, 0.1, 0.9, 0.0])
    protected = np.array([False, True, False, False, False, True])
    assert choose(values, Rule(share=0.5), protected).nonzero()[0].tolist() == [0, 2, 3]
    assert choose(values, Rule(share=0.2), protected).nonzero()[0].tolist() == [2]
    assert choose(values, Rule(share=1.0), protected).nonzero()[0].tolist() == [0, 2, 3, 4]
    assert choose(values, Rule(threshold=0.5), protected).nonzero()[0].tolist() == [2, 3]
    assert choose(values, Rule(threshold=1.2, reach=1), protected).nonzero()[0].tolist() == [3, 4]
