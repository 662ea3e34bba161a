"""Prompts in several ubatches with the score `heads`: early ones wait for the question, whatever the program does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import low_level
import numpy as np
import pytest
import tiny_models
from low_level import LowContext, LowModel, tokens

import agq_gguf
from agq_gguf.format import pruning_record
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.pruning.file import write_plan
from agq_gguf.runtime.model import Batch, Model

ATOL = 4e-3  # of logits of size 4 or so, without flash attention
FLASH_ATOL = 0.02  # the host's own flash attention differs by 0.01 between 64 and 512 tokens in a ubatch
CUTS = {
    "share": "1:0.5;score=heads;heads=1:0.1+1.2;reach=3",
    "two cuts": "1:0.4,3:0.5;score=heads;heads=1:0.1+1.2;heads=3:1.1+3.2;reach=3;keep=40;overlap=3",
    "threshold": "2:t0.9;score=heads;heads=2:1.1+2.2;reach=5",
}
ALL = "1:t0,3:t0;score=heads;heads=1:0.1+1.2;heads=3:1.1"  # tokens wait, but no question drops any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LowModel]:
    with low_level.float_llama(tmp_path_factory.mktemp("ubatches"), n_layer=6) as low:
        yield low


@pytest.fixture(scope="module")
def agq4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LowModel]:
    low = LowModel(low_level.quick_agq4(tmp_path_factory.mktemp("agq4"), 6))
    yield low
    low.close()


def assert_close(found: np.ndarray, wanted: np.ndarray, atol: float = ATOL) -> None:
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=0)


def assert_same_choice(
    model: LowModel, cut: str, prompt: list[int], ubatches: Sequence[int], dropped: range, least: float, **options: Any
) -> None:
    """The same tokens leave, and the same logits come, in ubatches of all these sizes; the first one is one call.

    So many tokens leave in one call, and the logits of the prompt then differ from the unpruned ones by `least` or
    more.
    """
    atol = FLASH_ATOL if options["flash"] else ATOL
    n = len(prompt)
    with model.context("off", **options) as context:
        unpruned = context.decode(prompt)
    wanted, fate = np.empty(0), list[int]()
    for ubatch in ubatches:
        with model.context(cut, n_ubatch=ubatch, **options) as context:
            logits = [context.decode(prompt)]
            now = agq_gguf.last_pruned()
            logits += [context.decode([7 + i], n + i) for i in range(3)]
        if ubatch == ubatches[0]:
            wanted, fate = np.array(logits), now
            assert len(fate) == n and sum(layer >= 0 for layer in fate) in dropped
            assert np.abs(unpruned - wanted[0]).max() > least
        assert now == fate
        assert_close(np.array(logits), wanted, atol)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_same_choice_as_in_one_call(model: LowModel, cut: str, flash: bool) -> None:
    ubatches = (512, 150, 128, 100, 64, 59, 48)  # 59 and 48 leave 5 and 12 tokens for the last one
    assert_same_choice(model, CUTS[cut], tokens(300), ubatches, range(101, 250), 100 * ATOL, flash=flash)
    assert low_level.log == []


@pytest.mark.parametrize(
    ("name", "flash"),
    # Not mixtral with flash attention, where noise can lead a token to another expert.
    [(name, flash) for name in ("llama", "qwen2", "gpt2", "falcon") for flash in (False, True)] + [("mixtral", False)],
)
def test_architectures(name: str, flash: bool, tmp_path: Path) -> None:
    experts = {"n_expert": 4, "n_expert_used": 2} if name == "mixtral" else {}
    write = tiny_models.WRITERS["llama" if experts else name]
    low = LowModel(write(tmp_path / "m.gguf", dtype="f32", n_layer=4, **experts))
    prompt, results = tokens(200), []
    for ubatch in (256, 70):
        with low.context("1:0.5;score=heads;heads=1:0.0+1.1", n_ctx=256, n_ubatch=ubatch, flash=flash) as context:
            logits = [context.decode(prompt)]
            fate = agq_gguf.last_pruned()
            logits += [context.decode([7 + i], 200 + i) for i in range(2)]
            results.append((np.array(logits), fate))
    low.close()
    assert low_level.log == []
    assert sum(layer >= 0 for layer in results[0][1]) == 100
    assert results[1][1] == results[0][1]
    assert_close(results[1][0], results[0][0], FLASH_ATOL if flash else ATOL)


@pytest.mark.parametrize(("flash", "cache"), [(False, "f16"), (True, "f16"), (True, "q8_0")])
@pytest.mark.parametrize("cut", ["off", *CUTS])
def test_same_bits_as_in_one_call(cut: str, flash: bool, cache: str, agq4: LowModel) -> None:
    """With AGQ4 matrices, states do not depend on how a prompt is cut into ubatches.

    Unpruned, that holds if none has fewer than 16 tokens, which attend to keys without packing them.
    """
    prompt, results = tokens(300), []
    for ubatch in (512, 150, 128, 100, 64, 88, 40, *([] if cut == "off" else [59, 33])):
        with agq4.context(CUTS.get(cut, cut), n_ubatch=ubatch, threads=2, flash=flash, cache=cache) as context:
            results.append([context.decode(prompt), context.decode([7], 300)])
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0])


def test_settings_of_the_file(tmp_path: Path) -> None:
    """AGQ4 weights and pruning records, several threads, quantized keys."""
    plain, path = low_level.quick_agq4(tmp_path, 4), tmp_path / "record.gguf"
    heads = pruning_record.Heads(((0, 1), (1, 2)))
    record = pruning_record.Pruning("heads", 0.9, keep=20, reach=3, heads=heads)
    with open_gguf(plain) as reader:
        write_plan(reader, path, {"blk.1.ffn_up.weight": record}, {}, lambda *_: None)
    low, prompt, results = LowModel(path), tokens(250), []
    for ubatch in (512, 90):
        with low.context("file", n_ubatch=ubatch, threads=2, flash=True, cache="q8_0") as context:
            logits = [context.decode(prompt), context.decode([7], 250)]
            results.append((np.array(logits), agq_gguf.last_pruned()))
    low.close()
    assert not any("pruning" in line for line in low_level.log)
    assert results[1][1] == results[0][1] and 20 < sum(layer >= 0 for layer in results[0][1]) < 230
    assert np.linalg.norm(results[1][0] - results[0][0]) < 0.03 * np.linalg.norm(results[0][0])


class Both:
    """A context whose tokens wait but are all kept, and one without pruning; logits must agree."""

    def __init__(self, model: LowModel, spec: str = ALL, atol: float = ATOL, **options: object):
        self.atol = atol
        self.contexts = [model.context(s, **options) for s in (spec, "off")]

    def __enter__(self) -> Both:
        return self

    def __exit__(self, *_: object) -> None:
        for context in self.contexts:
            context.__exit__(None, None, None)

    def run(self, *arguments: object, **options: object) -> None:
        for context in self.contexts:
            context.run(*arguments, **options)  # type: ignore[arg-type]

    def each(self, work: Callable[[LowContext], object]) -> None:
        for context in self.contexts:
            work(context)

    def decode(self, *arguments: object, **options: object) -> np.ndarray:
        found, wanted = [context.decode(*arguments, **options) for context in self.contexts]  # type: ignore[arg-type]
        assert_close(found, wanted, self.atol)
        return found


def forget(begin: int, end: int, sequence: int = 0) -> Callable[[LowContext], object]:
    return lambda c: api.llama_memory_seq_rm(c.memory, sequence, begin, end)


@pytest.mark.parametrize("end", [1, 2, 40, 100])
def test_what_comes_after_sees_everything(model: LowModel, end: int) -> None:
    """A single token cannot choose; the others choose all."""
    with Both(model) as both:
        both.run(tokens(100))
        both.run(tokens(80, 1), 100)
        both.decode(tokens(end, 2), 180)
        for i in range(3):
            both.decode([9 + i], 180 + end + i)
    assert low_level.log == []


def test_waiting_tokens_do_not_run_through_later_layers(model: LowModel) -> None:
    """What makes the tests above worth something: a context without the store sees none of them."""
    with model.context(ALL, n_seq=2) as context, model.context("off", n_seq=2) as other:
        context.run(tokens(150))
        state = context.save(0)
        wanted = context.decode([9], 150)
        other.restore(state, 0)
        found = other.decode([9], 150)
    assert np.abs(found - wanted).max() > 100 * ATOL
    assert len(low_level.log) == 1 and "the beginning of a prompt is not seen" in low_level.log[0]


def test_all_logits(model: LowModel) -> None:
    with Both(model, CUTS["two cuts"]) as both:
        both.run(tokens(100))
        both.run(tokens(90, 1), 100)
        both.decode(tokens(30, 2), 190, outputs=range(30))
        both.decode([9], 220)


def test_logits_within_a_piece(model: LowModel) -> None:
    with Both(model, CUTS["two cuts"]) as both:
        both.run(tokens(100))
        both.decode(tokens(90, 1), 100, outputs=[40])
        both.decode([9], 190)
    assert len(low_level.log) == 1 and "logits of a token within it" in low_level.log[0]


@pytest.mark.parametrize("flash", [False, True])
def test_several_sequences_in_one_ubatch(model: LowModel, flash: bool) -> None:
    """Two prompts wait, and both get an answer in a common ubatch."""
    with Both(model, n_seq=3, n_ctx=1024, flash=flash) as both:
        both.run(tokens(100), sequence=0)
        both.run(tokens(120, 1), sequence=1)
        both.run(tokens(80, 2), 100, sequence=0)
        n = 20
        both.decode(
            tokens(2 * n, 3),
            sequence=[[i // n] for i in range(2 * n)],
            positions=[*range(180, 180 + n), *range(120, 120 + n)],
            outputs=[n - 1, 2 * n - 1],
        )
        both.decode([5, 6], sequence=[[0], [1]], positions=[200, 140], outputs=[0, 1])


def test_streams_that_wait_see_all_of_their_own(model: LowModel) -> None:
    """Each sequence has a cache of its own, and the tokens that follow come in a common graph."""
    with Both(model, CUTS["two cuts"], n_seq=2, unified=False) as both:
        both.run(tokens(100), sequence=0)
        both.run(tokens(90, 1), sequence=1)
        for i in range(2):
            both.decode([5, 6], sequence=[[0], [1]], positions=[100 + i, 90 + i], outputs=[0, 1])
    assert low_level.log == []


def test_a_part_is_removed(model: LowModel) -> None:
    with Both(model) as both:
        both.run(tokens(100))
        both.run(tokens(80, 1), 100)
        both.each(forget(110, -1))
        both.run(tokens(70, 2), 110)
        both.decode(tokens(80, 3), 180)
        both.decode([9], 260)
        # The cells are used again.
        both.each(forget(0, -1))
        both.run(tokens(100, 4))
        both.decode(tokens(70, 5), 100)


def test_a_part_in_the_middle_is_removed(model: LowModel) -> None:
    """Waiting tokens behind it have seen it in the first layers only; without pruning they saw it in all."""
    with model.context(ALL) as context, model.context("off") as other, model.context("off") as whole:
        found = []
        for c in (context, other, whole):
            c.run(tokens(100))
            if c is not whole:
                forget(20, 40)(c)
            c.run(tokens(80, 1), 100)
            found.append(np.concatenate([c.decode(tokens(80, 2), 180), c.decode([9], 260)]))
    assert 3 * np.abs(found[0] - found[1]).max() < np.abs(found[0] - found[2]).max()
    assert low_level.log == []


@pytest.mark.parametrize("question", [1, 70])
def test_positions_are_shifted(model: LowModel, question: int) -> None:
    """Keys turn while tokens wait, and the store follows."""
    with Both(model, n_ctx=1024) as both:
        both.run(tokens(200))
        both.each(lambda c: api.llama_memory_seq_add(c.memory, 0, 0, -1, 7))
        both.run(tokens(80, 1), 207)
        both.each(lambda c: api.llama_memory_seq_add(c.memory, 0, 0, -1, -3))
        both.decode(tokens(question, 2), 284)
        both.decode([9], 284 + question)
    assert low_level.log == []


@pytest.mark.parametrize("whole", [False, True])
def test_state_is_saved_and_restored(model: LowModel, whole: bool) -> None:
    """Also when the question has been asked in between: the state says who still waits."""
    sequence = None if whole else 0
    prompt, question, other = tokens(220), tokens(80, 1), tokens(80, 2)
    with model.context(CUTS["share"]) as context:
        context.run(prompt)
        wanted = [context.decode(question, 220)]
        wanted_fate = agq_gguf.last_pruned()
    with model.context(CUTS["share"]) as context:
        context.run(prompt)
        wanted.append(context.decode(other, 220))
        other_fate = agq_gguf.last_pruned()
    assert wanted_fate != other_fate
    with model.context(CUTS["share"], n_seq=2) as context:
        context.run(prompt)
        state = context.save(sequence)
        for asked, logits, fate in ((question, wanted[0], wanted_fate), (other, wanted[1], other_fate)):
            api.llama_memory_clear(context.memory, True)
            context.run(tokens(30, 7))
            context.restore(state, sequence)
            assert_close(context.decode(asked, 220), logits)
            assert agq_gguf.last_pruned() == fate
    assert low_level.log == []


@pytest.mark.parametrize("whole", [False, True])
def test_marks_change_between_two_steps(model: LowModel, whole: bool) -> None:
    """The same cells are hidden before and after, but in one state their tokens are dropped, in another they wait."""
    sequence = None if whole else 0
    with model.context("off") as context:
        context.decode([9])
        context.run(tokens(100), 1)
        wanted = [context.decode([5 + i], 101 + i) for i in range(3)]
    with model.context("1:t1e9;score=heads;heads=1:0.1;keep=80") as context:
        context.decode([9])  # the first token is never dropped
        context.run(tokens(100), 1)
        waiting = context.save(sequence)
        context.decode(tokens(80, 1), 101)
        assert agq_gguf.last_pruned() == [-1] + [1] * 100 + [-1] * 80
        for i in range(3):
            context.decode([5 + i], 181 + i)
        dropped = context.save(sequence)
        for _ in range(2):
            context.restore(dropped, sequence)
            lost = [context.decode([5 + i], 184 + i) for i in range(3)]
            api.llama_memory_seq_rm(context.memory, 0, 101, -1)
            lost.append(context.decode([5], 101))
            assert np.abs(lost[3] - wanted[0]).max() > 20 * ATOL
            api.llama_memory_seq_rm(context.memory, 0, 101, -1)
            context.restore(waiting, sequence)
            for i in range(3):
                assert_close(context.decode([5 + i], 101 + i), wanted[i])
    assert low_level.log == []


def test_state_is_restored_elsewhere(model: LowModel) -> None:
    """Tokens are known by what they are, not by their cells."""
    with Both(model, n_seq=2, n_ctx=1024) as both:
        both.run(tokens(150))
        states = [c.save(0) for c in both.contexts]
        both.run(tokens(90, 1), sequence=1)
        for context, state in zip(both.contexts, states, strict=True):
            api.llama_memory_seq_rm(context.memory, 0, -1, -1)
            context.run(tokens(20, 2), 90, sequence=1)
            context.restore(state, 0)
        both.decode(tokens(70, 3), 150, sequence=0)
        both.decode(tokens(70, 4), 110, sequence=1)
        both.decode([9], 180, sequence=1)


@pytest.mark.parametrize("question", [1, 70])
def test_sequence_is_copied(model: LowModel, question: int) -> None:
    """One prompt waits for the questions of two sequences that share its cells."""
    with Both(model, n_seq=2) as both:
        both.run(tokens(150))
        both.each(lambda c: api.llama_memory_seq_cp(c.memory, 0, 1, -1, -1))
        both.decode(tokens(question, 1), 150, sequence=1)
        both.decode(tokens(question, 2), 150, sequence=0)
        both.each(forget(-1, -1, 0))
        both.decode([9], 150 + question, sequence=1)


@pytest.mark.parametrize("question", [1, 70])
@pytest.mark.parametrize("after", [5, 60, 120, 200])
def test_abort(model: LowModel, question: int, after: int) -> None:
    """A program stops a computation while the early tokens run, and asks again."""
    calls = -1

    @api.ggml_abort_callback  # type: ignore[untyped-decorator]
    def stops(_: object) -> bool:
        nonlocal calls
        calls += 1
        return 0 <= after <= calls

    prompt, asked = tokens(150), tokens(question, 1)
    with model.context(CUTS["two cuts"]) as context:
        context.run(prompt)
        wanted = context.decode(asked, 150)
    with model.context(CUTS["two cuts"]) as context:
        context.run(prompt)
        api.llama_set_abort_callback(context.context, stops, None)
        with pytest.raises(AssertionError, match=r"^2"):
            context.decode(asked, 150)
        after = -1
        assert_close(context.decode(asked, 150), wanted)


def test_two_contexts(model: LowModel) -> None:
    """Each has its own store."""
    with Both(model) as one, Both(model) as two:
        one.run(tokens(100))
        two.run(tokens(100, 1))
        one.run(tokens(70, 2), 100)
        two.decode(tokens(70, 3), 100)
        one.decode(tokens(70, 4), 170)
        two.decode([9], 170)


def test_second_question_brings_tokens_back(model: LowModel) -> None:
    prompt = tokens(200)
    spec = "2:t0.9;score=heads;heads=2:1.1+2.2;reach=2"
    with model.context(spec) as context, model.context("off") as other:
        context.decode(prompt)
        first = agq_gguf.last_pruned()
        context.decode([7], 200)
        context.decode(tokens(30, 1), 201)  # shorter than the shortest prompt that is pruned
        second = agq_gguf.last_pruned()
        state = context.save(0)
        found = context.decode([9], 231)
        # Those that are back are in the cache, and others are not.
        other.restore(state, 0)
        assert_close(other.decode([9], 231), found)
    back = [a >= 0 > b for a, b in zip(first, second[:200], strict=True)]
    assert sum(back) > 5 and all(layer == -1 for layer in second[200:])
    assert sum(layer >= 0 for layer in second) > 10


@pytest.mark.parametrize("ubatch", [512, 64, 48])
def test_a_share_of_dropped_tokens_returns(model: LowModel, ubatch: int) -> None:
    """As many as `revive` says, however the prompt was cut; without it, none."""
    for revive, n_back in (("", 0), (";revive=0.1", 20), (";revive=1", 100)):
        with model.context(f"2:0.5;score=heads;heads=2:1.1+2.2{revive}", n_ubatch=ubatch) as context:
            context.decode(tokens(200))
            first = agq_gguf.last_pruned()
            assert sum(layer >= 0 for layer in first) == 100
            context.decode(tokens(30, 1), 200)
            second = agq_gguf.last_pruned()
        assert second[200:] == [-1] * 30 and all(a >= b for a, b in zip(first, second[:200], strict=True))
        assert sum(layer >= 0 for layer in second) == 100 - n_back


def test_first_layer_cannot_wait(model: LowModel) -> None:
    """Its keys do not tell tokens with different pasts apart."""
    with Both(model, "0:0.5;score=heads;heads=0:0.1") as both:
        both.run(tokens(100))
        both.decode([9], 100)
    assert len(low_level.log) == 1 and "does not end its prompt" in low_level.log[0]


def test_mask_does_not_wait(model: LowModel) -> None:
    with Both(model, "mask," + CUTS["share"]) as both:
        both.run(tokens(100))
        both.decode([9], 100)
    assert len(low_level.log) == 1 and "does not end its prompt" in low_level.log[0]


def test_the_memory_of_waiting_tokens_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once for each context, with the bytes of a token: twice its residual stream or a little more."""
    path = tiny_models.write_llama(tmp_path / "m.gguf", dtype="f32", n_layer=4)
    with Model(path) as model, caplog.at_level("DEBUG", "agq_gguf.llama"):
        with agq_gguf.options(prune=CUTS["share"]):
            context = model.context(512, threads=1)
        with context:
            for _ in range(2):
                context.clear()
                context.decode(Batch(tokens(96)))
        width = int(model._api.llama_model_n_embd(model.handle))
    told = [int(size) for size in re.findall(r"keeps (\d+) bytes of each token .* at most 256 MiB", caplog.text)]
    assert len(told) == 1 and 8 * width <= told[0] <= 8 * width + 64
