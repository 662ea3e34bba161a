"""The independent forward of reference_pruning.py: itself without pruning, and the running plugin against it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from low_level import LowModel
from reference_model import ReferenceModel
from reference_pruning import PrunedReference, Rule, choose, importance

import agq_gguf
from agq_gguf.format import pruning_record
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.pruning.file import write_plan
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.pruned import last_head_weights


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


# the running plugin


@pytest.fixture(scope="module")
def float32(models: Path) -> Path:
    return tiny_models.write_llama(models / "prune-f32.gguf", dtype="f32", n_layer=5, seed=3)


@pytest.fixture(scope="module")
def running(float32: Path) -> Iterator[LowModel]:
    with quiet_log():
        model = LowModel(float32)
        yield model
        model.close()


CLOSE, F16_NOISE = 1e-5, 3e-3  # of the norm of the logits, with a K/V cache in F32 and in F16

RULES = {
    "one layer": {1: Rule(share=0.5)},
    "two layers": {0: Rule(share=0.3), 2: Rule(share=0.6)},
    "all layers": {i: Rule(share=0.2) for i in range(4)},
    "states used again": {i: Rule(share=0.3, reuse=True) for i in (0, 1, 3)},
    "keep and reach": {1: Rule(share=0.6, keep=30, reach=2), 2: Rule(share=0.4, keep=30, reach=2)},
}


def spec_of(rules: dict[int, Rule], score: str) -> str:
    listed = ",".join(f"{i}:{r.share if r.threshold is None else f't{r.threshold:.9g}'}" for i, r in rules.items())
    rule = next(iter(rules.values()))
    named = [f";heads={i}:{pruning_record.Heads(r.heads).spec()}" for i, r in rules.items() if r.heads]
    words = "" if rule.tail is None else f";overlap={rule.tail}"
    words += f";revive={rule.revive}" if rule.revive else ""
    return f"{listed};score={score};keep={rule.keep};reach={rule.reach};reuse={int(rule.reuse)}{words}{''.join(named)}"


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check(
    model: LowModel,
    path: Path,
    rules: dict[int, Rule],
    score: str,
    calls: list[list[int]],
    waits: Container[int] = (),
    **how: Any,
) -> tuple[int, int]:
    """Runs the calls both ways, the K/V cache in F32; returns how many tokens were dropped, and brought back.

    Nobody wants logits of the calls with the indices `waits`.
    """
    reference = PrunedReference(ReferenceModel(path), rules, score)
    dropped, brought_back, n_past = 0, 0, 0
    # With flash attention libllama makes keys and values of a cache in F32 to F16.
    exact = not how.get("flash")
    before = np.empty(0, int)
    with model.context(spec_of(rules, score), cache="f32" if exact else "f16", **how) as context:
        for i, tokens in enumerate(calls):
            if i in waits:
                reference.run(tokens, [])
                context.run(tokens, n_past)
                n_past += len(tokens)
                continue
            wanted, found = reference.run(tokens)[0], context.decode(tokens, n_past)[0]
            n_past += len(tokens)
            now = np.array(agq_gguf.last_pruned())
            np.testing.assert_array_equal(now, [reference.layers[p] for p in range(n_past)])
            before = np.concatenate([before, np.full(n_past - len(before), -1)])
            dropped += int((now > before).sum())
            brought_back += int((now < before).sum())
            before = now
            assert relative(found, wanted) < (CLOSE if exact else F16_NOISE)
    return dropped, brought_back


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("score", ["first", "received", "recent"])
@pytest.mark.parametrize("name", RULES)
def test_plugin_agrees_with_removal(float32: Path, running: LowModel, name: str, score: str, flash: bool) -> None:
    calls = [prompt(150), [301], [302], [303]]
    assert check(running, float32, RULES[name], score, calls, flash=flash)[0] > 60


HEADS = {
    "of its layer": {1: Rule(share=0.5, heads=((1, 2),))},
    "of earlier layers": {2: Rule(share=0.6, keep=32, reach=5, heads=((0, 0), (0, 3), (1, 1), (2, 2)))},
    "two cuts": {
        1: Rule(share=0.3, reach=3, heads=((0, 1), (1, 0))),
        3: Rule(share=0.5, reach=3, heads=((0, 1), (1, 3), (3, 3))),
    },
    "with the words of the question": {i: Rule(share=0.4, reach=2, heads=((0, 2),), tail=5) for i in (0, 2)},
    "states used again": {1: Rule(share=0.5, reuse=True, heads=((1, 1),))},
    "threshold": {1: Rule(threshold=0.95, keep=32, reach=4, heads=((0, 2), (1, 2)), tail=0)},
}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_plugin_agrees_on_heads(float32: Path, running: LowModel, name: str, flash: bool) -> None:
    """Also in a later turn, whose queries see the cells of the first."""
    calls = [prompt(150), [301], prompt(100, seed=6), [302]]
    dropped, brought_back = check(running, float32, HEADS[name], "heads", calls, flash=flash)
    assert dropped > 60 and (brought_back > 5) == (name == "threshold")


PIECES = {
    "one cut": {1: Rule(share=0.5, heads=((1, 2), (0, 1)), reach=2)},
    "two cuts": {
        1: Rule(share=0.3, reach=3, keep=40, heads=((0, 1), (1, 0))),
        3: Rule(share=0.5, reach=3, keep=40, heads=((0, 1), (1, 3), (2, 0), (3, 3))),
    },
    "with the words of the question": {i: Rule(share=0.4, reach=2, heads=((0, 2),), tail=5) for i in (1, 2)},
    "threshold": {2: Rule(threshold=0.95, keep=32, reach=4, heads=((0, 2), (1, 2)))},
    "two thresholds": {
        1: Rule(threshold=0.7, reach=4, heads=((0, 2), (1, 2))),
        2: Rule(threshold=0.9, reach=4, heads=((0, 2), (2, 1))),
    },
    "threshold, then a share": {
        1: Rule(threshold=0.8, reach=4, heads=((0, 2), (1, 2))),
        3: Rule(share=0.4, reach=4, heads=((0, 2), (2, 1))),
    },
    "share that returns": {1: Rule(share=0.5, heads=((1, 2), (0, 1)), reach=2, revive=0.1)},
    "two shares that return": {
        1: Rule(share=0.3, reach=3, keep=40, heads=((0, 1), (1, 0)), revive=0.2),
        3: Rule(share=0.5, reach=3, keep=40, heads=((0, 1), (1, 3), (2, 0), (3, 3)), revive=0.2),
    },
}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_plugin_agrees_on_prompts_in_pieces(float32: Path, running: LowModel, name: str, flash: bool) -> None:
    """Pieces wait for their question. A later, short question brings tokens back by a threshold or `revive`."""
    calls = [prompt(90), prompt(64, seed=1), prompt(100, seed=2), [301], prompt(30, seed=4), [302]]
    # A single token cannot choose, so it sees all that waited.
    calls += [prompt(70, seed=7), [303], prompt(40, seed=8), prompt(50, seed=9), [304]]
    dropped, brought_back = check(running, float32, PIECES[name], "heads", calls, {0, 1, 6, 8}, flash=flash)
    assert dropped > 60 and (brought_back > 5) == ("threshold" in name or "return" in name)


def test_weights_of_heads(float32: Path, running: LowModel) -> None:
    """`heads=all` measures every head of a layer, also where nothing is dropped."""
    tokens = prompt(100)
    model = ReferenceModel(float32)
    with running.context("0:t0,2:t0;score=heads;heads=all", cache="f32") as context:
        context.decode(tokens)
    reference = PrunedReference(model, {}, "heads")
    reference.run(tokens)
    for layer in (0, 2):
        for head in range(model.n_head):
            found = last_head_weights(layer, head)
            np.testing.assert_allclose(found, reference.seen[layer, head], atol=1e-6)
    assert not len(last_head_weights(1, 0)) and not len(last_head_weights(0, model.n_head))


def test_plugin_agrees_over_several_calls(float32: Path, running: LowModel) -> None:
    """Prompts in pieces, a turn of chat too short to prune, another that is long enough."""
    calls = [prompt(120), prompt(90, seed=1), [305], prompt(40, seed=2), [306], prompt(100, seed=3), [307]]
    assert check(running, float32, RULES["two layers"], "received", calls)[0] > 150
    assert check(running, float32, {1: Rule(threshold=0.9)}, "recent", calls, flash=True)[0] > 50


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("score", ["received", "learned"])
def test_thresholds_in_the_file(float32: Path, models: Path, score: str, reuse: bool) -> None:
    """The record in a tensor says what to drop, and `options` what to do instead."""
    if not (models / "prune-agq4.gguf").exists():
        quantize(float32, models / "prune-agq4.gguf", options=QuantizeOptions(threads=1, embedding_type="agq4"))
    path, record = models / "prune-record.gguf", pruning_record.Pruning(score, 1.0, keep=20, reach=1, reuse=reuse)
    direction = None
    if score == "learned":
        record = replace(
            record, threshold=4.0, direction=pruning_record.Direction.of(np.random.default_rng(2).normal(0, 0.2, 128))
        )
        assert record.direction is not None
        direction = record.direction.values().astype(np.float64)
    with open_gguf(models / "prune-agq4.gguf") as reader:
        write_plan(reader, path, {"blk.0.ffn_up.weight": record}, {}, lambda *_: None)
    tokens = prompt(100)
    rule = Rule(threshold=record.threshold, keep=20, reach=1, reuse=reuse, direction=direction)
    reference = PrunedReference(ReferenceModel(path), {0: rule}, score)
    wanted, plain = reference.run(tokens)[0], ReferenceModel(path).logits(tokens)[-1]
    assert 10 < (reference.left_behind >= 0).sum() < 80
    # A last bit of a sum may become 1/127 of a token's largest activation: docs/design.md, "What int8 rounding does".
    model, noise = LowModel(path), 0.03
    assert relative(plain, wanted) > 3 * noise
    with model.context("file", cache="f32") as context:
        assert relative(context.decode(tokens)[0], wanted) < noise
        np.testing.assert_array_equal(agq_gguf.last_pruned(), reference.left_behind)
    with model.context("off", cache="f32") as context:
        assert relative(context.decode(tokens)[0], plain) < noise
        assert set(agq_gguf.last_pruned()) == {-1}
    model.close()
