"""Token pruning with M-RoPE: four positions for each token, as models have them that see images.

Prompts of text are pruned as in other models. Ubatches with tokens of an image are not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import architectures
import llama_cpp.llama_cpp as api
import low_level
import numpy as np
import pytest
from architectures import parts
from low_level import GetModel, LowContext, LowModel, models_fixture, tokens
from test_prune_situations import ATOL, Pair, copy_and_remove_sequences, forget
from test_prune_slots import PROMPTS, SIDE_BY_SIDE, as_alone, steps
from test_prune_ubatches import CUTS, assert_same_choice

import agq_gguf

WRITERS: dict[str, Callable[[Path], Path]] = {
    "qwen2vl": partial(architectures.write_qwen2vl, layers=6),
    "qwen3vl": partial(architectures.write_qwen3vl, layers=6),
}
WIDTHS = {"qwen2vl": parts.E, "qwen3vl": 2 * parts.E}  # of a token of an image: it has a part for layer 0, too
SIDE = 6  # tokens in a row and a column of an image

model = models_fixture(lambda arch, path: WRITERS[arch](path), "f32")


def warnings() -> list[str]:
    return [line for line in low_level.log if "pruning" in line]


def run(model: LowModel, prune: str, **options: object) -> tuple[np.ndarray, list[int]]:
    """Logits of the last token of a prompt and of tokens behind it, and the fate of the prompt's tokens."""
    with model.context(prune, **options) as context:
        logits = [context.decode(tokens(200))]
        fate = agq_gguf.last_pruned()
        logits += [context.decode([11 + i], 200 + i) for i in range(3)]
    return np.concatenate(logits), fate


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", ["1:0.5", "1:0.3,3:0.5", "2:t0.9", "2:0.4;score=recent", "1:0.5;score=random"])
@pytest.mark.parametrize("arch", sorted(WRITERS))
def test_pruned_equals_masked(model: GetModel, arch: str, spec: str, flash: bool) -> None:
    m = model(arch, "agq4")
    whole, _ = run(m, "off", flash=flash)
    pruned, fate = run(m, spec, flash=flash)
    masked, masked_fate = run(m, "mask," + spec, flash=flash)
    assert fate == masked_fate and len(fate) == 200
    assert 5 <= sum(layer >= 0 for layer in fate) <= 150
    np.testing.assert_array_equal(pruned[0], masked[0])
    np.testing.assert_allclose(pruned, masked, atol=1e-4)  # of a few rows, attention adds chunks of the cells
    assert not np.allclose(pruned, whole, atol=1e-3)
    assert warnings() == []


def test_turns_of_a_chat(model: GetModel) -> None:
    """Prompts in several ubatches, generation, and a part of the cache that is forgotten."""
    with Pair(model("qwen2vl"), "0:0.3,2:0.4;min=16", n_ctx=1024, n_ubatch=96) as pair:
        pair.decode(tokens(400))
        assert 150 < pair.dropped() < 300
        for i in range(3):
            pair.decode([5 + i], 400 + i)
        pair.each(forget(350, -1))
        pair.decode(tokens(150, 3), 350)
        assert 50 < pair.dropped(350) < 120
        pair.decode([9], 500)
        assert pair.largest_effect > 20 * ATOL
    assert warnings() == []


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_are_copied_and_removed(model: GetModel, unified: bool) -> None:
    with Pair(model("qwen3vl"), n_ctx=1024, n_seq=3, unified=unified) as pair:
        copy_and_remove_sequences(pair)
        pair.decode([5, 6], sequence=[[1], [2]], positions=[251, 120], outputs=[0, 1])
        assert pair.largest_effect > 20 * ATOL
    assert warnings() == []


def test_states_are_used_again(model: GetModel) -> None:
    """With `reuse=1`, dropped tokens leave keys that were turned by their own positions."""
    m = model("qwen2vl", "agq4")
    hidden, fate = run(m, "1:0.5", flash=True)
    again, same = run(m, "1:0.5;reuse=1", flash=True)
    whole, _ = run(m, "off", flash=True)
    assert fate == same
    assert np.abs(again - whole).max() < np.abs(hidden - whole).max() and not np.allclose(again, whole, atol=1e-3)


