from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from agq_gguf import demo
from agq_gguf.errors import HostError
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, llama_f16: Path, words_file: Path) -> None:
    """The demo on a random model, with as little work as possible."""
    monkeypatch.setattr(demo, "MODEL", llama_f16)
    monkeypatch.setattr(demo, "CALIBRATION", words_file)
    monkeypatch.setattr(demo, "EVALUATION", words_file)
    options = partial(QuantizeOptions, calibration_tokens=1024, matrix=MatrixOptions(learn_codebook=False))
    monkeypatch.setattr("agq_gguf.quantization.options.QuantizeOptions", options)
    for name, value in (("_CHUNKS", 1), ("_PROMPT_TOKENS", 32), ("_GENERATED_TOKENS", 4), ("_TEXT_TOKENS", 8)):
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("tiny_demo")
def test_every_model_has_its_row(tmp_path: Path) -> None:
    phases: list[str] = []
    shown = demo.run(tmp_path, threads=1, progress=lambda phase, done, total, what: phases.append(phase))
    f16, q4, agq = shown.rows
    assert [row.name for row in shown.rows] == ["F16", "Q4_0", "AGQ4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["story-agq4.gguf", "story-q4_0.gguf"]
    assert f16.mean_kl == f16.mean_kl_error == 0 < agq.mean_kl < q4.mean_kl
    assert f16.top1_agreement == 1 > q4.top1_agreement > 0
    assert f16.bits_per_weight > 16 > 6 > agq.bits_per_weight
    for row in shown.rows:
        assert row.prompt_speed is not None and row.generation_speed is not None
        assert min(row.perplexity, row.prompt_speed, row.generation_speed) > 0
    assert shown.text.startswith(demo.PROMPT)
    assert {"calibrate", "quantize", "evaluate Q4_0", "evaluate AGQ4", "bench"} == set(phases)


def test_package_without_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "EVALUATION", tmp_path / "evaluation.txt")
    with pytest.raises(HostError, match=r"has no .*evaluation\.txt"):
        demo.run(tmp_path)


@pytest.mark.slow
def test_packaged_model(tmp_path: Path, packaged_model: Path) -> None:
    assert packaged_model.stat().st_size < 4_000_000
    shown = demo.run(tmp_path, threads=1)
    f16, q4, agq = shown.rows
    assert max(agq.file_bytes, q4.file_bytes) < 0.33 * f16.file_bytes
    assert agq.mean_kl < 0.6 * q4.mean_kl
    # Perplexities differ by chance: by about 0.03% on a text of this length, whichever model is nearer to F16.
    assert agq.perplexity < 1.001 * q4.perplexity
    assert len(shown.text) > 2 * len(demo.PROMPT)
