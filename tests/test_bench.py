from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq_gguf.errors import HostError, InputError
from agq_gguf.measure import bench as module
from agq_gguf.measure.bench import Speed, bench, measure_start, resident_bytes
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.runtime.profile import profiled

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_speed_from_known_times() -> None:
    speed = Speed.of(100, [1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert speed.samples == [100, 50, 25]
    assert speed.median == 50
    assert speed.quartiles == (37.5, 75)
    assert speed.ratio == 1  # 50 to 50


def test_ratio_agrees_with_the_medians_beside_it() -> None:
    # The machine became ten times slower on the way; the second model is twice as fast all along.
    first, second = [1.0, 1.0, 10.0, 10.0, 10.0], [0.5, 0.5, 5.0, 5.0, 5.0]
    assert Speed.of(10, second, first).ratio == 2
    assert Speed.of(10, first, first).ratio == 1


def test_a_single_repetition_has_no_spread() -> None:
    assert Speed.of(10, [2.0], [2.0]) == Speed(10, [5.0], 5.0, (5.0, 5.0), 1.0)


def test_models_take_turns(llama_q4: Path, llama_q8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    times = {"prompt": iter([9, 9, 1, 2, 3, 4, 5, 6]), "generation": iter([10, 20, 30, 40, 50, 60])}

    def fake(part: str) -> Callable[[module._Runner], float]:
        def run(runner: module._Runner) -> float:
            turns.append(f"{part} {runner.model.path.name.removesuffix('.gguf')[-4:]}")
            return float(next(times[part]))

        return run

    monkeypatch.setattr(module._Runner, "time_prompt", fake("prompt"))
    monkeypatch.setattr(module._Runner, "time_generation", fake("generation"))
    results = bench([llama_q4, llama_q8], prompt=12, generation=60, threads=1, repetitions=3, starts=False)
    warm_up = ["prompt q4_0", "prompt q8_0"]
    assert turns == warm_up + ["prompt q4_0", "generation q4_0", "prompt q8_0", "generation q8_0"] * 3
    assert [r.prompt.samples for r in results if r.prompt] == [[12, 4, 2.4], [6, 3, 2]]
    assert [r.generation.samples for r in results if r.generation] == [[6, 2, 1.2], [3, 1.5, 1]]
    assert [r.prompt.ratio for r in results if r.prompt] == [1, 0.75]


def test_all_figures(llama_f16: Path, llama_agq: Path) -> None:
    steps: list[tuple[int, int]] = []
    results = bench(
        [llama_f16, llama_agq],
        prompt=64,
        generation=8,
        threads=1,
        repetitions=3,
        progress=lambda phase, done, total, what: steps.append((done, total)),
    )
    assert [Path(r.model) for r in results] == [llama_f16, llama_agq]
    for result in results:
        for speed in (result.prompt, result.generation):
            assert speed is not None
            assert len(speed.samples) == 3
            assert speed.median == statistics.median(speed.samples) > 0
            assert speed.quartiles[0] <= speed.median <= speed.quartiles[1]
        assert result.start is not None
        assert 0 < result.start.first_token_seconds < 30
        assert result.n_params == results[0].n_params
    assert results[0].prompt is not None
    assert results[0].prompt.ratio == 1
    assert results[1].file_bytes < results[0].file_bytes == llama_f16.stat().st_size
    assert results[1].weight_bytes < results[1].file_bytes
    assert steps == sorted(steps)
    assert steps[-1] == (10, 10)


@pytest.mark.parametrize(("prompt", "generation"), [(16, 0), (0, 4), (1, 1)])
def test_parts_may_be_left_out(llama_q8: Path, prompt: int, generation: int) -> None:
    (result,) = bench([llama_q8], prompt=prompt, generation=generation, threads=1, repetitions=1, starts=False)
    assert (result.prompt is not None) == (prompt > 0)
    assert (result.generation is not None) == (generation > 0)
    assert result.start is None
    dataclasses.asdict(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": -1}, "got -1 and 128"),
        ({"prompt": 0, "generation": 0}, "got 0 and 0"),
        ({"repetitions": 0}, "got 0, 1 and 0"),
        ({"depth": -1}, "got 5, 1 and -1"),
    ],
)
def test_nothing_to_measure(llama_q8: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench([llama_q8], starts=False, **options)
    with pytest.raises(InputError, match="at least one model"):
        bench([])


def test_encoders_are_refused(bert_f16: Path) -> None:
    with pytest.raises(InputError, match="encoder"):
        bench([bert_f16], prompt=8, generation=0, threads=1, starts=False)


def test_flash_attention_is_passed_on(llama_q8: Path) -> None:
    for flash in ("on", "off"):
        bench([llama_q8], prompt=8, generation=2, threads=1, repetitions=1, starts=False, flash_attention=flash)


# the process that measures a start


@linux
def test_memory_of_a_start(llama_agq: Path) -> None:
    start = measure_start(llama_agq, threads=1)
    assert start.resident_bytes is not None
    assert start.baseline_bytes is not None
    assert start.resident_bytes > start.baseline_bytes > 1 << 20


@linux
def test_resident_bytes_grow_with_memory_in_use() -> None:
    before = resident_bytes()
    block = bytearray(os.urandom(1 << 20) * 64)
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before > len(block) // 2


def test_no_proc_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert resident_bytes() is None


def test_errors_of_the_process_come_back(bert_f16: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="encoder"):
        measure_start(bert_f16, threads=1)
    with pytest.raises(InputError, match="No such file"):
        measure_start(tmp_path / "none.gguf")


def test_a_process_that_dies(llama_q8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho oh no >&2\nexit 7\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(HostError, match="status 7: oh no"):
        measure_start(llama_q8)


# several sequences, tokens in the cache


def test_sequences_step_together_behind_the_depth(llama_agq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, list[int], set[int]]] = []
    original = Context.decode

    def decode(self: Context, batch: Batch) -> None:
        raw = batch.raw
        numbers = {raw.seq_id[i][0] for i in range(raw.n_tokens)}
        decoded.append((raw.n_tokens, [raw.pos[0], raw.pos[raw.n_tokens - 1]], numbers))
        original(self, batch)

    monkeypatch.setattr(Context, "decode", decode)
    (result,) = bench(
        [llama_agq], prompt=0, generation=2, depth=10, sequences=3, threads=1, repetitions=2, starts=False
    )
    assert result.generation is not None
    assert result.generation.tokens == 6
    history = [(10, [0, 9], {i}) for i in range(3)]
    steps = [(3, [10 + i, 10 + i], {0, 1, 2}) for i in range(2)]
    probe = [(3, [0, 2], {0})] * 2  # what the model can do
    assert decoded == [*probe, (8, [0, 7], {0}), *history, *steps, *steps, *steps]


def test_sequences_do_not_disturb_one_another(llama_agq: Path) -> None:
    """Three sequences in one batch give what each gives alone."""
    tokens = np.arange(5, 5 + 30).reshape(3, 10).astype(np.int32)
    with Model(llama_agq) as model:
        with model.context(32, threads=2, sequences=3) as context:
            for i, row in enumerate(tokens):
                context.decode(Batch(row[:9], sequence=i))
            batch = Batch(tokens[:, 9], first_position=9, one_each=True)
            context.decode(batch)
            together = context.logits(batch).copy()
        for row, logits in zip(tokens, together, strict=True):
            with model.context(32, threads=1) as context:
                batch = Batch(row)
                context.decode(batch)
                alone = context.logits(batch)[0]
                assert np.linalg.norm(logits - alone) < 0.02 * np.linalg.norm(alone)
                assert logits.argmax() == alone.argmax()


# time per kind of node


def test_profile_counts_the_nodes_of_the_model(llama_agq: Path) -> None:
    (result,) = bench([llama_agq], prompt=16, generation=3, threads=1, repetitions=1, starts=False, profile=True)
    (plain,) = bench([llama_agq], prompt=16, generation=3, threads=1, repetitions=1, starts=False)
    assert plain.prompt_profile == plain.generation_profile == []
    prompt = {node.kind: node for node in result.prompt_profile}
    layers = prompt["MUL_MAT ffn_down"].nodes
    assert layers > 0
    assert prompt["MUL_MAT attn_q"].nodes == layers
    assert {node.kind: node.nodes for node in result.generation_profile}["MUL_MAT ffn_down"] == 3 * layers
    # What stands outside of all nodes, once for each call.
    for kind in ("(planning what to prune)", "(rewriting the graph)"):
        assert prompt[kind].nodes == 1
    for times in (result.prompt_profile, result.generation_profile):
        assert [node.seconds for node in times] == sorted((node.seconds for node in times), reverse=True)
        assert times[-1].seconds > 0


def test_profile_by_cpu_time_is_not_more_than_by_the_wall_clock(llama_agq: Path) -> None:
    with Model(llama_agq) as model, model.context(64, threads=1) as context:
        batch = Batch(np.arange(32) % model.n_vocab)
        begin = time.perf_counter()
        with profiled(cpu_time=True) as times:
            context.decode(batch)
        assert 0 < sum(node.seconds for node in times) <= time.perf_counter() - begin


def test_profile_needs_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agq_gguf.runtime.profile.is_registered", lambda: False)
    with pytest.raises(HostError, match="not registered"), profiled():
        pass
