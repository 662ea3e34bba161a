"""Token pruning in models whose upper layers read the K/V cache of lower ones (Gemma 3n, Gemma 4).

A token that is dropped is missing in all caches of later layers. Behind the layer where it was dropped, layers that
read an earlier cache still see it. So dropping behind the last layer with a cache of its own changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import architectures
import gguf
import llama_cpp.llama_cpp as api
import low_level
import numpy as np
import pytest
from low_level import GetModel, LowModel, models_fixture, tokens
from test_prune_situations import ATOL, Pair, forget, shift_twice
from test_prune_slots import SIDE_BY_SIDE, as_alone, steps
from test_prune_ubatches import Both, assert_close, assert_same_choice
from test_prune_windows import assert_restored

import agq_gguf

WINDOW = 48
WRITERS: dict[str, Callable[[Path], Path]] = {
    # Layers 6 to 9 read the cache of layer 4 or, without a window, 5.
    "gemma4": partial(architectures.write_gemma4, layers=10, shared=4, window=WINDOW),
    # Layers 20 to 24 read the cache of layer 18 or, without a window, 19. Each fifth has none.
    "gemma3n": partial(architectures.write_gemma3n, layers=25, window=WINDOW),
}
SPECS = {
    "gemma4": [
        "1:0.5",  # in front of both shared caches
        "4:0.5",  # between them
        "5:0.5",  # behind them
        "7:0.5",  # in a layer without a cache of its own
        "0:0.3,4:0.3,7:0.4",
        "2:0.2,5:0.2,6:0.4;score=recent",
        "3:t0.9",
        "4:0.5;score=random",
    ],
    "gemma3n": ["4:0.5", "9:0.3,18:0.3,22:0.4"],
}
CASES = [(arch, spec) for arch in WRITERS for spec in SPECS[arch]]
CUTS = {
    "one": "3:0.5;score=heads;heads=3:1.0+3.1;reach=3",
    "two": "2:0.3,3:0.5;score=heads;heads=2:1.1+1.2;heads=3:3.1+1.0;reach=3;keep=40;overlap=3",
    "behind the shared caches": "3:0.3,7:0.5;score=heads;heads=3:1.1+3.2;heads=7:1.0+6.1+7.2;reach=3",
    "between them": "3:0.3,4:0.5;score=heads;heads=3:1.1+3.2;heads=4:1.0+3.1;reach=3",
    "threshold": "3:t0.9;score=heads;heads=3:1.1+3.2;reach=5",
}
ALL = "3:t0,7:t0;score=heads;heads=3:1.0+1.2;heads=7:3.1"  # tokens wait, but no question drops any

model = models_fixture(lambda arch, path: WRITERS[arch](path), "f32")


def warnings() -> list[str]:
    return [line for line in low_level.log if "pruning" in line]


def run(model: LowModel, prune: str, n: int = 200, decode: int = 3, **options: object) -> tuple[np.ndarray, list[int]]:
    """Logits of the last prompt token and of tokens behind it, and the fate of the prompt's tokens."""
    with model.context(prune, **options) as context:
        logits = [context.decode(tokens(n))]
        fate = agq_gguf.last_pruned()
        logits += [context.decode([11 + i], n + i) for i in range(decode)]
    return np.concatenate(logits), fate


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("arch", "spec"), CASES)
def test_pruned_equals_masked(model: GetModel, arch: str, spec: str, flash: bool) -> None:
    m = model(arch, "agq4")
    for full in (True, False):
        options = {"flash": flash, "n_ubatch": 100, "swa_full": full}
        pruned, fate = run(m, spec, **options)
        masked, masked_fate = run(m, "mask," + spec, **options)
        assert fate == masked_fate and len(fate) == 200
        assert 5 <= sum(layer >= 0 for layer in fate) <= 150
        np.testing.assert_array_equal(pruned[0], masked[0])
        np.testing.assert_allclose(pruned, masked, atol=1e-4)  # of a few rows, attention adds chunks of the cells
    assert warnings() == []


@pytest.mark.parametrize("spec", ["4:0.5", CUTS["one"]])
def test_rotated_queries(tmp_path: Path, spec: str) -> None:
    """The host rotates the queries of heads of 64 channels if the cache is quantized."""
    path = architectures.write_gemma4(tmp_path / "m.gguf", layers=10, shared=4, window=WINDOW, head=64)
    with LowModel(path) as m:
        pruned, fate = run(m, spec, cache="q8_0", flash=True)
        masked, _ = run(m, f"mask,{spec}", cache="q8_0", flash=True)
        assert warnings() == []
        assert sum(layer >= 0 for layer in fate) > 50
        assert_close(pruned, masked)


