"""Prompts in several ubatches with sliding windows: early ones wait for the question, as without windows.

With `swa_full` off, the cells of windows are used again while tokens wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import llama_cpp.llama_cpp as api
import low_level
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from low_level import GetModel, LowModel, models_fixture, tokens
from test_prune_slots import WORK, Users, do_work
from test_prune_ubatches import ATOL, FLASH_ATOL, Both, assert_close, assert_same_choice, forget

import agq_gguf

WINDOW = 48
WRITERS: dict[str, Callable[[Path], Path]] = {
    "gemma2": partial(architectures.write_gemma2, layers=6, window=WINDOW),
    "gemma3": partial(architectures.write_gemma3, layers=8, window=WINDOW),
    "gpt-oss": partial(architectures.write_gpt_oss, yarn=True, layers=6, window=WINDOW),
    "cohere2": partial(architectures.write_cohere2, layers=8, window=WINDOW),
}
# Every second layer has no window: 1, 3, 5 ...
CUTS = {
    "full layer": "3:0.5;score=heads;heads=3:1.0+3.1;reach=3",
    "layer with a window": "2:0.5;score=heads;heads=2:1.0+1.2;reach=3",
    "two cuts": "2:0.4,4:0.5;score=heads;heads=2:1.1+1.2;heads=4:3.1+3.2;reach=3;keep=40;overlap=3",
    "neighbours": "2:0.3,3:0.5;score=heads;heads=2:1.1+1.2;heads=3:3.1;reach=3",
    "no full layer between": "3:0.3,4:0.5;score=heads;heads=3:1.0+3.1;heads=4:1.1+1.2;reach=3",
    "threshold": "3:t0.9;score=heads;heads=3:1.1+3.2;reach=5",
}
ALL = "2:t0,4:t0;score=heads;heads=2:1.0+1.2;heads=4:3.1"  # tokens wait, but no question drops any


model = models_fixture(lambda arch, path: WRITERS[arch](path), "f32")


def warnings() -> list[str]:
    return [line for line in low_level.log if "pruning" in line]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_same_choice_as_in_one_call(model: GetModel, cut: str, full: bool, flash: bool) -> None:
    ubatches = (512, 256, 128, 100, 64, 40, 59)  # 59 leaves 8 tokens for the last one
    assert_same_choice(
        model("gemma3"), CUTS[cut], tokens(480), ubatches, range(101, 450), 50 * ATOL,
        flash=flash, n_ctx=768, swa_full=full,
    )  # fmt: skip
    assert warnings() == []


@pytest.mark.slow
def test_chunks(tmp_path: Path) -> None:
    """Llama 4 attends in chunks of 8192 tokens; some that wait are in the chunk before the question's."""
    with LowModel(architectures.write_llama4(tmp_path / "llama4.gguf", layers=8)) as low:
        assert_same_choice(
            low, "4:0.4,5:0.4;score=heads;heads=4:0.0;heads=5:1.0", tokens(8700), (9216, 2048, 700),
            range(5000, 6000), 0.02, flash=True, n_ctx=9216, n_batch=9216, swa_full=False,
        )  # fmt: skip
    assert warnings() == []


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("arch", "cut"),
    [
        ("gemma2", CUTS["two cuts"]),
        ("gpt-oss", CUTS["two cuts"]),
        # Each fourth layer has no window.
        ("cohere2", "3:0.4,5:0.5;score=heads;heads=3:1.1+1.2;heads=5:3.1+5.2;reach=3;keep=40"),
    ],
)
def test_other_models(model: GetModel, arch: str, cut: str, full: bool) -> None:
    found = []
    for ubatch in (512, 100):
        options = {"n_ctx": 768, "n_ubatch": ubatch, "swa_full": full}
        with model(arch).context(cut, **options) as context:
            logits = [context.decode(tokens(400))]
            fate = agq_gguf.last_pruned()
            logits += [context.decode([7 + i], 400 + i) for i in range(2)]
            found.append((np.array(logits), fate))
    assert found[0][1] == found[1][1] and 150 < sum(layer >= 0 for layer in fate) < 350
    assert_close(found[1][0], found[0][0])
    assert warnings() == []


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("end", [1, 2, 40, 100])
def test_what_comes_after_sees_everything(model: GetModel, end: int, full: bool, flash: bool) -> None:
    """Small caches are used again twice while the prompt waits."""
    atol = FLASH_ATOL if flash else ATOL
    with Both(model("gemma3"), ALL, atol=atol, n_ubatch=80, flash=flash, swa_full=full, n_ctx=1024) as both:
        both.run(tokens(400))
        both.run(tokens(160, 1), 400)
        both.decode(tokens(end, 2), 560)
        for i in range(3):
            both.decode([9 + i], 560 + end + i)
    assert warnings() == []


