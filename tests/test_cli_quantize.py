"""The command `quantize`: what it writes, says and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import architectures
import pytest
import tiny_models
import typer
from command_line import CONTROL, environment, run

from agq_gguf import errors
from agq_gguf.cli.options import parse_size
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization import options
from agq_gguf.quantization.options import QuantizeOptions


@pytest.fixture
def quick_options(monkeypatch: pytest.MonkeyPatch) -> None:
    options = partial(QuantizeOptions, matrix=MatrixOptions(learn_codebook=False))
    monkeypatch.setattr("agq_gguf.cli.quantize.QuantizeOptions", options)


@pytest.mark.usefixtures("quick_options")
def test_quantize(small: Path, words_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    shown = run("quantize", small, target, "--calibration", words_file, "-t", 1, "--memory", "1G")
    assert re.search(r"agq4 +7 +[\d.]+ KiB +4\.25", shown.stdout)
    kept = re.findall(
        r"f32 +(\d) +one-dimensional(?:; adjusted together with the matrices that follow)? ", shown.stdout
    )
    assert sum(map(int, kept)) == 3
    assert re.search(r"q8_0 +1 +output type is q8_0 +output\.weight", shown.stdout)
    assert "calibrate: 100%" in shown.stderr
    assert "quantize: 100%" in shown.stderr
    assert not CONTROL.search(shown.output)
    with open_gguf(target) as reader:
        assert reader.tensors["blk.0.ffn_up.weight"].type_name == "agq4"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.usefixtures("quick_options")
def test_quantize_without_calibration_warns_and_replaces(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("an older file")
    shown = run("quantize", small, target, "--calibration", "none", "-t", 1, "--quiet", "--output-type", "agq4")
    assert shown.stderr.startswith("warning: quantized without calibration")
    assert "output type is" not in shown.stdout
    with open_gguf(target) as reader:
        assert reader.tensors["output.weight"].type_name == "agq4"


def test_calibration_tokens_bound_the_text(small: Path, words_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    run("quantize", small, target, "--calibration", words_file, "-t", 1, "--quiet", "--calibration-tokens", 600)
    with open_gguf(target) as reader:
        tokens = int(re.findall(r"(\d+) tokens", reader.get("agq.calibration"))[0])
    assert 0 < tokens <= 600


def test_small_models_get_more_tokens(
    small: Path, words_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, best = QuantizeOptions(quality="fast"), QuantizeOptions(quality="best")
    sizes = (1_000_000, 268_000_000, 494_000_000, 8_000_000_000)
    assert [fast.tokens_for(n) for n in sizes] == [98304, 74626, 40485, 32768]
    assert best.tokens_for(1_000_000) == 32768
    assert QuantizeOptions(calibration_tokens=512).tokens_for(8_000_000_000) == 512

    monkeypatch.setattr(options, "TOKENS", 400)
    monkeypatch.setattr(options, "SMALL_TOKENS", 800)
    target = tmp_path / "out.gguf"
    run("quantize", small, target, "--calibration", words_file, "-t", 1, "--quiet")
    with open_gguf(target) as reader:
        assert 400 < int(re.findall(r"(\d+) tokens", reader.get("agq.calibration"))[0]) <= 800


def test_dry_run_as_json(small: Path, words_file: Path, tmp_path: Path) -> None:
    """What a script wants to know before it starts a run of hours."""
    shown = run("quantize", small, tmp_path / "out.gguf", "--dry-run", "--json", "--calibration", words_file, "-t", 1)
    plan = json.loads(shown.stdout)
    with open_gguf(small) as reader:
        assert [tensor["name"] for tensor in plan["tensors"]] == list(reader.tensors)
    kept = {tensor["name"]: tensor for tensor in plan["tensors"] if tensor["reason"]}
    assert (
        kept["output_norm.weight"]["type_name"] == "f32" and kept["output_norm.weight"]["reason"] == "one-dimensional"
    )
    assert plan["seconds"] > 0 and plan["memory_bytes"] > 400 << 20
    report = json.loads(run("quantize", small, tmp_path / "out.gguf", "--json", "--calibration", words_file).stdout)
    assert abs(plan["disk_bytes"] - report["n_bytes"]) < 100_000  # metadata
    assert plan["bits_per_weight"] < 20


def test_dry_run_writes_nothing(small: Path, tmp_path: Path) -> None:
    shown = run("quantize", small, tmp_path / "out.gguf", "--dry-run", "--output-type", "f16")
    assert re.search(r"blk\.0\.ffn_up\.weight +128 x 128 +f16 +agq4 +8\.5 KiB", shown.stdout)
    assert re.search(r"output\.weight +512 x 128 +f16 +f16 +128\.0 KiB +output type is f16", shown.stdout)
    assert "the run would need about" in shown.stdout and "of memory" in shown.stdout
    assert "nothing was written" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_whether_best_is_possible(small: Path, tmp_path: Path) -> None:
    def warned(source: Path, quality: str) -> str:
        return run("quantize", source, tmp_path / "out.gguf", "--dry-run", "--quality", quality).stderr

    assert warned(small, "best") == ""
    source = architectures.write_t5(tmp_path / "t5.gguf")
    assert warned(source, "balanced") == ""
    told = 'warning: falling back to quality "balanced": "best" does not support this model (it has an encoder and a'
    assert warned(source, "best").startswith(told)
    for model, quality in ((small, "best"), (source, "balanced")):
        shown = run("quantize", model, tmp_path / "out.gguf", "--dry-run", "--json", "--quality", "best")
        plan = json.loads(shown.stdout)
        assert plan["quality"] == quality and len(plan["warnings"]) == (quality == "balanced")


def test_no_command_is_suggested_that_will_refuse(small: Path, tmp_path: Path) -> None:
    fast = ("--quality", "fast", "--calibration", "none", "-t", 1)
    for write, generates in ((None, True), (tiny_models.write_bert, False), (architectures.write_t5, False)):
        source = write(tmp_path / "m.gguf") if write else small
        shown = run("quantize", source, tmp_path / "out.gguf", *fast).stdout
        assert ("agq-gguf generate" in shown) == generates and "bits per weight" in shown


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("same file", 2, "is the source model"),
        ("no folder", 5, "cannot write there"),
        ("output type", 2, "output type must be one of agq4, q6_K, q8_0, f16, f32, got 'q3_k'"),
        ("empty text", 2, "the text is empty"),
        ("missing text", 2, "none.txt"),
        ("missing imatrix", 2, "none.gguf"),
        ("quantized source", 2, "already quantized"),
    ],
)
def test_quantize_refuses(
    case: str, code: int, message: str, small: Path, llama_q8: Path, words_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("an older file")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases: dict[str, list[object]] = {
        "same file": [small, small],
        "no folder": [small, tmp_path / "nowhere" / "out.gguf"],
        "output type": [small, target, "--output-type", "q3_k"],
        "empty text": [small, target, "--calibration", empty],
        "missing text": [small, target, "--calibration", tmp_path / "none.txt"],
        "missing imatrix": [small, target, "--imatrix", tmp_path / "none.gguf"],
        "quantized source": [llama_q8, target],
    }
    assert message in run("quantize", *cases[case], "-t", 1, code=code).stderr
    assert target.read_text() == "an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "out.gguf"]


def test_quantize_without_torch(small: Path, tmp_path: Path) -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom agq_gguf.cli.app import main\nmain()\n"
    arguments = ["quantize", small, tmp_path / "out.gguf"]
    shown = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (shown.returncode, shown.stdout) == (4, "")
    wanted = errors.install_command("convert", "torch")
    assert shown.stderr == f"error: quantizing needs torch, which is not installed; install it with: {wanted}\n"


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4G", 4 << 30), ("512m", 512 << 20), ("1.5GiB", 3 << 29), ("64KB", 65536), ("1000", 1000), ("2T", 2 << 40)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4 Q", "1e9", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected a size such as 4G"):
        parse_size(text)


def test_quantize_as_json(small: Path, tmp_path: Path) -> None:
    shown = run("quantize", small, tmp_path / "out.gguf", "-t", 1, "--json", "--calibration-tokens", 512)
    found = json.loads(shown.stdout)
    assert found["paths"] == [str(tmp_path / "out.gguf")] and found["n_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert {tensor["type_name"] for tensor in found["tensors"]} >= {"agq4", "f32"}
    assert shown.stderr == ""