@pytest.mark.parametrize(("arch", "last"), [("gemma4", 5), ("gemma3n", 19)])
def test_behind_the_last_cache_nothing_is_lost(model: GetModel, arch: str, last: int) -> None:
    """All keys and values are there, so almost all tokens may leave. One layer earlier that is not so."""
    m = model(arch)
    whole, _ = run(m, "off", n_ubatch=100)
    for layer in (last, last + 2):
        pruned, fate = run(m, f"{layer}:0.99", n_ubatch=100)
        assert sum(dropped == layer for dropped in fate) == 197  # but for the first and the last one
        np.testing.assert_allclose(pruned, whole, atol=ATOL)
    pruned, _ = run(m, f"{last - 1}:0.99", n_ubatch=100)
    assert np.abs(pruned - whole).max() > 50 * ATOL
    assert warnings() == []


def test_a_cache_shows_who_had_left_before_it(tmp_path: Path) -> None:
    """Tokens that are dropped after layer 4 are still in its cache, which layers with a window read.

    The values of layer 5 are zeros here, so it does not matter who is in the other cache.
    """
    path = WRITERS["gemma4"](tmp_path / "m.gguf")
    reader = gguf.GGUFReader(path, "r+")
    values = next(t for t in reader.tensors if t.name == "blk.5.attn_v.weight")
    values.data[:] = 0
    reader.data.flush()
    with LowModel(path) as m:
        whole, _ = run(m, "off")
        for layer, changes in ((3, True), (4, False)):
            pruned, fate = run(m, f"{layer}:0.9;score=random")
            assert sum(dropped == layer for dropped in fate) == 180
            assert (np.abs(pruned - whole).max() > 50 * ATOL) == changes
            if not changes:
                np.testing.assert_allclose(pruned, whole, atol=1e-4)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("arch", sorted(WRITERS))
def test_generation_beyond_the_window(model: GetModel, arch: str, full: bool, flash: bool) -> None:
    """Prompts of several ubatches wrap the small cache; then the window leaves the prompt behind."""
    spec = {"gemma4": "1:0.3,4:0.4,6:0.3", "gemma3n": "9:0.3,18:0.4,20:0.3"}[arch]
    options = {"n_ctx": 768, "n_ubatch": 96, "flash": flash, "swa_full": full}
    seed = {"gemma4": 0, "gemma3n": 1}[arch]  # with 0, two tokens of gemma3n are equally important, up to noise
    with Pair(model(arch), spec + ";min=16", **options) as pair:
        pair.decode(tokens(400, seed))
        assert 200 < pair.dropped() < 320
        n_steps = WINDOW + 10 if arch == "gemma4" else 3
        for i in range(n_steps):
            pair.decode([5 + i], 400 + i)
        position = 400 + n_steps
        pair.decode(tokens(150, 3), position)  # a later turn, which overwrites cells of dropped tokens
        assert 60 < pair.dropped(position) < 120
        pair.decode([9], position + 150)
        assert pair.largest_effect > 20 * ATOL
    assert warnings() == []


@pytest.mark.parametrize("cache", ["f32", "f16"])  # the host cannot shift a quantized cache of this model
def test_context_shift(model: GetModel, cache: str) -> None:
    with Pair(model("gemma4"), "1:0.3,4:0.4;min=16", cache=cache) as pair:
        shift_twice(pair)
        assert pair.largest_effect > 20 * ATOL


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_save_and_restore(model: GetModel, whole: bool, full: bool) -> None:
    assert_restored(model("gemma4"), "1:0.5,4:0.3;min=16", None if whole else 0, full)


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_are_copied_removed_and_go_on_together(model: GetModel, unified: bool) -> None:
    options = {"n_ctx": 1024, "n_seq": 3, "unified": unified}
    with Pair(model("gemma4"), "1:0.3,4:0.4;min=16", **options) as pair:
        pair.decode(tokens(150))
        pair.each(lambda c: api.llama_memory_seq_cp(c.memory, 0, 1, -1, -1))
        pair.decode([7], 150, sequence=1)
        pair.each(forget(-1, -1, 0))
        pair.decode(tokens(100, 6), 151, sequence=1)
        pair.decode(tokens(120, 7), sequence=2)
        for i in range(3):
            pair.decode([5, 6], sequence=[[1], [2]], positions=[251 + i, 120 + i], outputs=[0, 1])
        assert pair.largest_effect > 20 * ATOL
    assert warnings() == []


