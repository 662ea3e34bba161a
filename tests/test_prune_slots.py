"""Token pruning with several sequences in a ubatch: each gets what it would get alone, to the bit.

A program with slots puts the prompts of some users and single tokens of others into one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import architectures
import llama_cpp.llama_cpp as api
import low_level
import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from low_level import GetModel, LowContext, LowModel, models_fixture, tokens

import agq_gguf

WRITERS = {
    "llama": partial(tiny_models.write_llama, dtype="f32", n_layer=6, n_embd=256, n_head=4, n_kv=2, seed=5),
    "qwen2": partial(tiny_models.write_qwen2, n_layer=5),
    "bloom": partial(tiny_models.write_bloom, n_layer=5),
    "falcon": partial(tiny_models.write_falcon, n_layer=5),
    "gemma3": partial(architectures.write_gemma3, layers=6, window=48),
}
SPECS = {
    "received": "1:0.5",
    "recent": "1:0.3,3:0.4;score=recent;keep=10;reach=2",
    "first": "1:0.4,2:0.4;score=first",
    "random": "2:t0.5;score=random",
    "states": "1:0.5;score=recent;reuse=1",
    "heads": "1:0.5;score=heads;heads=1:0.1+1.2;reach=3",
    "two cuts": "1:0.4,3:0.5;score=heads;heads=1:0.1+1.2;heads=3:1.1+3.2;reach=3;keep=20;overlap=3",
    "threshold": "2:t0.9;score=heads;heads=2:1.1+2.2;reach=5",
}
# Of logits of size 4 or so, if weights are F32. Where the host cuts a batch in another way, other kernels compute it.
ATOL = 0.02


model = models_fixture(lambda arch, path: WRITERS[arch](path), "agq4")


@dataclass
class Piece:
    """Tokens of a sequence that come together; the last one's logits are wanted, or those of none."""

    sequence: int
    ids: list[int]
    begin: int = 0
    asks: bool = True


def run(context: LowContext, *pieces: Piece) -> list[np.ndarray]:
    """One batch; the logits at the end of each piece that asks for them."""
    ids = [token for p in pieces for token in p.ids]
    positions = [p.begin + i for p in pieces for i in range(len(p.ids))]
    sequences = [[p.sequence] for p in pieces for _ in p.ids]
    ends = np.cumsum([len(p.ids) for p in pieces]) - 1
    outputs = [int(end) for end, p in zip(ends, pieces, strict=True) if p.asks]
    if not outputs:
        context.run(ids, positions=positions, sequence=sequences)
        return []
    return list(context.decode(ids, positions=positions, sequence=sequences, outputs=outputs))


def context(model: LowModel, spec: str | None, **options: object) -> LowContext:
    return model.context(spec, **{"n_ctx": 1024, "n_batch": 1024, "n_ubatch": 1024, "n_seq": 4, **options})


Batches = Sequence[Sequence[Piece]]


def run_all(model: LowModel, spec: str | None, batches: Batches, **options: object) -> list[list[np.ndarray]]:
    """The logits that each of four sequences gets."""
    logits: list[list[np.ndarray]] = [[] for _ in range(4)]
    with context(model, spec, **options) as c:
        for batch in batches:
            asking = [p.sequence for p in batch if p.asks]
            for sequence, row in zip(asking, run(c, *batch), strict=True):
                logits[sequence].append(row)
    return logits


def only(batches: Batches, sequence: int) -> list[list[Piece]]:
    """The batches of a user who has the program for himself."""
    return [found for batch in batches if (found := [p for p in batch if p.sequence == sequence])]


def as_alone(model: LowModel, spec: str, batches: Batches, atol: float = 0, **options: object) -> None:
    """Every sequence gets the same logits as alone, and others than without pruning."""
    together = run_all(model, spec, batches, **options)
    for sequence, found in enumerate(together):
        if not found:
            continue
        own = only(batches, sequence)
        np.testing.assert_allclose(found, run_all(model, spec, own, **options)[sequence], atol=atol, rtol=0)
        unpruned = run_all(model, "off", own, **options)[sequence]
        assert np.abs(np.array(found) - np.array(unpruned)).max() > max(0.01, 5 * atol), sequence
    assert not any("pruning" in line for line in low_level.log), low_level.log


