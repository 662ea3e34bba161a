"""What a token is worth, the direction that tells it, and both in a running model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from reference_model import ReferenceModel
from reference_pruning import PrunedReference

from agq_gguf.errors import InputError
from agq_gguf.format.pruning_record import Direction
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.pruning.calibrate import calibrate_pruning
from agq_gguf.pruning.learn import Fit, Seen, learn_directions, normalized, worth_keeping
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.model import Model
from agq_gguf.text import read_text


def test_worth_is_attention_times_change() -> None:
    seen = Seen(
        states={0: np.array([[1, 0], [0, 1]], np.float32)},
        outputs={0: np.array([[1, 0], [0, 3]], np.float32), 1: np.array([[1, 2], [0, 1]], np.float32)},
        looks={0: np.array([9, 9], np.float32), 1: np.array([1, 0.5], np.float32), 2: np.array([2, 0], np.float32)},
    )
    np.testing.assert_allclose(worth_keeping(seen, 0), [1 * 0 + 2 * 2, 0.5 * 2 + 0])


def test_normalized() -> None:
    wanted = np.array([[0.848528, 1.131371], [0, 0]])
    np.testing.assert_allclose(normalized(np.array([[3, 4], [0, 0]], np.float32)), wanted, rtol=1e-6)


def test_fit_finds_a_direction() -> None:
    rng = np.random.default_rng(1)
    wanted = rng.standard_normal(16)
    fit = Fit()
    for _ in range(5):
        x = rng.standard_normal((400, 16)).astype(np.float32)
        fit.add(x, np.exp(x @ wanted + 2))
    found = fit.direction()
    assert np.corrcoef(found, wanted)[0, 1] > 0.99


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learn")
    source = tiny_models.write_llama(folder / "f32.gguf", dtype="f32", n_layer=4)
    quantize(source, folder / "agq4.gguf", options=QuantizeOptions(threads=1))
    return source


def test_directions_of_a_running_model(small: Path, words_file: Path) -> None:
    """The same sums as from an independent forward of the float model."""
    length, following, n = 96, 32, 3
    with Model(small) as model:
        tokens = model.tokenize(read_text(words_file))[: n * (length + following)]
        found = learn_directions(model, tokens, [0, 2], following, length, 1, lambda done, total: None)
        with pytest.raises(InputError, match="at least 128 are needed"):
            learn_directions(model, tokens[:100], [0], following, length, 1, lambda done, total: None)
        bos = model.bos if model.add_bos else None
    fits = {0: Fit(), 2: Fit()}
    for start in range(0, len(tokens), length + following):
        piece = tokens[start : start + length + following].copy()
        piece[0] = piece[0] if bos is None else bos
        seen = forward(ReferenceModel(small), piece.tolist(), length)
        for layer, fit in fits.items():
            fit.add(seen.states[layer][1:], worth_keeping(seen, layer)[1:])
    for layer, fit in fits.items():
        assert np.corrcoef(found[layer], fit.direction())[0, 1] > 0.99


def forward(m: ReferenceModel, tokens: list[int], length: int) -> Seen:
    seen, attention = Seen(), PrunedReference(m, {}, "recent")
    x = m.weight("token_embd.weight")[tokens]
    for i in range(m.n_layer):
        block = f"blk.{i}"
        mixed, weights = attention._attention(m.norm(x, f"{block}.attn_norm.weight"), i, np.arange(len(tokens)))
        seen.looks[i] = np.square(weights[:, length:, :length]).mean(0).sum(0).astype(np.float32)
        x = x + mixed
        seen.states[i] = normalized(x[:length].astype(np.float32))
        x = x + m.swiglu(m.norm(x, f"{block}.ffn_norm.weight"), block)
        seen.outputs[i] = normalized(x[:length].astype(np.float32))
    return seen


def test_calibration_with_a_learned_score(
    small: Path, words_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written holds the directions; calibrating again, over old records, gives the same file.

    llama.cpp opens the model once, and no other copy of it.
    """
    opened: list[Path] = []

    def opening(path: Path) -> Model:
        opened.append(path)
        return Model(path)

    monkeypatch.setattr("agq_gguf.pruning.by_share.Model", opening)
    choice = PruneOptions(share=0.2, score="learned", prompts=2, threads=1, curve=(0.1,), max_layers=1)
    model, out = small.with_name("agq4.gguf"), tmp_path / "out.gguf"
    report = calibrate_pruning(model, out, calibration=words_file, choice=choice)
    assert opened == [model]
    assert report is not None and report.chosen.plan.reuse and report.chosen.plan.keep == 32
    assert report.chosen.saving == pytest.approx(0.2, abs=0.01)
    layer = report.chosen.plan.layers[0]
    held = {t.name: t.agq.pruning for t in inspect_file(out).tensors if t.agq and t.agq.pruning}
    assert list(held) == [report.carriers[layer]]
    record = held[report.carriers[layer]]
    assert isinstance(record.direction, Direction) and len(record.direction.codes) == 128
    assert record == replace(report.chosen.plan.records()[layer], direction=record.direction)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]
    before = out.read_bytes()
    calibrate_pruning(out, out, calibration=words_file, choice=choice)
    assert out.read_bytes() == before
