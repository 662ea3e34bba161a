"""Token pruning in every situation of a running program: the pruned context must go on as one that only hides tokens.

Weights are F32 and logits are compared with a tolerance, because different numbers of tokens take different kernels
(attention in 16-bit integers, or the host's). A token that is seen where it should not be changes logits a hundred
times as much.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import architectures
import llama_cpp.llama_cpp as api
import low_level
import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from low_level import CACHE_TYPES, LowContext, LowModel, tokens

import agq_gguf

SPEC = "1:0.5;min=16"
ATOL = 4e-3  # of logits of size 4 or so


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LowModel]:
    with low_level.float_llama(tmp_path_factory.mktemp("situations"), n_layer=4) as low:
        yield low


def warnings() -> list[str]:
    return [line for line in low_level.log if "token pruning is off" in line]


def n_dropped() -> int:
    """Tokens that the sequence computed last in this thread has lost."""
    return sum(layer >= 0 for layer in agq_gguf.last_pruned())


class Pair:
    """A pruned context, one that hides the same tokens, and one without pruning, which all get the same work."""

    def __init__(self, model: LowModel, spec: str = SPEC, **options: object):
        options = {"cache": "f32", **options}
        self.contexts = [model.context(s, **options) for s in (spec, "mask," + spec, "off")]
        self.fate: list[int] = []
        self.largest_effect = 0.0

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for context in self.contexts:
            context.__exit__(None, None, None)

    def each(self, work: Callable[[LowContext], object]) -> None:
        for context in self.contexts:
            work(context)

    def decode(self, *arguments: object, **options: object) -> np.ndarray:
        found = []
        for context in self.contexts:
            found.append(context.decode(*arguments, **options))  # type: ignore[arg-type]
            if len(found) == 1:
                self.fate = agq_gguf.last_pruned()
            elif len(found) == 2:
                assert agq_gguf.last_pruned() == self.fate
        np.testing.assert_allclose(found[0], found[1], atol=ATOL, rtol=0)
        self.largest_effect = max(self.largest_effect, float(np.abs(found[0] - found[2]).max()))
        return found[0]

    def dropped(self, begin: int = 0) -> int:
        """Tokens dropped from this position on; what stands before is that of the thread's last context."""
        return sum(layer >= 0 for layer in self.fate[begin:])


def shift(n: int) -> Callable[[LowContext], object]:
    """Moves all positions after the second down by n."""
    return lambda c: api.llama_memory_seq_add(c.memory, 0, 2 + n, -1, -n)


def forget(begin: int, end: int, sequence: int = 0) -> Callable[[LowContext], object]:
    return lambda c: api.llama_memory_seq_rm(c.memory, sequence, begin, end)


# what a program does with a context


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_cache_types(model: LowModel, cache: str, flash: bool) -> None:
    with Pair(model, cache=cache, flash=flash) as pair:
        pair.decode(tokens(150))
        assert pair.dropped() == 75
        for i in range(3):
            pair.decode([7 + i], 150 + i)
        pair.decode(tokens(40, 1), 153)
        assert pair.dropped(153) == 20
        pair.decode([9], 193)
        assert pair.largest_effect > 30 * ATOL


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", ["0:0.3,1:0.4,2:0.5", "2:t0.8;score=received", "1:0.6;score=recent"])
def test_many_ubatches(model: LowModel, spec: str, flash: bool) -> None:
    with Pair(model, spec + ";min=16", n_ctx=1024, n_batch=700, n_ubatch=96, flash=flash) as pair:
        pair.decode(tokens(700))
        assert len(pair.fate) == 700
        for begin in range(0, 672, 96):
            assert 10 < sum(layer >= 0 for layer in pair.fate[begin : begin + 96]) < 90
        pair.decode([7], 700)
        assert pair.largest_effect > 30 * ATOL


def test_no_token_is_lost_below_the_minimum_and_nobody_warns(model: LowModel) -> None:
    with Pair(model, "1:0.5") as pair:
        pair.decode(tokens(63))
        assert pair.dropped() == 0 and pair.largest_effect == 0
    with Pair(model, "1:0.5") as pair:
        pair.decode(tokens(64))
        assert pair.dropped() == 32
    assert warnings() == []


def test_prefix_is_used_again(model: LowModel) -> None:
    """Turns of a chat: what does not fit the new prompt is forgotten, the rest stays."""
    with Pair(model, n_ctx=1024) as pair:
        pair.decode(tokens(200))
        for i in range(5):
            pair.decode([5 + i], 200 + i)
        pair.each(forget(150, -1))
        pair.decode(tokens(120, 2), 150)
        assert pair.dropped(150) == 60
        pair.decode([5], 270)
        pair.each(forget(0, -1))
        pair.decode(tokens(90, 3))  # cells of dropped tokens are used again
        assert len(pair.fate) == 90 and pair.dropped() == 45
        pair.decode([5], 90)
        assert pair.largest_effect > 30 * ATOL