@pytest.mark.parametrize("spec", ["1:0.5", "1:0.3,4:0.4,7:0.4;score=recent", CUTS["behind the shared caches"]])
def test_prompts_side_by_side(model: GetModel, spec: str) -> None:
    pieces = SIDE_BY_SIDE[0][:2]
    then = steps({p.sequence: len(p.ids) for p in pieces})
    # Not to the bit: one product with F32 weights is the host's, which depends on how many tokens there are.
    as_alone(model("gemma4"), spec, [pieces, *([step[:2] for step in then])], atol=0.02)


def test_states_are_used_again(model: GetModel) -> None:
    """With `reuse=1`, dropped tokens leave keys and values in the later layers that store any."""
    m = model("gemma4", "agq4")
    hidden, fate = run(m, "3:0.5", flash=True)
    again, same = run(m, "3:0.5;reuse=1", flash=True)
    whole, _ = run(m, "off", flash=True)
    assert warnings() == []
    assert fate == same
    assert 0.05 < np.abs(again - whole).mean() < np.abs(hidden - whole).mean()


# prompts in several ubatches, with the score `heads`


# With flash attention, noise can lead to another choice between tokens that are about as important.
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("cut", "flash"), [*((cut, False) for cut in CUTS), ("behind the shared caches", True)])
def test_same_choice_as_in_one_call(model: GetModel, cut: str, full: bool, flash: bool) -> None:
    ubatches = (512, 128, 100, 59)  # 59 leaves 8 tokens for the last one
    seed = 1 if cut == "two" else 0  # with 0, two tokens are equally important there, up to noise
    assert_same_choice(
        model("gemma4"), CUTS[cut], tokens(480, seed), ubatches, range(101, 450), 20 * ATOL,
        flash=flash, n_ctx=768, swa_full=full,
    )  # fmt: skip
    assert warnings() == []


def test_same_choice_in_gemma3n(model: GetModel) -> None:
    cut = "9:0.3,14:0.5;score=heads;heads=9:4.1+9.2;heads=14:9.0+12.1;reach=3"
    found = []
    for ubatch in (512, 100):
        with model("gemma3n").context(cut, n_ctx=768, n_ubatch=ubatch, swa_full=False) as context:
            logits = [context.decode(tokens(300)), context.decode([7], 300)]
            found.append((np.array(logits), agq_gguf.last_pruned()))
    assert found[0][1] == found[1][1] and 150 < sum(layer >= 0 for layer in found[0][1]) < 250
    assert_close(found[1][0], found[0][0], 0.5)  # F16 weights: without pruning, these two differ by 0.25
    with model("gemma3n").context("off", n_ctx=768) as context:
        assert np.abs(context.decode(tokens(300)) - found[0][0][0]).max() > 3
    assert warnings() == []


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("end", [1, 2, 100])
def test_what_comes_after_sees_everything(model: GetModel, end: int, full: bool) -> None:
    with Both(model("gemma4"), ALL, n_ubatch=80, swa_full=full, n_ctx=1024) as both:
        both.run(tokens(400))
        both.run(tokens(160, 1), 400)
        both.decode(tokens(end, 2), 560)
        for i in range(3):
            both.decode([9 + i], 560 + end + i)
        both.run(tokens(100, 4), 563 + end)
        both.decode(tokens(40, 5), 663 + end)
    assert warnings() == []


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ("1:0.5;score=heads;heads=1:1.0", "with a K/V cache of their own"),
        ("5:0.5;score=heads;heads=5:1.0", "reads the K/V cache of one in front"),
        ("3:0.3,5:0.3,7:0.5;score=heads;heads=3:1.0;heads=5:1.0;heads=7:1.0", "reads the K/V cache of one in front"),
    ],
)
def test_cuts_that_cannot_wait(model: GetModel, cut: str, reason: str) -> None:
    with model("gemma4").context(cut, n_ubatch=100) as context:
        context.decode(tokens(200))
    fate = agq_gguf.last_pruned()
    assert fate[:100] == [-1] * 100 and sum(layer >= 0 for layer in fate) >= 50
    assert len(warnings()) == 1 and reason in warnings()[0]


# calibration


@pytest.mark.parametrize("arch", sorted(WRITERS))
def test_calibration_by_a_share(model: GetModel, arch: str, tmp_path: Path, words_file: Path) -> None:
    source, out = model(arch, "agq4").path, tmp_path / "out.gguf"
    choice = agq_gguf.PruneOptions(share=0.2, score="recent", prompts=2, threads=1)
    report = agq_gguf.calibrate_pruning(source, out, calibration=words_file, choice=choice)
    assert report is not None and report.chosen.plan.layers
    with LowModel(out) as m, m.context("file") as context:
        context.decode(tokens(256))
        assert sum(layer >= 0 for layer in agq_gguf.last_pruned()) > 20
    assert warnings() == []