def steps(begin: dict[int, int], n: int = 3) -> list[list[Piece]]:
    """Single tokens of several sequences side by side."""
    return [[Piece(s, [310 + 7 * s + i], at + i) for s, at in begin.items()] for i in range(n)]


PROMPTS = [tokens(n, n) for n in (130, 70, 201, 96)]
SIDE_BY_SIDE = [[Piece(s, prompt) for s, prompt in enumerate(PROMPTS)]]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_prompts_side_by_side(model: GetModel, spec: str, flash: bool) -> None:
    then = steps({s: len(prompt) for s, prompt in enumerate(PROMPTS)})
    for n in (2, 4):
        as_alone(model("llama"), SPECS[spec], [SIDE_BY_SIDE[0][:n], *([step[:n] for step in then])], flash=flash)


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_tokens_are_dropped(model: GetModel, spec: str) -> None:
    """What is told of a ubatch is the fate of its last sequence, so each prompt comes last once."""
    for sequence, prompt in enumerate(PROMPTS):
        order = [p for p in SIDE_BY_SIDE[0] if p.sequence != sequence] + [Piece(sequence, prompt)]
        fates = []
        for batch in (order, order[-1:]):
            with context(model("llama"), SPECS[spec]) as c:
                run(c, *batch)
                fates.append(agq_gguf.last_pruned())
        assert fates[0] == fates[1]
        assert len(prompt) == len(fates[0]) and 10 < sum(layer >= 0 for layer in fates[0]) < len(prompt) - 16


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", sorted(set(WRITERS) - {"llama"}))
def test_architectures(model: GetModel, arch: str, flash: bool) -> None:
    then = steps({s: len(prompt) for s, prompt in enumerate(PROMPTS)})
    for spec in ("received", "two cuts"):
        as_alone(model(arch), SPECS[spec], [*SIDE_BY_SIDE, *then], flash=flash)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("spec", ["received", "recent", "random", "two cuts"])
def test_windows(model: GetModel, spec: str, full: bool) -> None:
    """Both kinds of attention; with a small cache, cells of windows are used again."""
    batches = [
        [Piece(0, tokens(90, 0)), Piece(1, tokens(150, 1))],
        *steps({0: 90, 1: 150}),
        [Piece(0, tokens(75, 2), 93), Piece(2, tokens(120, 3)), Piece(1, [7], 153)],
        *steps({2: 120, 1: 154, 0: 168}),
    ]
    as_alone(model("gemma3"), SPECS[spec], batches, swa_full=full, n_ubatch=512)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_beside_answers(model: GetModel, spec: str, flash: bool) -> None:
    """A batch holds prompts and single tokens of answers, in any order. Later batches begin second turns."""
    batches = [
        [Piece(0, tokens(100, 0)), Piece(3, tokens(80, 1))],
        [Piece(0, [310], 100), Piece(1, tokens(140, 2)), Piece(3, [311], 80)],
        [Piece(1, [312], 140), Piece(3, [313], 81), Piece(0, [314], 101), Piece(2, tokens(90, 3))],
        *steps({0: 102, 1: 141, 2: 90, 3: 82}),
        [Piece(0, tokens(70, 4), 105), Piece(1, [315], 144), Piece(2, tokens(85, 5), 93), Piece(3, [316], 85)],
        *steps({0: 175, 1: 145, 2: 178, 3: 86}),
    ]
    as_alone(model("llama"), SPECS[spec], batches, flash=flash)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", ["heads", "two cuts", "threshold"])
def test_a_prompt_that_goes_on_beside_one_that_ends(model: GetModel, spec: str, flash: bool) -> None:
    """Beginnings wait for their question while others get theirs, and nobody sees another's."""
    batches = [
        [Piece(0, tokens(100, 0), asks=False), Piece(1, tokens(80, 1))],
        [Piece(1, [311], 80), Piece(0, tokens(60, 2), 100, asks=False), Piece(2, tokens(77, 3), asks=False)],
        [Piece(2, tokens(50, 4), 77), Piece(1, [312], 81), Piece(0, tokens(9, 5), 160), Piece(3, tokens(30, 6))],
        *steps({0: 169, 1: 82, 2: 127}),
        [Piece(0, tokens(20, 7), 172, asks=False), Piece(2, tokens(20, 8), 130)],  # too short to be pruned alone
        [Piece(0, tokens(64, 9), 192), Piece(2, tokens(10, 10), 150)],
        *steps({0: 256, 2: 160}),
    ]
    others = [[p for p in batch if p.sequence != 3] for batch in batches]  # the short prompt of 3 loses no token
    m = model("llama", "f32")
    together, without = (run_all(m, SPECS[spec], b, flash=flash) for b in (batches, others))
    np.testing.assert_allclose(together[0], without[0], atol=ATOL, rtol=0)
    assert len(together[3]) == 1
    as_alone(m, SPECS[spec], others, ATOL, flash=flash)


