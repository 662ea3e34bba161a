"""Presets: names for the sizes of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from command_line import run

from agq_gguf import QuantizeOptions, inspect_file, quantize, with_preset
from agq_gguf.errors import InputError
from agq_gguf.quantization.presets import PRESETS


def test_presets_set_what_is_at_its_default() -> None:
    assert with_preset(QuantizeOptions(), "balanced") == QuantizeOptions()
    small = with_preset(QuantizeOptions(output_type="q6_K", quality="fast"), "small")
    assert (small.output_type, small.embedding_type, small.quality) == ("q6_K", "agq4", "fast")
    near = with_preset(QuantizeOptions(), "near-lossless")
    assert (near.target_bpw, near.target_types) == (7, ("q8_0",))
    assert with_preset(QuantizeOptions(target_bpw=5), "near-lossless") == QuantizeOptions(target_bpw=5)
    with pytest.raises(InputError, match="preset must be one of small, balanced, near-lossless, got 'tiny'"):
        with_preset(QuantizeOptions(), "tiny")


def test_a_report_knows_the_size_of_small(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    tiny_models.write_llama(source)
    sizes = {}
    for name in PRESETS:
        options = with_preset(QuantizeOptions(quality="fast"), name)
        report = quantize(source, tmp_path / f"{name}.gguf", options=options)
        sizes[name] = (report.paths[0].stat().st_size, report.small_bytes)
    assert sizes["small"][0] < sizes["balanced"][0] < sizes["near-lossless"][0]
    assert sizes["small"][1] == 0  # nothing smaller to recommend
    for name in ("balanced", "near-lossless"):  # headers differ by a few bytes of metadata
        assert sizes[name][1] == pytest.approx(sizes["small"][0], abs=1024)


def test_the_command_names_the_smaller_preset(tmp_path: Path) -> None:
    source, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    tiny_models.write_llama(source)
    fast = ("--quality", "fast", "--calibration", "none")
    assert "with --preset small: " in run("quantize", source, out, *fast).stdout
    assert "--preset small" not in run("quantize", source, out, *fast, "--preset", "small").stdout
    types = {t.type for t in inspect_file(out).tensors if len(t.shape) > 1}
    assert types == {"agq4"}
    run("quantize", source, out, *fast, "--preset", "small", "--output-type", "q8_0")
    assert {t.type for t in inspect_file(out).tensors if t.name == "output.weight"} == {"q8_0"}
    assert "is not one of" in run("quantize", source, out, "--preset", "tiny", code=2).stderr