@pytest.mark.parametrize("full", [False, True])
def test_later_turns(model: GetModel, full: bool) -> None:
    """The windows of tokens that wait reach into what was computed before."""
    with Both(model("gemma3"), ALL, n_ubatch=80, swa_full=full, n_ctx=1024) as both:
        position = 0
        for turn, (n, asked) in enumerate([(20, 10), (300, 30), (230, 1), (90, 60)]):
            both.run(tokens(n, turn), position)
            both.decode(tokens(asked, turn + 9), position + n)
            position += n + asked
            for i in range(3):
                both.decode([9 + i], position + i)
            position += 3
    assert warnings() == []


@pytest.mark.parametrize("full", [False, True])
def test_later_turns_choose_as_in_one_call(model: GetModel, full: bool) -> None:
    m, found = model("gemma3"), []
    for ubatch in (512, 100):
        options = {"n_ctx": 1536, "n_ubatch": ubatch, "swa_full": full}
        with m.context(CUTS["two cuts"], **options) as context:
            logits, fates, position = [], [], 0
            for turn in range(3):
                logits.append(context.decode(tokens(400, turn), position))
                fates.append(agq_gguf.last_pruned())
                logits += [context.decode([7 + i], position + 400 + i) for i in range(3)]
                position += 403
            found.append((np.array(logits), fates))
    assert found[0][1] == found[1][1]
    assert_close(found[1][0], found[0][0])
    assert warnings() == []


@pytest.mark.parametrize("full", [False, True])
def test_the_beginning_does_not_show_which_kind_has_a_window(model: GetModel, full: bool) -> None:
    """All that is there fits into the window, until a single token comes."""
    with Both(model("gemma3"), ALL, swa_full=full) as both:
        both.run(tokens(30))
        both.run(tokens(WINDOW - 30, 1), 30)
        for i in range(4):
            both.decode([9 + i], WINDOW + i)
        both.run(tokens(100, 2), WINDOW + 4)
        both.decode(tokens(70, 3), WINDOW + 104)
    assert warnings() == []


def bring_back(model: LowModel, **options: object) -> tuple[list[int], list[int], np.ndarray]:
    """The fate of a prompt's tokens after each of two questions, and the logits after the second one."""
    spec = "3:t0.9;score=heads;heads=3:1.1+3.2;reach=2"
    with model.context(spec, **options) as context, model.context("off", **options) as off:
        context.decode(tokens(400))
        first = agq_gguf.last_pruned()
        context.decode([7], 400)
        context.decode(tokens(30, 1), 401)
        second = agq_gguf.last_pruned()
        state = context.save(0)
        found = context.decode([9], 431)
        off.restore(state, 0)
        assert_close(off.decode([9], 431), found)  # those that are back are in the cache
    assert sum(layer >= 0 for layer in second) > 10
    return first, second[:400], found


def test_a_second_question_brings_tokens_back(model: GetModel) -> None:
    results = [bring_back(model("gemma3"), swa_full=True, n_ubatch=n) for n in (512, 100)]
    for first, second, found in results:
        assert sum(a >= 0 > b for a, b in zip(first, second, strict=True)) > 50
        assert (first, second) == results[0][:2]
        assert_close(found, results[0][2])
    # If cells of windows are used again, most do not come back, because what they see is gone.
    first, second, _ = bring_back(model("gemma3"), swa_full=False, n_ubatch=100)
    assert first == results[0][0]
    back = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a >= 0 > b]
    assert len(back) > 5 and min(back) > 150
    assert warnings() == []


@pytest.mark.parametrize("question", [1, 70])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("after", [5, 100, 250, 400])
def test_abort(model: GetModel, after: int, full: bool, question: int) -> None:
    """A program stops a computation while the early tokens run, and asks again."""
    calls = -1

    @api.ggml_abort_callback  # type: ignore[untyped-decorator]
    def stops(_: object) -> bool:
        nonlocal calls
        calls += 1
        return 0 <= after <= calls

    m, prompt, asked = model("gemma3"), tokens(300), tokens(question, 1)
    options = {"n_ubatch": 100, "swa_full": full}
    with m.context(CUTS["two cuts"], **options) as context:
        context.run(prompt)
        wanted = context.decode(asked, 300)
    with m.context(CUTS["two cuts"], **options) as context:
        context.run(prompt)
        api.llama_set_abort_callback(context.context, stops, None)
        with pytest.raises(AssertionError, match=r"^2"):
            context.decode(asked, 300)
        after = -1
        assert_close(context.decode(asked, 300), wanted)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_state_is_saved_and_restored(model: GetModel, full: bool, whole: bool) -> None:
    """While tokens wait, and after a question. Cells may be other ones then."""
    sequence = None if whole else 0
    prompt, questions = tokens(330), [tokens(80, 1), tokens(80, 2)]
    options = {"n_ubatch": 100, "swa_full": full, "n_seq": 2, "n_ctx": 1024}
    wanted = []
    for asked in questions:
        with model("gemma3").context(CUTS["full layer"], **options) as context:
            context.run(prompt)
            wanted.append((context.decode(asked, 330), agq_gguf.last_pruned()))
    assert wanted[0][1] != wanted[1][1]
    with model("gemma3").context(CUTS["full layer"], **options) as context:
        context.run(prompt)
        state = context.save(sequence)
        for asked, (logits, fate) in zip(questions, wanted, strict=True):
            api.llama_memory_clear(context.memory, True)
            context.run(tokens(30, 7), sequence=0 if whole else 1)
            context.restore(state, sequence)
            assert_close(context.decode(asked, 330), logits)
            assert agq_gguf.last_pruned() == fate
    assert warnings() == []


