"""Which heads find what a question asks for: pure functions, and a calibration by answers on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import architectures
import numpy as np
import pytest
import reference_pruning
import tiny_models
from command_line import run
from hypothesis import given, settings
from hypothesis import strategies as st
from low_level import QUICK

import agq_gguf
from agq_gguf.errors import InputError
from agq_gguf.format.pruning_record import Heads
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.pruning import by_answers
from agq_gguf.pruning.answers import Answers, Questions
from agq_gguf.pruning.heads import Seen, choose_heads, importance, needed, shares, survivors, word_overlap
from agq_gguf.pruning.plan import Plan
from agq_gguf.pruning.planted import Planted
from agq_gguf.pruning.report import Kept
from agq_gguf.pruning.windows import window_of, windowed_layers
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.model import Batch, Model

PLAN = Plan((), "heads", keep=8, reach=1)


def seen(seed: int, knowing: tuple[tuple[int, int], ...] = (), tokens: int = 80) -> Seen:
    """A prompt whose heads look anywhere, but for those that know where the value is."""
    rng = np.random.default_rng(seed)
    at = int(rng.integers(5, tokens - 20))
    weights = rng.random((3, 4, tokens)).astype(np.float16)
    for layer, head in knowing:
        weights[layer, head, at : at + 2] = 1.5
    return Seen(rng.integers(0, 30, tokens).astype(np.int32), (at, at + 1), 3, weights)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=90), st.integers(0, 40))
def test_word_overlap_is_that_of_the_reference(tokens: list[int], tail: int) -> None:
    found = word_overlap(np.array(tokens, np.int32), tail)
    np.testing.assert_allclose(found, reference_pruning.overlap(tokens, tail), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5), st.none() | st.integers(0, 9))
def test_importance_is_that_of_the_reference(seed: int, reach: int, tail: int | None) -> None:
    prompt, chosen = seen(seed), Heads(((0, 1), (2, 3), (1, 0)), tail)
    candidates = prompt.candidates(8)
    measures = [(prompt.weights[head].astype(np.float64), reach) for head in chosen.heads]
    if tail is not None:
        measures.append((reference_pruning.overlap(prompt.tokens.tolist(), tail), 0))
    wanted = reference_pruning.shares(measures, ~candidates, len(prompt.tokens))
    found = importance(prompt, chosen, reach, candidates)
    np.testing.assert_allclose(found[candidates], wanted[candidates], rtol=1e-4, atol=1e-5)
    assert not found[~candidates].any()


def test_shares_by_hand() -> None:
    candidates = np.array([False, True, True, True, True, False])
    values = np.array([[9, 1, 0, 0, 3, 9], [0, 0, 0, 0, 0, 7]])
    np.testing.assert_allclose(shares(values, 0, candidates)[0], [0, 0.25, 0, 0, 0.75, 0])
    np.testing.assert_allclose(shares(values, 1, candidates)[0], [0, 1 / 8, 1 / 8, 3 / 8, 3 / 8, 0])
    assert not shares(values, 1, candidates)[1].any()


def test_what_must_stay() -> None:
    score = np.array([9.0, 0.5, 0.1, 0.4, 0.2, 9.0])
    candidates = np.array([False, True, True, True, True, False])
    assert needed(score, (3, 4), candidates) == 0.75
    assert needed(score, (1,), candidates) == 0.25
    assert needed(score, (0, 5), candidates) == 0  # these stay in any case


def test_heads_that_know_are_found() -> None:
    prompts = [seen(i, ((0, 2), (2, 1)) if i % 2 else ((0, 2),)) for i in range(12)]
    assert choose_heads(prompts, 2, PLAN, 4)[0] == (0, 2)
    with_both = [replace(p, weights=seen(i, ((2, 1), (1, 3))[i % 2 :][:1]).weights) for i, p in enumerate(prompts)]
    with_both = [replace(p, value=seen(i).value) for i, p in enumerate(with_both)]
    assert set(choose_heads(with_both, 2, PLAN, 4)[:2]) == {(2, 1), (1, 3)}
    assert choose_heads(with_both, 1, PLAN, 4)[0] == (1, 3)  # the layers up to this one
    assert len(choose_heads(prompts, 0, PLAN, 2)) <= 2
    assert {layer for layer, _ in choose_heads(with_both, 2, PLAN, 4, blind={0, 1})} == {2}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5]))
def test_limits_keep_the_values_they_were_made_for(seed: int, step: float) -> None:
    prompts = [seen(seed + i, ((1, 1),)) for i in range(10)]
    heads = (Heads(((1, 1), (0, 0)), 3), Heads(((2, 0), (1, 1)), 3))
    cuts = replace(PLAN, thresholds=((1, 0.0), (2, 0.0)), heads=heads)
    plan = by_answers.with_thresholds(cuts, prompts, step)
    lost = [not survivors(prompt, plan)[list(prompt.value)].all() for prompt in prompts]
    assert sum(lost) <= 2 * 10 * step
    assert all(survivors(prompt, plan).sum() < 80 for prompt in prompts)
    spec = plan.spec()
    assert ";score=heads;keep=8;reach=1;heads=1:1.1+0.0;heads=2:2.0+1.1;overlap=3" in spec
    assert [record.heads for record in plan.records().values()] == list(heads)


def test_interval_of_kept_answers() -> None:
    kept = Kept(("a", "b"), (60, 60), (55, 45), (52, 43), 0.95, 0.4, 1.7)
    assert kept.share == 0.95
    assert kept.interval() == pytest.approx((0.888, 0.978), abs=1e-3)  # Wilson, n = 100


def test_layers_with_windows_are_found(tmp_path: Path) -> None:
    path = architectures.write_gemma3(tmp_path / "w.gguf", layers=4, window=48)
    with open_gguf(path) as reader:
        assert window_of(reader) == 48
    with open_gguf(tiny_models.write_llama(tmp_path / "l.gguf")) as reader:
        assert window_of(reader) == 0
    with Model(path) as opened:
        assert windowed_layers(opened, range(3), 48, 1) == {0, 2}
        assert windowed_layers(opened, range(3), 0, 1) == windowed_layers(opened, range(3), 200, 1) == frozenset()


# a tiny model, whose own continuations are the right answers


@pytest.fixture(scope="module")
def model(models: Path) -> Path:
    source = tiny_models.write_llama(models / "answers-f16.gguf", n_layer=4)
    quantize(source, models / "answers-agq4.gguf", options=QUICK)
    return models / "answers-agq4.gguf"


# Models whose layers see different tokens; and the layers whose heads can be looked at: a head that sees 48 of 300
# tokens keeps hardly any value.
OTHERS: dict[str, tuple[Callable[[Path], Path], set[int]]] = {
    "windows": (partial(architectures.write_gemma3, layers=4, window=48), {1}),
    "mrope": (partial(architectures.write_qwen2vl, layers=4), {0, 1, 2}),
    "shared caches": (partial(architectures.write_gemma4, layers=10, shared=4, window=48), {1, 3, 5, 7}),
    "gemma 3n": (partial(architectures.write_gemma3n, layers=25, window=48), {4, 9, 14, 19}),
}


def own_answer(opened: Model, sentences: object, kind: str, seed: int, tokens: tuple[int, int]) -> Planted:
    """A random prompt, and what the model says to it; any token may be asked for."""
    rng = np.random.default_rng(seed)
    prompt = np.array([1, *rng.integers(300, 420, rng.integers(*tokens) - 1)], np.int32)
    with opened.context(len(prompt) + 8, n_ubatch=len(prompt) + 8, threads=1) as context:
        context.decode(Batch(prompt))
        reply = Batch([305], first_position=len(prompt))
        context.decode(reply)
        answer = int(context.logits(reply)[-1].argmax())
    value = (int(rng.integers(1, len(prompt) - 40)),)
    return Planted(kind, prompt, np.array([305], np.int32), np.array([answer], np.int32), value, 4)


@pytest.mark.parametrize(
    "name", ["", "windows", "mrope", "shared caches", pytest.param("gemma 3n", marks=pytest.mark.slow)]
)
def test_calibration_by_answers(
    name: str, model: Path, tmp_path: Path, words_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is written prunes, and says what was measured; the same setting in a list drops the same tokens."""
    if name:
        model = tmp_path / "agq4.gguf"
        quantize(OTHERS[name][0](tmp_path / "f32.gguf"), model, options=QUICK)
    monkeypatch.setattr(by_answers, "plant", own_answer)
    monkeypatch.setattr(by_answers, "_SAVING", 0.0)
    out = tmp_path / "kept.gguf"
    arguments = ("--calibration", words_file, "-t", "1", "-q", "--prompts", "48")
    shown = run("calibrate-pruning", model, "-o", out, "--answers", "0.5", *arguments)
    assert "of the right answers stay right" in shown.stdout and "promised 50%" in shown.stdout
    info = inspect_file(out).pruning
    assert info is not None and info.kept is not None and len(info.curve) == 1
    assert info.kept.kinds == ("needle", "facts", "functions") and sum(info.kept.asked) == 24
    assert info.kept.unpruned == info.kept.asked and info.kept.share >= 0.5
    assert 0 < info.kept.saving < 1 and info.kept.speed > 0
    told = json.loads(run("inspect", out, "--json").stdout)
    assert told["pruning"]["kept"]["right"] == list(info.kept.right)
    assert "right answers stay right" in run("inspect", out).stdout
    fates: list[list[int]] = []
    with Model(out) as opened:
        prompts = [Batch(own_answer(opened, None, "needle", seed, (300, 400)).prompt) for seed in range(7, 15)]
        for setting in ("file", info.curve[0].spec):
            fates.append([])
            with agq_gguf.options(prune=setting), opened.context(512, n_ubatch=512, threads=1) as context:
                for prompt in prompts:
                    context.clear()
                    context.decode(prompt)
                    fates[-1] += agq_gguf.last_pruned()
    assert fates[0] == fates[1] and max(fates[0]) >= 0
    assert run("verify", out).exit_code == 0
    if name:
        records = [t.agq.pruning for t in inspect_file(out).tensors if t.agq and t.agq.pruning]
        heads = [head for record in records if record.heads for head in record.heads.heads]
        assert heads and {layer for layer, _ in heads} <= OTHERS[name][1]