def shift_twice(pair: Pair) -> None:
    """Reads a prompt, and twice forgets a part of it, moves the rest there and goes on."""
    pair.decode(tokens(200))
    for _ in range(2):
        pair.each(forget(8, 40))
        pair.each(lambda c: api.llama_memory_seq_add(c.memory, 0, 40, -1, -32))
        pair.decode([5], 168)
        pair.each(forget(168, -1))
        pair.decode(tokens(32, 4), 168)
    pair.decode([5], 200)


@pytest.mark.parametrize("cache", ["f16", "q8_0", "q4_0"])
def test_context_shift(model: LowModel, cache: str) -> None:
    """Positions move, and with them the keys: zero rows become rows of minus zero, or other bytes."""
    with Pair(model, cache=cache, flash=True) as pair:
        shift_twice(pair)
        assert pair.largest_effect > 30 * ATOL


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_save_and_restore(model: LowModel, whole: bool, flash: bool) -> None:
    sequence = None if whole else 0
    options = {"flash": flash, "cache": "f16"}
    with model.context(SPEC, **options) as pruned, model.context("off", **options) as other:
        pruned.decode(tokens(150))
        state = pruned.save(sequence)
        wanted = pruned.decode([7], 150)
        other.decode(tokens(180, 9))  # leaves other keys and other tokens
        api.llama_memory_clear(other.memory, True)
        other.restore(state, sequence)
        assert np.array_equal(other.decode([7], 150), wanted)  # hidden although pruning is off here
        other.restore(state, sequence)
        more = other.decode([7], 150)
        assert np.array_equal(more, wanted)
        # A state of the same length without dropped tokens, and back: nothing of it shows in the mask.
        other.decode(tokens(1), 151)
        plain_tokens = tokens(151, 5)
        with model.context("off", **options) as plain:
            plain.decode(plain_tokens)
            plain_state = plain.save(sequence)
            plain_wanted = plain.decode([7], 151)
        other.restore(plain_state, sequence)
        assert np.array_equal(other.decode([7], 151), plain_wanted)
        other.restore(state, sequence)
        assert np.array_equal(other.decode([7], 150), wanted)


