"""Token pruning with sliding windows: two kinds of attention, each with its own mask and its own cache.

A cache of windows is either as large as the context (`swa_full`), or its cells are used again as soon as a token has
left the window. Both must go on as a context that only hides the dropped tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import architectures
import llama_cpp.llama_cpp as api
import low_level
import numpy as np
import pytest
from architectures import parts
from low_level import GetModel, LowContext, LowModel, models_fixture, tokens
from reference_pruning import PrunedReference, Rule
from reference_windows import WindowedModel
from test_prune_reference import relative, spec_of
from test_prune_situations import (
    ATOL,
    Pair,
    copy_and_remove_sequences,
    forget,
    shift,
    shift_twice,
    unpruned_with_one_warning,
    warnings,
)

import agq_gguf

WINDOW = 48
WRITERS: dict[str, Callable[[Path], Path]] = {
    "gemma2": partial(architectures.write_gemma2, layers=4, window=WINDOW),
    "gemma3": partial(architectures.write_gemma3, layers=4, window=WINDOW),
    "gpt-oss": partial(architectures.write_gpt_oss, yarn=True, layers=4, window=WINDOW),
    "cohere2": partial(architectures.write_cohere2, window=WINDOW),
    "llama4": architectures.write_llama4,
}


model = models_fixture(lambda arch, path: WRITERS[arch](path), "f32")


def run(model: LowModel, prune: str, n: int = 200, decode: int = 3, **options: object) -> tuple[np.ndarray, list[int]]:
    """Logits of the last prompt token and of tokens behind it, and the fate of the prompt's tokens."""
    with model.context(prune, **options) as context:
        logits = [context.decode(tokens(n))]
        fate = agq_gguf.last_pruned()
        logits += [context.decode([11 + i], n + i) for i in range(decode)]
    return np.concatenate(logits), fate


# At least 32 tokens are left in every segment: fewer would go through another attention kernel than in the masked run.
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", ["1:0.5", "0:0.3,2:0.5", "1:t0.9", "2:0.4;score=recent", "1:0.5;score=random"])
@pytest.mark.parametrize("arch", sorted(WRITERS))
def test_pruned_equals_masked(model: GetModel, arch: str, spec: str, flash: bool) -> None:
    m = model(arch, "agq4")
    whole, _ = run(m, "off", flash=flash, n_ubatch=100)
    found = []
    for full in (True, False):
        options = {"flash": flash, "n_ubatch": 100, "swa_full": full}
        pruned, fate = run(m, spec, **options)
        masked, masked_fate = run(m, "mask," + spec, **options)
        assert fate == masked_fate and len(fate) == 200
        assert 5 <= sum(layer >= 0 for layer in fate) <= 150
        np.testing.assert_array_equal(pruned[0], masked[0])
        np.testing.assert_allclose(pruned, masked, atol=1e-4)  # of a few rows, attention adds chunks of the cells
        assert not np.allclose(pruned, whole, atol=1e-3)
        found.append(pruned)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)  # the size of the cache changes nothing
    assert warnings() == []


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("arch", sorted(set(WRITERS) - {"llama4"}))
def test_generation_beyond_the_window(model: GetModel, arch: str, full: bool, flash: bool) -> None:
    """Prompts of several ubatches wrap the small cache; then the window leaves the prompt behind."""
    options = {"n_ctx": 768, "n_ubatch": 96, "flash": flash, "swa_full": full}
    with Pair(model(arch), "0:0.3,1:0.4,2:0.3;min=16", **options) as pair:
        pair.decode(tokens(400))
        assert 200 < pair.dropped() < 320
        for i in range(WINDOW + 20):
            pair.decode([5 + i], 400 + i)
        position = 400 + WINDOW + 20
        pair.decode(tokens(150, 3), position)  # a later turn, which overwrites cells of dropped tokens
        assert 60 < pair.dropped(position) < 120
        pair.decode([9], position + 150)
        assert pair.largest_effect > 20 * ATOL
    assert warnings() == []


@pytest.mark.parametrize("arch", ["gemma3", "gemma2"])
def test_little_is_left_of_a_window(model: GetModel, arch: str) -> None:
    """Whole windows of dropped tokens see nothing any more; a softmax of nothing is not a number."""
    for flash in (False, True):
        with Pair(model(arch), "0:0.97;min=16", flash=flash, swa_full=False) as pair:
            pair.decode(tokens(300))
            assert pair.dropped() == 291
            for i in range(3):
                pair.decode([5 + i], 300 + i)
            pair.decode(tokens(60, 4), 303)
            assert pair.largest_effect > 20 * ATOL


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_save_and_restore(model: GetModel, whole: bool, full: bool) -> None:
    assert_restored(model("gemma3"), "1:0.5;min=16", None if whole else 0, full)