@pytest.mark.parametrize(
    ("answers", "least", "message"),
    [
        ("1", "_FEWEST", "the model answers only 48 of 48 questions"),
        ("0.5", "_SAVING", "would save only"),
    ],
)
def test_what_cannot_be_promised_is_not_written(
    model: Path,
    tmp_path: Path,
    words_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: str,
    least: str,
    message: str,
) -> None:
    monkeypatch.setattr(by_answers, "plant", own_answer)
    monkeypatch.setattr(by_answers, least, 100)
    out = tmp_path / "none.gguf"
    arguments = ("--calibration", words_file, "-t", "1", "-q", "--prompts", "48", "--answers", answers)
    result = run("calibrate-pruning", model, "-o", out, *arguments, code=2)
    assert message in result.stderr and "--share" in result.stderr and not out.exists()


def test_no_setting_keeps_the_promise(model: Path, words_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a random model depend on every token."""
    monkeypatch.setattr(by_answers, "plant", own_answer)
    monkeypatch.setattr(by_answers, "_SAVING", 0.0)
    monkeypatch.setattr(Questions, "ask", lose_all)
    with pytest.raises(InputError, match="no setting keeps 95% of what the model could answer"):
        agq_gguf.calibrate_pruning(
            model, model, calibration=words_file, choice=agq_gguf.PruneOptions(threads=1, prompts=48)
        )


def lose_all(questions: Questions, specs: list[str]) -> list[Answers]:
    n = len(questions.prompts)
    right, left = np.ones(n, bool), [np.zeros(len(p.prompt), np.int32) for p in questions.prompts]
    return [Answers(right, np.ones(n), left), Answers(~right, np.ones(n), left)]