def copy_and_remove_sequences(pair: Pair) -> None:
    """A pruned prompt is copied and its source removed; the copy and a third sequence get prompts of their own."""
    pair.decode(tokens(150))
    pair.each(lambda c: api.llama_memory_seq_cp(c.memory, 0, 1, -1, -1))
    pair.decode([7], 150, sequence=1)
    pair.decode([8], 150, sequence=0)
    pair.each(forget(-1, -1, 0))
    pair.decode(tokens(100, 6), 151, sequence=1)
    pair.decode(tokens(120, 7), sequence=2)
    assert len(pair.fate) == 120 and pair.dropped() == 60


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_are_copied_and_removed(model: LowModel, unified: bool) -> None:
    with Pair(model, n_ctx=1024, n_seq=3, unified=unified) as pair:
        copy_and_remove_sequences(pair)
        pair.each(forget(-1, -1, 1))
        pair.decode([9], 120, sequence=2)
        assert pair.largest_effect > 30 * ATOL
    assert warnings() == []


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("flash", [False, True])
def test_one_batch_for_several_sequences(model: LowModel, flash: bool, unified: bool) -> None:
    """A server: prompts are pruned one by one, and then all sequences go on in common batches."""
    with Pair(model, n_ctx=1536, n_seq=3, unified=unified, flash=flash) as pair:
        for s, n in ((0, 150), (1, 100), (2, 60)):
            pair.decode(tokens(n, s), sequence=s)
        for i in range(3):
            pair.decode([5, 6, 7], sequence=[[0], [1], [2]], positions=[150 + i, 100 + i, 60 + i], outputs=[0, 1, 2])
        n = 8  # tokens of each, which is a batch of the size that goes through our own attention
        positions = [start + 3 + i for start in (150, 100, 60) for i in range(n)]
        pair.decode(tokens(3 * n, 8), sequence=[[i // n] for i in range(3 * n)], positions=positions)
        assert pair.largest_effect > 30 * ATOL
    assert warnings() == []


def test_speculative_decoding(model: LowModel) -> None:
    """Drafts are checked in batches whose logits are all wanted, and what was wrong is forgotten."""
    with Pair(model, "1:0.5") as pair:
        pair.decode(tokens(150))
        position = 150
        for n_right in (2, 0, 4):
            pair.decode(tokens(6, n_right), position, outputs=range(6))
            position += n_right + 1
            pair.each(forget(position, -1))
        assert pair.largest_effect > 30 * ATOL
    assert warnings() == []


def test_sequences_that_share_a_prompt(model: LowModel) -> None:
    """Tokens that belong to two sequences are one sequence as long as both see them."""
    with Pair(model, n_seq=2) as pair:
        pair.decode(tokens(120), sequence=[[0, 1]] * 120)
        assert pair.dropped() == 60
        pair.decode([5, 6], sequence=[[0], [1]], positions=[120, 120], outputs=[0, 1])
        assert pair.largest_effect > 30 * ATOL
    assert warnings() == []


# what switches it off


def unpruned_with_one_warning(
    model: LowModel, reason: str, work: Callable[[LowContext], np.ndarray], spec: str = SPEC, **options: object
) -> None:
    """`work` twice in a context gives exactly what it gives without pruning, and one warning."""
    with model.context(spec, **options) as context:
        found = [work(context), work(context)]
    assert n_dropped() == 0
    with model.context("off", **options) as context:
        wanted = [work(context), work(context)]
    assert np.array_equal(found, wanted)
    assert len(warnings()) == 1 and reason in warnings()[0], low_level.log


def prompt_of(n: int, **options: object) -> Callable[[LowContext], np.ndarray]:
    def work(context: LowContext) -> np.ndarray:
        if context.memory:
            api.llama_memory_clear(context.memory, True)
        return context.decode(tokens(n), **options)  # type: ignore[arg-type]

    return work


def test_off_several_sequences(model: LowModel) -> None:
    options = {
        "sequence": [[i % 2] for i in range(120)],
        "positions": [i // 2 for i in range(120)],
        "outputs": [118, 119],
    }
    unpruned_with_one_warning(model, "several sequences", prompt_of(120, **options), n_seq=2)


def test_off_all_logits_of_several_streams(model: LowModel) -> None:
    options = {"sequence": [[i // 80] for i in range(160)], "positions": [i % 80 for i in range(160)]}
    work = prompt_of(160, **options, outputs=range(160))
    unpruned_with_one_warning(model, "logits of all tokens", work, n_seq=2, unified=False, n_ctx=1024)


def test_off_all_logits(model: LowModel) -> None:
    unpruned_with_one_warning(model, "logits of all tokens", prompt_of(120, outputs=range(120)))


def test_off_embeddings(model: LowModel) -> None:
    def work(context: LowContext) -> np.ndarray:
        api.llama_memory_clear(context.memory, True)
        return context.decode(tokens(120))

    unpruned_with_one_warning(model, "logits of all tokens", work, embeddings=True)


def test_off_not_causal(model: LowModel) -> None:
    def work(context: LowContext) -> np.ndarray:
        api.llama_set_causal_attn(context.context, False)
        return prompt_of(120)(context)

    unpruned_with_one_warning(model, "not causal", work)


@pytest.mark.parametrize("spec", ["3:0.5", "1:0.5,3:0.5", "7:0.5"])
def test_off_layer_that_nothing_follows(model: LowModel, spec: str) -> None:
    unpruned_with_one_warning(model, "before the last layer, which is 3", prompt_of(120), spec)


def test_off_in_parts(model: LowModel) -> None:
    """An evaluation callback that wants to see some tensor gets a graph that is computed piece by piece."""
    seen: list[int] = []

    def callback(tensor: int, ask: bool, _: object) -> bool:
        name = ctypes.string_at(tensor + NAME_OFFSET).decode()
        if ask:
            return name.startswith("ffn_out")
        seen.append(tensor)
        return True

    unpruned_with_one_warning(model, "in parts", prompt_of(120), callback=callback)
    assert seen


NAME_OFFSET = 4 + 4 + 8 + 4 * 8 + 4 * 8 + 4 + 64 + 4 + 10 * 8 + 8 + 8 + 8


def test_parts_see_no_dropped_tokens(model: LowModel) -> None:
    def callback(tensor: int, ask: bool, _: object) -> bool:
        return not ask or ctypes.string_at(tensor + NAME_OFFSET).decode().startswith("Kcur")

    with model.context(SPEC) as pruned, model.context("off", callback=callback) as parts:
        pruned.decode(tokens(150))
        state = pruned.save()
        wanted = np.concatenate([pruned.decode([7], 150), pruned.decode(tokens(9, 1), 151)])
        parts.restore(state)
        found = np.concatenate([parts.decode([7], 150), parts.decode(tokens(9, 1), 151)])
    np.testing.assert_allclose(found, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (architectures.DECODERS["mamba"], "no causal K/V cache"),
        (architectures.FIELD["lfm2"], "pruning does not support the graph's input"),
    ],
)
def test_off_architectures(write: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    low = LowModel(write(tmp_path / "m.gguf"))
    unpruned_with_one_warning(low, reason, prompt_of(100), "0:0.5")
    low.close()


def test_off_encoder(tmp_path: Path) -> None:
    low = LowModel(tiny_models.write_bert(tmp_path / "m.gguf"))

    def work(context: LowContext) -> np.ndarray:
        context.run(tokens(100))
        return np.ctypeslib.as_array(api.llama_get_embeddings_seq(context.context, 0), (128,)).copy()

    unpruned_with_one_warning(low, "no causal K/V cache", work, "0:0.5", embeddings=True)
    low.close()


# every architecture


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", sorted(set(architectures.DECODERS) - {"mamba"}))
def test_architectures(name: str, flash: bool, tmp_path: Path) -> None:
    low = LowModel(architectures.DECODERS[name](tmp_path / "m.gguf"))
    with Pair(low, "0:0.4;min=16", n_ctx=256, n_ubatch=120, flash=flash) as pair:
        pair.decode(tokens(180))
        assert pair.dropped() == 72
        for i in range(2):
            pair.decode([5 + i], 180 + i)
        assert pair.largest_effect > 10 * ATOL
    assert warnings() == []
    low.close()


# control


def test_a_setting_that_is_not_understood_makes_no_context(model: LowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = api.llama_context_default_params()
    monkeypatch.setenv("AGQ_PRUNE", "half of it")
    assert not api.llama_init_from_model(model.model, parameters)
    assert any("pruning is set to 'half of it', which is not understood" in line for line in low_level.log)
    monkeypatch.setenv("AGQ_PRUNE", SPEC)
    with LowContext(model) as context:
        context.decode(tokens(100))
    assert n_dropped() == 50
    with model.context("off") as context:  # what Python says comes before the environment
        context.decode(tokens(100))
    assert n_dropped() == 0


def test_stock_models_are_left_alone(tmp_path: Path) -> None:
    """With nothing set the plugin takes no part in a model without AGQ4 tensors; a list makes it."""
    path = tiny_models.write_llama(tmp_path / "stock.gguf")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import agq_gguf, low_level
low = low_level.LowModel(sys.argv[2])
with low.context() as context:
    context.decode(list(range(5, 105)))
print(len(agq_gguf.last_pruned()))
with low.context("0:0.5") as context:
    context.decode(list(range(5, 105)))
print(sum(layer >= 0 for layer in agq_gguf.last_pruned()))
"""
    environment = {key: value for key, value in os.environ.items() if key != "AGQ_PRUNE"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["0", "50"], result.stderr


# random work

WORK = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), st.integers(2, 90)),
        st.tuples(st.just("decode"), st.integers(1, 4)),
        st.tuples(st.just("rewind"), st.integers(1, 60)),
        st.tuples(st.just("shift"), st.integers(1, 30)),
        st.tuples(st.just("restore"), st.just(0)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    min_size=2,
    max_size=7,
)
STAGES = st.lists(
    st.tuples(st.integers(0, 2), st.one_of(st.integers(0, 9).map(lambda i: f"0.{i}"), st.sampled_from(["t0.5", "t1"]))),
    min_size=1,
    max_size=3,
    unique_by=lambda stage: stage[0],
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    work=WORK,
    stages=STAGES,
    score=st.sampled_from(["first", "received", "recent", "random"]),
    ubatch=st.integers(20, 100),
    flash=st.booleans(),
)
def test_random_work(
    model: LowModel, work: list[tuple[str, int]], stages: list[tuple[int, str]], score: str, ubatch: int, flash: bool
) -> None:
    spec = ",".join(f"{layer}:{value}" for layer, value in stages) + f";score={score};min=12"
    with Pair(model, spec, n_ctx=512, n_ubatch=ubatch, flash=flash, cache="f16") as pair:
        pair.decode(tokens(60, ubatch))
        length = 60
        for step, (what, n) in enumerate(work):
            if what == "prompt" and length + n <= 500:
                pair.decode(tokens(n, step), length)
                length += n
            elif what == "decode":
                for i in range(n):
                    pair.decode([11 + i], length)
                    length += 1
            elif what == "rewind":
                length = max(1, length - n)
                pair.each(forget(length, -1))
            elif what == "shift" and length > n + 4:
                pair.each(forget(2, 2 + n))
                pair.each(shift(n))
                length -= n
            elif what == "restore":
                states = [c.save(0) for c in pair.contexts]
                for context, state in zip(pair.contexts, states, strict=True):
                    api.llama_memory_clear(context.memory, True)
                    context.restore(state, 0)
            elif what == "clear":
                pair.each(lambda c: api.llama_memory_clear(c.memory, False))
                pair.decode(tokens(30, step))
                length = 30
        pair.decode([3], length)