@pytest.mark.parametrize("ubatch", [64, 90, 256])
def test_batches_are_cut_anywhere(model: GetModel, ubatch: int) -> None:
    """The host cuts a batch into ubatches without regard to sequences; `heads` chooses the same tokens."""
    then = steps({s: len(prompt) for s, prompt in enumerate(PROMPTS)})
    m = model("llama", "f32")
    wanted = run_all(m, SPECS["two cuts"], [*SIDE_BY_SIDE, *then])
    found = run_all(m, SPECS["two cuts"], [*SIDE_BY_SIDE, *then], n_ubatch=ubatch)
    np.testing.assert_allclose(found, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cache", ["f32", "q8_0"])
def test_caches_and_threads(model: GetModel, cache: str, threads: int) -> None:
    then = steps({s: len(prompt) for s, prompt in enumerate(PROMPTS)})
    as_alone(model("llama"), SPECS["two cuts"], [*SIDE_BY_SIDE, *then], cache=cache, threads=threads, flash=True)


# A cache for each sequence: the host computes as many tokens of each in one graph, and what is left over later.

OWN = {"unified": False, "n_ctx": 4096}
ONE_LENGTH = [[Piece(s, tokens(100, s)) for s in range(4)], *steps(dict.fromkeys(range(4), 100))]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_caches_of_their_own(model: GetModel, spec: str, flash: bool) -> None:
    as_alone(model("llama"), SPECS[spec], ONE_LENGTH, flash=flash, **OWN)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", sorted(set(WRITERS) - {"llama"}))
def test_architectures_with_caches_of_their_own(model: GetModel, arch: str, flash: bool) -> None:
    for spec in ("received", "two cuts"):
        as_alone(model(arch), SPECS[spec], ONE_LENGTH, flash=flash, **OWN)


@pytest.mark.parametrize("cache", ["f32", "q8_0"])
def test_types_of_caches_of_their_own(model: GetModel, cache: str) -> None:
    as_alone(model("llama"), SPECS["two cuts"], ONE_LENGTH, cache=cache, flash=True, **OWN)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", ["heads", "two cuts", "threshold"])
def test_what_is_left_over_comes_later(model: GetModel, spec: str, flash: bool) -> None:
    """Prompts of different lengths are cut where shorter ones end, and choose the same tokens as in one piece."""
    then = steps({s: len(prompt) for s, prompt in enumerate(PROMPTS)})
    second = [[Piece(0, tokens(70, 5), 133), Piece(2, tokens(90, 6), 204), Piece(3, [9], 99)], *steps({0: 203, 2: 294})]
    as_alone(model("llama", "f32"), SPECS[spec], [*SIDE_BY_SIDE, *then, *second], ATOL, flash=flash, **OWN)


# What sequences have in common, and what a program does with them. All tokens may wait, but none is dropped, so a token
# that is not seen where it should be, or by others, changes the logits.

ALL = "1:t0,3:t0;score=heads;heads=1:0.1+1.2;heads=3:1.1;min=20"


class Users:
    """Three sequences in a context whose tokens wait and in one without pruning, which must agree."""

    def __init__(self, model: LowModel, unified: bool, flash: bool = False, spec: str = ALL, full: bool = True) -> None:
        options = {"unified": unified, "flash": flash, "swa_full": full, "n_ubatch": 90}
        self.contexts = [context(model, s, **options) for s in (spec, "off")]
        self._can_shift = full
        self._copies_later = not unified
        self._is_late = False  # the host copies streams and turns keys with the next batch, but a state is saved before
        self.length = [0, 0, 0]
        self._copied: set[int] = set()  # these may share cells, which have only one position
        self._seed = 0

    def __enter__(self) -> Users:
        return self

    def __exit__(self, *_: object) -> None:
        for c in self.contexts:
            c.__exit__(None, None, None)

    def batch(self, parts: Sequence[tuple[int, int, bool]]) -> None:
        """`parts`: sequence, number of tokens, and whether the last one's logits are wanted."""
        pieces = []
        for sequence, n, asks in parts:
            self._seed += 1
            pieces.append(Piece(sequence, tokens(n, self._seed), self.length[sequence], asks))
            self.length[sequence] += n
        found, wanted = (run(c, *pieces) for c in self.contexts)
        self._is_late = False
        np.testing.assert_allclose(found, wanted, atol=ATOL, rtol=0)

    def shift(self, sequence: int, by: int) -> None:
        if sequence in self._copied or not self._can_shift:
            return
        for c in self.contexts:
            api.llama_memory_seq_add(c.memory, sequence, 0, -1, by)
        self.length[sequence] += by
        self._is_late = True

    def forget(self, sequence: int, begin: int) -> None:
        for c in self.contexts:
            assert api.llama_memory_seq_rm(c.memory, sequence, begin, -1)
        self.length[sequence] = begin

    def copy(self, source: int, to: int) -> None:
        self.forget(to, 0)
        for c in self.contexts:
            api.llama_memory_seq_cp(c.memory, source, to, -1, -1)
        self.length[to] = self.length[source]
        self._copied |= {source, to}
        self._is_late = self._is_late or self._copies_later

    def restore(self, sequence: int) -> None:
        if self._is_late:
            return
        for c in self.contexts:
            state = c.save(sequence)
            api.llama_memory_seq_rm(c.memory, sequence, -1, -1)
            c.restore(state, sequence)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("unified", [True, False])
def test_a_beginning_that_two_share(model: GetModel, unified: bool, flash: bool) -> None:
    """It waits while its sequence is copied; then both ask in one batch, and choose from what is their own."""
    with Users(model("llama", "f32"), unified, flash) as users:
        users.batch([(0, 80, False), (2, 30, True)])
        users.copy(0, 1)
        users.batch([(0, 40, False), (2, 1, True)])
        users.batch([(0, 30, True), (1, 35, True), (2, 1, True)])
        users.batch([(0, 1, True), (1, 1, True), (2, 1, True)])
    assert not any("pruning" in line for line in low_level.log)


@pytest.mark.parametrize("unified", [True, False])
def test_positions_are_shifted(model: GetModel, unified: bool) -> None:
    """Keys of one sequence turn while tokens of all wait."""
    with Users(model("llama", "f32"), unified) as users:
        users.batch([(0, 70, False), (1, 75, False), (2, 40, False)])
        users.shift(1, 9)
        users.batch([(1, 30, True), (2, 1, True)])
        users.shift(0, 4)
        users.batch([(0, 30, True), (1, 1, True), (2, 30, True)])
    assert not any("pruning" in line for line in low_level.log)


WORK = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=3, max_size=3)),
        st.tuples(st.just("step"), st.just(None)),
        st.tuples(st.just("shift"), st.tuples(st.integers(0, 2), st.integers(1, 20))),
        st.tuples(st.just("forget"), st.tuples(st.integers(0, 2), st.integers(1, 50))),
        st.tuples(st.just("copy"), st.sampled_from([(0, 1), (1, 2), (2, 0)])),
        st.tuples(st.just("restore"), st.integers(0, 2)),
    ),
    min_size=2,
    max_size=7,
)


def do_work(users: Users, work: list[tuple[str, Any]], order: list[int]) -> None:
    users.batch([(0, 50, False), (1, 70, True), (2, 25, False)])
    for what, how in work:
        if max(users.length) > 190:  # a batch of 60 more must fit into 256 cells
            users.forget(int(np.argmax(users.length)), 30)
        if what == "batch":
            users.batch([(s, *how[s]) for s in order])
        elif what == "step":
            users.batch([(s, 1, True) for s in order])
        elif what == "shift":
            users.shift(*how)
        elif what == "forget" and users.length[how[0]] > how[1]:
            users.forget(how[0], users.length[how[0]] - how[1])
        elif what == "copy":
            users.copy(*how)
        elif what == "restore":
            users.restore(how)
    users.batch([(s, 1, True) for s in order])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(work=WORK, order=st.permutations([0, 1, 2]), unified=st.booleans(), flash=st.booleans())
def test_random_work(
    model: GetModel, work: list[tuple[str, Any]], order: list[int], unified: bool, flash: bool
) -> None:
    with Users(model("llama", "f32"), unified, flash) as users:
        do_work(users, work, order)