def assert_restored(m: LowModel, prune: str, sequence: int | None, full: bool) -> None:
    """A saved state hides what was dropped, also in a context that held other tokens and does not prune."""
    options = {"cache": "f32", "swa_full": full, "n_ubatch": 96}
    with m.context(prune, **options) as pruned, m.context("off", **options) as other:
        pruned.decode(tokens(300))
        state = pruned.save(sequence)
        wanted = [pruned.decode([7 + i], 300 + i) for i in range(4)]
        other.decode(tokens(330, 9))  # leaves other keys and other tokens
        api.llama_memory_clear(other.memory, True)
        other.restore(state, sequence)
        found = [other.decode([7 + i], 300 + i) for i in range(4)]  # hidden although pruning is off here
        np.testing.assert_allclose(found, wanted, atol=ATOL, rtol=0)
        with m.context("off", **options) as plain:
            plain.decode(tokens(300))
            assert np.abs(plain.decode([7], 300) - wanted[0]).max() > 20 * ATOL


@pytest.mark.parametrize("cache", ["f32", "f16"])
def test_context_shift(model: GetModel, cache: str) -> None:
    """Positions move in both caches: zero rows become rows of minus zero."""
    with Pair(model("gemma3"), "1:0.5;min=16", cache=cache) as pair:
        shift_twice(pair)
        pair.each(forget(2, 2 + 30))
        pair.each(shift(30))
        pair.decode([5], 171)
        assert pair.largest_effect > 20 * ATOL


@pytest.mark.parametrize("full", [False, True])
def test_sequences_are_copied_removed_and_go_on_together(model: GetModel, full: bool) -> None:
    with Pair(model("gemma3"), n_ctx=1024, n_seq=3, swa_full=full) as pair:
        copy_and_remove_sequences(pair)
        for i in range(3):
            pair.decode([5, 6], sequence=[[1], [2]], positions=[251 + i, 120 + i], outputs=[0, 1])
        pair.each(forget(-1, -1, 1))
        pair.decode([9], 123, sequence=2)
        assert pair.largest_effect > 20 * ATOL
    assert warnings() == []


def test_streams_of_sequences_go_on_together(model: GetModel) -> None:
    with Pair(model("gemma3"), n_ctx=1024, n_seq=2, unified=False, swa_full=False) as pair:
        pair.decode(tokens(150), sequence=0)
        pair.decode(tokens(120, 1), sequence=1)
        for i in range(3):
            pair.decode([5, 6], sequence=[[0], [1]], positions=[150 + i, 120 + i], outputs=[0, 1])
        assert pair.largest_effect > 20 * ATOL


