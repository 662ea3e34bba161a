"""Plans, thresholds and the choice of layers, with a made-up model; and files with pruning in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agq_gguf.errors import FormatError, InputError
from agq_gguf.format import blocks, pruning_record
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.tensor_names import layer_of
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.pruning.file import carriers, write_plan
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import (
    STAYED,
    Plan,
    Work,
    droppable,
    overlooked,
    single_layers,
    split_saving,
    threshold_for,
    work_of,
)
from agq_gguf.pruning.report import PruneReport, metadata_of
from agq_gguf.pruning.search import Point, choose
from agq_gguf.pruning.trial import Run, make_examples


def quiet(phase: str, done: int, total: int, what: str) -> None:
    pass


# plans


def test_spec() -> None:
    plan = Plan(((2, 0.1), (11, 1.5)), "received", keep=3, reach=1)
    assert plan.spec() == "2:t0.1,11:t1.5;score=received;keep=3;reach=1"
    assert plan.spec([11, 7]) == "2:t0.1,7:t0,11:t1.5;score=received;keep=3;reach=1"
    assert Plan(()).spec() == "off"
    assert Plan((), "first").spec([1]) == "1:t0;score=first;keep=0;reach=0"
    assert plan.records()[11] == pruning_record.Pruning("received", 1.5, keep=3, reach=1)
    again = replace(plan, reuse=True)
    assert again.spec() == plan.spec() + ";reuse=1" and again.records()[2].reuse


@given(st.floats(0, 1e30).map(np.float32))
def test_spec_keeps_every_bit_of_a_threshold(value: np.float32) -> None:
    text = Plan(((0, float(value)),)).spec().split(";")[0].removeprefix("0:t")
    assert np.float32(float(text)) == value


def test_work() -> None:
    work = work_of(
        {"token_embd.weight": 999, "blk.0.attn_q.weight": 10, "blk.0.ffn_up.weight": 30, "blk.1.attn_q.weight": 10}
        | {"blk.1.ffn_up.weight": 30, "blk.3.attn_q.weight": 20, "blk.3.ffn_up_exps.weight": 60, "output.weight": 5}
    )
    assert work == Work(4, 0.75)
    sizes = {f"blk.0.attn_{name}.weight": n for name, n in {"q": 5, "k": 2, "v": 2, "output": 1}.items()}
    again = work_of({**sizes, "blk.2.ffn_up.weight": 10}, reuse=True)
    assert again == Work(3, 0.5, 0.2)
    assert again.worth(0) == pytest.approx((2 * 0.8 + 0.5) / 3)
    assert work.worth(3) == 0.75 / 4 and work.worth(0) == 3.75 / 4
    left = np.full(10, STAYED, np.int32)
    assert work.saving([left]) == 0
    left[:5] = 0
    left[5:7] = 2
    assert work.saving([left, np.full(10, STAYED, np.int32)]) == pytest.approx((5 * 3.75 + 2 * 1.75) / 80)
    with pytest.raises(ValueError, match="blk"):
        work_of({"output.weight": 5})


@given(
    st.lists(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=20), min_size=1, max_size=4),
    st.integers(0, 90),
)
def test_threshold_drops_what_is_asked_for(values: list[list[float]], wanted: int) -> None:
    importance = [np.array([*v, np.nan, np.inf], np.float32) for v in values]
    assert droppable(importance) == sum(map(len, values))
    threshold = threshold_for(importance, wanted)
    assert threshold == np.float32(threshold) and np.isfinite(threshold)
    dropped = sum(int((v < np.float32(threshold)).sum()) for v in importance)
    equal = sum(int((v == np.float32(threshold)).sum()) for v in importance)
    # All that are asked for, but for those that equal the threshold.
    assert dropped <= min(wanted, droppable(importance)) <= dropped + equal


def test_threshold_of_nobody() -> None:
    assert threshold_for([np.array([np.nan, np.inf], np.float32)], 1) == 0
    assert threshold_for([np.array([3.0], np.float32)], 0) == 0


def test_layers_that_can_save_enough() -> None:
    work = Work(10, 0.5)

    def missed(layer: int) -> float:
        return abs(layer - 3)

    assert single_layers(work, 0.3, range(9), 0.8, 99, missed) == [0, 1, 2, 3, 4, 5]  # 0.8 * 0.45 >= 0.3 > 0.8 * 0.35
    assert single_layers(work, 0.3, range(9), 0.8, 3, missed) == [1, 3, 4]
    assert single_layers(work, 0.9, range(9), 0.8, 3, missed) == []
    shares = split_saving(work, [2, 5], [1, 1], 0.3)
    assert shares == pytest.approx([0.15 / 0.75, 0.15 / 0.45])


def test_what_later_layers_would_miss() -> None:
    """Layer 0 would drop what layers 1 and 2 need most in the first prompt, half as much in the second."""
    importance = {
        0: [np.array([1, 2, 3, np.inf], np.float32), np.array([1, 2, 3, np.inf], np.float32)],
        1: [np.array([8, 1, 2, np.inf], np.float32), np.array([4, 1, 8, np.inf], np.float32)],
        2: [np.array([9, 1, 2, np.inf], np.float32), np.array([3, 1, 6, np.inf], np.float32)],
    }
    assert overlooked(importance, 0, 2) == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    assert overlooked(importance, 1, 2) == pytest.approx((1 / 9 + 1 / 6) / 2)
    assert overlooked(importance, 2, 2) == 0  # nothing is later
    assert overlooked(importance, 0, 0) == 0


# choosing, with a model that is only a formula


class MadeUp:
    """Eight layers; dropping costs little behind layer 3, and less if a part of it is left to layer 5."""

    def __init__(self, gain: float = 0.3):
        self.gain, self.runs = gain, 0
        self.values = [np.random.default_rng(i).random(100).astype(np.float32) for i in range(3)]

    def __call__(self, plan: Plan, probed: Sequence[int]) -> Run:
        self.runs += 1
        left = [np.full(100, STAYED, np.int32) for _ in self.values]
        importance: dict[int, list[np.ndarray]] = {}
        for layer in sorted({*probed, *plan.layers}):
            for i, values in enumerate(self.values):
                seen = np.where(left[i] == STAYED, (values * (layer + 1)) % 1, np.nan).astype(np.float32)
                seen[-10:] = np.inf
                importance.setdefault(layer, []).append(seen)
                left[i][(seen < np.float32(dict(plan.thresholds).get(layer, 0)))] = layer
        cost = sum(abs(layer - 3) + 1.0 for layer in plan.layers) / max(len(plan.layers), 1)
        cost = cost * self.gain if plan.layers == (3, 5) else cost
        saving = Work(8, 0.5).saving(left)
        return Run(left, {k: importance[k] for k in probed}, cost * saving, 1 + cost * saving, 0.0)


WORK = Work(8, 0.5)


def test_choice_of_layers_and_curve() -> None:
    choice = PruneOptions(share=0.3, score="received", keep=7, candidates=7, curve=(0.1, 0.2, 0.8))
    chosen, curve, nll = choose(MadeUp(), WORK, range(7), choice)
    assert chosen.plan.layers == (3, 5) and nll == 1
    assert (chosen.plan.score, chosen.plan.keep) == ("received", 7)
    assert [p.saving for p in curve[:3]] == pytest.approx([0.1, 0.2, 0.3], abs=0.005)
    assert chosen is curve[2] and curve[3].saving < 0.8  # not all of it can be had
    thresholds = [dict(p.plan.thresholds) for p in curve]
    assert all(a[3] <= b[3] for a, b in pairwise(thresholds))


def test_a_second_layer_must_be_worth_it() -> None:
    chosen, _, _ = choose(MadeUp(gain=0.99), WORK, range(7), PruneOptions(share=0.3))
    assert chosen.plan.layers == (3,)
    chosen, _, _ = choose(MadeUp(), WORK, range(7), PruneOptions(share=0.3, max_layers=1))
    assert chosen.plan.layers == (3,)


def test_given_layers_are_taken() -> None:
    run = MadeUp()
    chosen, _, _ = choose(run, WORK, range(7), PruneOptions(share=0.2, layers=(1, 4), curve=()))
    assert chosen.plan.layers == (1, 4) and chosen.saving == pytest.approx(0.2, abs=0.005)
    assert run.runs == 3


def test_too_much_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot save 90% of the work: at most 90% of the tokens.*after layer 2"):
        choose(MadeUp(), WORK, range(2, 7), PruneOptions(share=0.9))


@pytest.mark.parametrize("bad", [{"share": 0.95}, {"share": -0.1}, {"score": "newest"}, {"keep": 256}, {"reach": 16}])
def test_bad_options(bad: dict[str, float]) -> None:
    with pytest.raises(InputError):
        PruneOptions(**bad)  # type: ignore[arg-type]


def test_examples_are_cut_evenly() -> None:
    tokens = np.arange(3000, dtype=np.int32)
    examples = make_examples(tokens, 8, 64, 4096)
    assert len(examples) == 8
    for e in examples[::2]:
        assert len(e.prompt) == 448 and e.following[0] == e.prompt[-1] + 1 and len(e.following) == 64
        assert not e.is_echo and np.all(np.diff(e.prompt) == 1)
    for e in examples[1::2]:  # their last 16 tokens, and what follows, are a part of what stands before
        assert e.is_echo and len(e.prompt) == 448 and len(e.following) == 32
        assert np.all(np.diff(e.prompt[:-16]) == 1)
        assert np.all(np.diff([*e.prompt[-16:], *e.following]) == 1)
        assert e.prompt[0] < e.prompt[-16] and e.following[-1] < e.prompt[-65]
    assert examples[6].prompt[0] < 2999 - 512 < examples[7].prompt[0]
    assert [e.is_echo for e in make_examples(tokens[:512], 8, 64, 4096)] == [False, True]
    assert len(make_examples(tokens, 8, 64, 256)[0].prompt) == 192
    with pytest.raises(InputError, match="512 are needed"):
        make_examples(tokens[:511], 8, 64, 4096)
    with pytest.raises(InputError, match="a context of 192 tokens or more, got 128"):
        make_examples(tokens, 8, 64, 128)


# files


def test_layer_of() -> None:
    assert layer_of("blk.12.attn_output.weight") == 12
    assert layer_of("output.weight") is None and layer_of("xblk.1.x") is None


def point(saving: float, thresholds: tuple[tuple[int, float], ...]) -> Point:
    return Point(Plan(thresholds, "received", keep=9, reach=2), saving, saving / 10, 2 + saving, 0.0)


def report() -> PruneReport:
    curve = [point(0.1, ((0, 0.25),)), point(0.3, ((0, 0.75),))]
    return PruneReport(curve[1], curve, 2.0, "words.txt, 2 prompts of 448 tokens")


def test_records_are_written_and_removed(llama_agq: Path, tmp_path: Path) -> None:
    with open_gguf(llama_agq) as reader:
        held_by = carriers(reader)
        assert held_by == {0: "blk.0.attn_output.weight", 1: "blk.1.attn_output.weight"}
        records = {held_by[0]: report().chosen.plan.records()[0]}
        write_plan(reader, tmp_path / "pruned.gguf", records, metadata_of(report()), quiet)
    info = inspect_file(tmp_path / "pruned.gguf")
    assert {t.name: t.agq.pruning for t in info.tensors if t.agq and t.agq.pruning} == records
    assert info.pruning is not None and info.pruning.nll == 2 and info.pruning.saving == pytest.approx(0.3)
    assert [p.spec for p in info.pruning.curve] == [p.plan.spec() for p in report().curve]
    assert info.metadata["prune.layers"] == [0]
    # Into the same file: the old record leaves with the old keys, all else is as it was.
    with open_gguf(tmp_path / "pruned.gguf") as reader:
        write_plan(reader, tmp_path / "pruned.gguf", {}, {}, quiet)
    with open_gguf(tmp_path / "pruned.gguf") as cleared, open_gguf(llama_agq) as source:
        for name in source.tensors:
            assert bytes(cleared.raw(name)) == bytes(source.raw(name))
        assert {k: v.raw for k, v in cleared.metadata.items()} == {k: v.raw for k, v in source.metadata.items()}


def test_another_tensor_carries_if_the_first_has_no_room(llama_agq: Path, tmp_path: Path) -> None:
    name = "blk.1.attn_output.weight"
    with open_gguf(llama_agq) as reader:
        tensor = reader.tensors[name]
        matrix = blocks.unpack(np.frombuffer(reader.raw(name), np.uint8).reshape(128, -1))
        listed = np.arange(blocks.listable(128, 128) + 3, dtype=np.uint16)
    full = blocks.Matrix(matrix.codes, matrix.scales, blocks.Parameters(matrix.parameters.codebook,
                         matrix.parameters.exponents, listed))  # fmt: skip
    raw = bytearray(llama_agq.read_bytes())
    raw[tensor.offset : tensor.offset + tensor.n_bytes] = blocks.pack(full).tobytes()
    (tmp_path / "full.gguf").write_bytes(raw)
    with open_gguf(tmp_path / "full.gguf") as reader:
        assert carriers(reader)[1].startswith("blk.1.") and carriers(reader)[1] != name
        with pytest.raises(FormatError, match=r"full.gguf: blk.1.attn_output.weight: the matrix has room for"):
            write_plan(reader, tmp_path / "out.gguf", {name: pruning_record.Pruning("first", 1)}, {}, quiet)
    assert not (tmp_path / "out.gguf").exists()


def test_damage_is_named(llama_agq: Path, tmp_path: Path) -> None:
    with open_gguf(llama_agq) as reader:
        at = reader.tensors["blk.1.ffn_up.weight"].offset + 48
    raw = bytearray(llama_agq.read_bytes())
    raw[at] ^= 1
    (tmp_path / "bad.gguf").write_bytes(raw)
    with (
        open_gguf(tmp_path / "bad.gguf") as reader,
        pytest.raises(FormatError, match=r"bad.gguf: tensor blk.1.ffn_up.weight"),
    ):
        carriers(reader)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("agq.prune.layers", "x"),
        ("agq.prune.curve.kl", np.zeros(3, np.float32)),
        ("agq.prune.curve.thresholds", np.zeros(3, np.float32)),
        ("agq.prune.keep", "many"),
        ("agq.prune.saving", "x"),
    ],
)
def test_a_curve_that_makes_no_sense_is_not_shown(llama_agq: Path, tmp_path: Path, key: str, value: object) -> None:
    with open_gguf(llama_agq) as reader:
        write_plan(reader, tmp_path / "odd.gguf", {}, {**metadata_of(report()), key: value}, quiet)
    assert inspect_file(tmp_path / "odd.gguf").pruning is None