# Not qwen2vl with flash attention: without pruning, the host's logits differ by 0.03 between ubatches of 512 and 59.
@pytest.mark.parametrize(("arch", "flash"), [("qwen2vl", False), ("qwen3vl", False), ("qwen3vl", True)])
@pytest.mark.parametrize("cut", CUTS)
def test_same_choice_as_in_one_call(model: GetModel, arch: str, cut: str, flash: bool) -> None:
    """With the score `heads`, tokens wait for the question; their positions are written again when it comes."""
    ubatches = (512, 150, 64, 59)
    assert_same_choice(model(arch), CUTS[cut], tokens(300), ubatches, range(101, 250), 20 * ATOL, flash=flash)
    assert warnings() == []


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("spec", ["1:0.5", CUTS["two cuts"]])
def test_prompts_side_by_side(model: GetModel, spec: str, unified: bool) -> None:
    """Each of two sequences gets what it would get alone. With streams, each is given its own part of the positions."""
    pieces, n = [SIDE_BY_SIDE[0][:2]], 2
    if not unified:  # the host computes as many tokens of each stream together
        n_each = min(len(prompt) for prompt in PROMPTS[:2])
        pieces = [[type(p)(p.sequence, p.ids[:n_each]) for p in SIDE_BY_SIDE[0][:2]]]
    then = steps({p.sequence: len(p.ids) for p in pieces[0]})
    as_alone(model("qwen2vl", "agq4"), spec, [*pieces, *([step[:n] for step in then])], unified=unified)


# images


def run_image(context: LowContext, at: int, width: int = parts.E) -> None:
    """Computes the tokens of an image: embeddings of this width, with a time, a row and a column.

    The next position is `at + SIDE`.
    """
    n, rng = SIDE * SIDE, np.random.default_rng(4)
    rows, columns = (side.ravel() for side in np.mgrid[:SIDE, :SIDE])
    positions = np.array([np.zeros(n), rows, columns, np.zeros(n)], np.int32)
    positions[:3] += at
    content = rng.normal(0, 1, (n, width)).astype(np.float32)
    sequence = (ctypes.c_int32 * 1)(0)
    integers = ctypes.POINTER(ctypes.c_int32)
    batch = api.llama_batch(
        n_tokens=n,
        token=None,
        embd=content.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos=positions.ctypes.data_as(integers),
        n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
        seq_id=(integers * n)(*[ctypes.cast(sequence, integers)] * n),
        logits=(ctypes.c_int8 * n)(*[0] * (n - 1), 1),
    )
    assert api.llama_decode(context.context, batch) == 0


@pytest.mark.parametrize("arch", sorted(WRITERS))
def test_images_are_not_pruned(model: GetModel, arch: str) -> None:
    """The text around them is."""
    with Pair(model(arch), "1:0.5;min=16", n_ctx=512) as pair:
        pair.decode(tokens(100))
        assert pair.dropped() == 50
        pair.each(lambda context: run_image(context, 100, WIDTHS[arch]))
        assert agq_gguf.last_pruned()[100:] == [-1] * SIDE * SIDE
        pair.decode(tokens(80, 1), 100 + SIDE)
        assert pair.dropped(100) == 40
        for i in range(3):
            pair.decode([5 + i], 180 + SIDE + i)
        assert pair.largest_effect > 20 * ATOL
    # Once in the pruned context, once in the one that hides tokens.
    assert len(warnings()) == 2
    reason = {"qwen2vl": "embeddings instead of tokens", "qwen3vl": "positions of M-RoPE that differ"}[arch]
    assert all(reason in line for line in warnings())


def test_text_behind_an_image_does_not_wait(model: GetModel) -> None:
    """Nor does it have to: it is pruned if it comes in one ubatch."""
    m, spec = model("qwen2vl"), CUTS["share"] + ";min=16"
    found = []
    for prune in (spec, "off"):
        with m.context(prune) as context:
            context.decode(tokens(40))
            run_image(context, 40)
            context.run(tokens(60, 1), 40 + SIDE)
            found.append(context.decode(tokens(50, 2), 100 + SIDE))
            if prune == spec:
                fate = agq_gguf.last_pruned()
    n_before = 40 + SIDE * SIDE
    assert fate[n_before : n_before + 60] == [-1] * 60
    assert 10 < sum(layer >= 0 for layer in fate[n_before + 60 :]) <= 34
    assert len(warnings()) == 2
    assert "those of an image" in warnings()[0] and "or tokens of an image" in warnings()[1]
    assert np.abs(found[0] - found[1]).max() > 20 * ATOL


# calibration


def test_calibration_by_a_share(model: GetModel, tmp_path: Path, words_file: Path) -> None:
    source, out = model("qwen2vl", "agq4").path, tmp_path / "out.gguf"
    choice = agq_gguf.PruneOptions(share=0.2, prompts=2, threads=1)
    report = agq_gguf.calibrate_pruning(source, out, calibration=words_file, choice=choice)
    assert report is not None and report.chosen.plan.layers
    with LowModel(out) as m, m.context("file") as context:
        context.decode(tokens(parts.CONTEXT))
        assert sum(layer >= 0 for layer in agq_gguf.last_pruned()) > 20
    assert warnings() == []