def test_states_are_used_again(model: GetModel) -> None:
    """With `reuse=1`, dropped tokens leave keys and values in the later layers of both caches."""
    m = model("gemma3", "agq4")
    hidden, fate = run(m, "1:0.5", flash=True)
    again, same = run(m, "1:0.5;reuse=1", flash=True)
    whole, _ = run(m, "off", flash=True)
    assert fate == same
    assert np.abs(again - whole).max() < np.abs(hidden - whole).max() and not np.allclose(again, whole, atol=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_states_for_a_draft_model_stay_in_their_places(model: GetModel, full: bool) -> None:
    """llama.cpp hands out gpt-oss's last states of all tokens; those of dropped tokens are zeros."""
    names = ("_Z26llama_set_embeddings_nextnP13llama_contextbb", "_Z26llama_get_embeddings_nextnP13llama_context")
    if not all(hasattr(api._lib, name) for name in names):
        pytest.skip("this release hands out no states")
    switch_on, get_states = (getattr(api._lib, name) for name in names)
    get_states.restype = ctypes.POINTER(ctypes.c_float)
    found = []
    for spec in ("1:0.3,2:0.3", "mask,1:0.3,2:0.3"):
        with model("gpt-oss", "agq4").context(spec, swa_full=full) as context:
            switch_on(ctypes.c_void_p(context.context), ctypes.c_bool(True), ctypes.c_bool(False))
            context.decode(tokens(150))
            states = np.ctypeslib.as_array(get_states(ctypes.c_void_p(context.context)), (150, parts.E))
            found.append((states.copy(), np.array(agq_gguf.last_pruned())))
    (pruned, fate), (masked, same) = found
    np.testing.assert_array_equal(fate, same)
    gone = fate >= 0
    assert gone.sum() == 77
    np.testing.assert_array_equal(pruned[~gone], masked[~gone])
    assert not pruned[gone].any() and masked[gone].any()


# scores


def test_the_first_token_must_be_in_the_window(model: GetModel) -> None:
    """gemma3's layers 0 and 2 have a window, 1 and 3 have none."""
    m = model("gemma3")
    assert sum(layer >= 0 for layer in run(m, "1:0.5;score=first")[1]) == 100
    assert warnings() == []

    def prompt(context: LowContext) -> np.ndarray:
        api.llama_memory_clear(context.memory, True)
        return context.decode(tokens(120))

    unpruned_with_one_warning(m, "the sliding window of layer 2 hides the first token", prompt, "2:0.5;score=first")
    low_level.log.clear()
    with Pair(m, "2:0.5;score=first;min=16") as pair:  # as long as all is in the window
        pair.decode(tokens(40))
        assert pair.dropped() == 20
    assert warnings() == []


def test_soft_caps_count(tmp_path: Path) -> None:
    """Without flash attention the cap is three nodes of the graph; the score knows it all the same."""
    fates = []
    for cap in (50.0, 1.0):
        with LowModel(architectures.write_gemma2(tmp_path / f"{cap}.gguf", layers=2, cap=cap)) as m:
            fates += [run(m, "0:0.5", flash=flash)[1] for flash in (False, True)]
    assert fates[0] == fates[1] and fates[2] == fates[3]
    assert fates[0] != fates[2]
    assert warnings() == []


@pytest.mark.parametrize("heads", ["1.0+1.2", "0.1+1.0", "0.0+0.3"])
def test_heads_of_both_kinds(model: GetModel, heads: str) -> None:
    m = model("gemma3", "agq4")
    for full in (False, True):
        options = {"flash": True, "swa_full": full, "n_ubatch": 512}
        spec = f"1:0.5;score=heads;heads=1:{heads};reach=2"
        pruned, fate = run(m, spec, **options)
        masked, masked_fate = run(m, "mask," + spec, **options)
        assert fate == masked_fate and sum(layer >= 0 for layer in fate) == 100
        np.testing.assert_array_equal(pruned[0], masked[0])
    if heads == "0.0+0.3":  # these see nothing of what is further away than the window
        assert fate[1:100] == [1] * 99


def test_a_low_layer_cannot_wait_for_its_question(model: GetModel) -> None:
    """More of this is in test_prune_window_ubatches.py."""
    m = model("gemma3")
    spec = "1:0.5;score=heads;heads=1:1.0"
    with m.context(spec, n_ubatch=100) as context:
        context.decode(tokens(200))
    fate = agq_gguf.last_pruned()
    assert fate[:100] == [-1] * 100 and sum(layer >= 0 for layer in fate) == 50
    assert len(warnings()) == 1 and "layers with and without a sliding window" in warnings()[0]


# the independent forward

RULES: dict[str, tuple[str, dict[int, Rule]]] = {
    "no rules": ("received", {}),
    "full layer": ("received", {1: Rule(share=0.5)}),
    "windows": ("received", {0: Rule(share=0.3, reach=1), 2: Rule(share=0.4, reach=1)}),
    "threshold": ("received", {2: Rule(threshold=0.95)}),
    "recent": ("recent", {1: Rule(share=0.5, keep=12)}),
    "first": ("first", {1: Rule(share=0.4)}),
}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", sorted(RULES))
def test_plugin_agrees_with_removal(model: GetModel, name: str, full: bool, flash: bool) -> None:
    """Prompts of several calls that wrap the small cache, generation, and a later turn."""
    m = model("gemma3")
    score, rules = RULES[name]
    reference = PrunedReference(WindowedModel(m.path), rules, score)
    steps = [tokens(150, 1), tokens(130, 2), [7], [8], [9], tokens(140, 3), tokens(20, 4), [5]]
    position = 0
    spec = spec_of(rules, score) if rules else "off"
    with m.context(spec, cache="f32", flash=flash, swa_full=full, n_ubatch=150) as context:
        for step in steps:
            wanted = reference.run(step)
            found = context.decode(step, position)
            if len(step) >= reference.shortest and rules:
                left = np.array(agq_gguf.last_pruned())[position:]
                np.testing.assert_array_equal(left, reference.left_behind)
                assert 5 < (left >= 0).sum() < 0.9 * len(left)
            position += len(step)
            assert relative(found, wanted) < 3e-3


# calibration


def test_a_score_that_a_window_blinds_gets_full_layers(model: GetModel, tmp_path: Path, words_file: Path) -> None:
    source, out = model("gemma3", "agq4").path, tmp_path / "out.gguf"
    choice = agq_gguf.PruneOptions(share=0.2, score="recent", prompts=2, threads=1)
    report = agq_gguf.calibrate_pruning(source, out, calibration=words_file, choice=choice)
    assert report is not None and report.chosen.plan.layers == (1,)
    asked = replace(choice, layers=(0,))
    report = agq_gguf.calibrate_pruning(source, out, calibration=words_file, choice=asked)
    assert report is not None and report.chosen.plan.layers == (0,)