@pytest.mark.parametrize("full", [False, True])
def test_another_question_after_the_same_prompt(model: GetModel, full: bool) -> None:
    """What is removed moves the windows back to tokens that the first question did not see."""
    with Both(model("gemma3"), ALL, n_ubatch=100, swa_full=full, n_ctx=768) as both:
        both.run(tokens(300))
        both.decode(tokens(100, 1), 300)
        both.each(forget(300, -1))
        both.decode(tokens(70, 2), 300)
        both.decode([9], 370)
        if full:
            both.each(forget(200, -1))
            both.decode(tokens(70, 3), 200)
            both.decode([9], 270)
    assert warnings() == []


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_several_sequences(model: GetModel, full: bool, unified: bool) -> None:
    """Two prompts wait, and both get an answer in a common ubatch."""
    options = {"n_seq": 2, "n_ctx": 2048, "n_ubatch": 90, "swa_full": full, "unified": unified}
    with Both(model("gemma3"), ALL, **options) as both:
        both.run(tokens(200), sequence=0)
        both.run(tokens(180, 1), sequence=1)
        both.run(tokens(150, 2), 200, sequence=0)
        n = 20
        both.decode(
            tokens(2 * n, 3),
            sequence=[[i // n] for i in range(2 * n)],
            positions=[*range(350, 350 + n), *range(180, 180 + n)],
            outputs=[n - 1, 2 * n - 1],
        )
        both.run(tokens(100, 4), 370, sequence=0)
        both.run(tokens(100, 5), 200, sequence=1)
        both.decode([5, 6], sequence=[[0], [1]], positions=[470, 300], outputs=[0, 1])
    assert warnings() == []


@pytest.mark.parametrize("question", [1, 70])
@pytest.mark.parametrize("before", [0, 100])
def test_positions_are_shifted(model: GetModel, before: int, question: int) -> None:
    """Keys turn in both caches while tokens wait, and so does what was kept for windows."""
    with Both(model("gemma3"), ALL, n_ctx=1024, n_ubatch=90) as both:
        if before:
            both.decode(tokens(before, 5))
        both.run(tokens(200), before)
        both.each(lambda c: api.llama_memory_seq_add(c.memory, 0, 0, -1, 7))
        both.run(tokens(80, 1), before + 207)
        end = before + 287
        if not before:  # the cells of what was kept are in use again
            both.each(lambda c: api.llama_memory_seq_add(c.memory, 0, 0, -1, -3))
            end -= 3
        both.decode(tokens(question, 2), end)
        both.decode([9], end + question)
    assert warnings() == []


def test_what_was_kept_cannot_be_turned(model: GetModel) -> None:
    """The host uses the cells of windows again after the first shift. The second one finds nothing to turn there."""
    options = {"n_ctx": 1024, "n_ubatch": 90}
    with model("gemma3").context(ALL, **options) as context:
        context.decode(tokens(100, 5))
        context.run(tokens(200), 100)
        for begin, shift in ((300, 7), (387, -3)):
            api.llama_memory_seq_add(context.memory, 0, 0, -1, shift)
            context.run(tokens(80, 1), begin + shift)
        assert np.isfinite(context.decode(tokens(70, 2), 464)).all()
    assert len(warnings()) == 1 and "the beginning of a prompt is not seen" in warnings()[0]


@pytest.mark.parametrize("full", [False, True])
def test_a_part_is_removed(model: GetModel, full: bool) -> None:
    with Both(model("gemma3"), ALL, n_ubatch=90, n_ctx=768, swa_full=full) as both:
        both.run(tokens(100))
        both.run(tokens(80, 1), 100)
        both.each(forget(160 if full else 175, -1))
        both.run(tokens(170, 2), 160 if full else 175)
        both.decode(tokens(80, 3), 330 if full else 345)
        # The cells are used again.
        both.each(forget(0, -1))
        both.run(tokens(200, 4))
        both.decode(tokens(70, 5), 200)
    assert warnings() == []


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(work=WORK, order=st.permutations([0, 1, 2]), unified=st.booleans(), full=st.booleans())
def test_random_work(model: GetModel, work: list[tuple[str, Any]], order: list[int], unified: bool, full: bool) -> None:
    """Three sequences, whose cells of windows are soon used again if caches are small."""
    with Users(model("gemma3"), unified, spec=ALL + ";min=20", full=full) as users:
        do_work(users, work, order)
