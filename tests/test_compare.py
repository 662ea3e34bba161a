"""`compare` and `card`: files of many types made, measured and shown; a run that was stopped goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run

from agq_gguf.comparison import run as comparison
from agq_gguf.comparison.candidates import DEFAULT, Candidate, candidates
from agq_gguf.comparison.card import card
from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization import pipeline
from agq_gguf.quantization.budget import costs
from agq_gguf.quantization.guidance import Group
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.text import load_text

TYPES = "q4_0,q8_0,agq4:small,agq4:balanced,agq4:6.0"
QUICK = ("--quality", "fast", "--chunks", 2, "-r", 1, "-p", 32, "-n", 4, "--threads", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    path = tmp_path_factory.mktemp("compare") / "measured.txt"
    path.write_text(words[::-1], encoding="utf-8")
    return path


def test_compare(small: Path, words_file: Path, text: Path, tmp_path: Path) -> None:
    folder, picture = tmp_path / "made", tmp_path / "picture.svg"
    command = ("compare", small, "-o", folder, "--types", TYPES, "--calibration", words_file, "--text", text, *QUICK)
    found = json.loads(run(*command, "--json", "--plot", picture).stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["source", *TYPES.split(",")] and found["positions"] == 2 * 255
    assert rows["agq4:small"]["file_bytes"] < rows["agq4:balanced"]["file_bytes"] < rows["source"]["file_bytes"]
    assert rows["agq4:6.0"]["bits_per_weight"] <= 6.0
    assert 0 < rows["q8_0"]["mean_kl"] < rows["q4_0"]["mean_kl"]
    assert all(row["prompt_speed"] > 0 and row["generation_speed"] > 0 for row in rows.values())
    for row in found["rows"][1:]:
        info = inspect_file(row["path"])
        assert (info.file_bytes, info.bits_per_weight) == (row["file_bytes"], row["bits_per_weight"])
    assert "agq4:small" in picture.read_text("utf-8")
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.gguf")}
    shown = run(*command, "--threads", 2).stdout  # everything is finished but the speed
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.gguf")} == made
    assert f"| q4_0 | {rows['q4_0']['file_bytes'] / 1e6:.1f} |" in shown and "| **agq4:small** |" in shown
    assert f"{1000 * rows['q4_0']['mean_kl']:.2f}" in shown

    saved, written = tmp_path / "comparison.json", tmp_path / "README.md"
    saved.write_text(json.dumps(found), encoding="utf-8")
    model = folder / "agq4-small.gguf"
    run("card", model, "-o", written, "--base-model", "someone/tiny", "--license", "mit", "--compare", saved)
    _, front, body = written.read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/tiny", "base_model_relation": "quantized", "license": "mit", "library_name": "gguf",
        "pipeline_tag": "text-generation", "quantized_by": "agq-gguf", "tags": ["gguf", "agq4", "llama.cpp"],
    }  # fmt: skip
    assert "agq4-small.gguf" in body and "| q4_0 |" in body
    assert "cannot be written: File exists" in run("card", model, "-o", written, code=5).stderr
    wrong = run("card", model, "-o", tmp_path / "x.md", "--compare", words_file, code=2).stderr
    assert "expected the output of `agq-gguf compare --json`" in wrong


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_files_of_one_model_share_matrices(
    quality: str, llama_f16: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as alone, with the statistics of only those groups that are new; `best` shares no matrices.

    What tensors cost in coarser types is found once for all budgets.
    """
    rounded: list[str] = []
    found: list[object] = []
    by_gradients = costs.by_gradients

    def counted(*arguments: Any, **more: Any) -> costs.Damage:
        found.append(arguments)
        return by_gradients(*arguments, **more)

    monkeypatch.setattr(costs, "by_gradients", counted)
    original = pipeline._quantize_group

    def spy(reader: Reader, group: Group, options: MatrixOptions) -> object:
        rounded.extend(group.names)
        return original(reader, group, options)

    monkeypatch.setattr(pipeline, "_quantize_group", spy)
    first = QuantizeOptions(quality=quality, threads=1, tune=False, calibration_tokens=1024)
    sizes = [first, replace(first, target_bpw=6.0), replace(first, output_type="agq4", embedding_type="agq4")]
    sizes.append(replace(first, target_bpw=6.5))
    counts = []
    for number, options in enumerate(sizes):
        files = []
        for name, changed in (("alone", options), ("shared", replace(options, shared=str(tmp_path / "matrices")))):
            rounded.clear()
            quantize(llama_f16, tmp_path / name, calibration=[words], options=changed)
            files.append((tmp_path / name).read_bytes())
            counts.append(len(rounded))
        assert files[0] == files[1], number
    assert len(found) == 3  # alone twice, and once for both others
    alone, shared = counts[::2], counts[1::2]
    if quality == "best":
        assert alone == shared and not (tmp_path / "matrices" / "matrices").exists()
    else:
        assert shared[0] == alone[0] > 10 and shared[1] < alone[1] and shared[2] <= 2


def test_the_card_of_an_encoder(bert_f16: Path, tmp_path: Path) -> None:
    quantize(bert_f16, tmp_path / "bert.gguf", options=QuantizeOptions(quality="fast", threads=1))
    _, front, body = card(tmp_path / "bert.gguf").split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "feature-extraction"
    assert "embedding=True" in body and "llama-embedding -m bert" in body


def test_a_card_is_about_agq4(small: Path, llama_q8: Path, tmp_path: Path) -> None:
    for model in (small, llama_q8):
        refused = run("card", model, "-o", tmp_path / "README.md", code=2).stderr
        assert "holds no AGQ4 tensor" in refused and refused.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama_agq", "is an AGQ4 model already; start from the file that it was made from"),
        ("llama_q8", "is already quantized (q8_0); start from the F32, F16 or BF16 file of the model\n"),
        ("bert_f16", "predicts no next token: it is an encoder"),
    ],
)
def test_sources_that_cannot_be_compared(
    kind: str, message: str, words_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Refused at once, before a file is made."""
    source = request.getfixturevalue(kind)
    refused = run("compare", source, "-o", tmp_path / "made", "--calibration", words_file, *QUICK, code=2).stderr
    assert message in refused and refused.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short(small: Path, tmp_path: Path) -> None:
    """It is refused before the first file is made."""
    short = tmp_path / "short.txt"
    short.write_text("the red key")
    refused = run("compare", small, "--text", short, "-o", tmp_path / "out", *QUICK, code=2).stderr
    assert "must have at least" in refused
    assert not (tmp_path / "out").exists()


def test_a_stopped_comparison_goes_on(
    small: Path, words_file: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished is not made again; another text makes it again; nothing stays if it shall not."""
    made: list[str] = []
    make = Candidate.make

    def counted(self: Candidate, *arguments: object) -> None:
        if self.name == stop_at:
            raise KeyboardInterrupt
        made.append(self.name)
        make(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Candidate, "make", counted)

    def setup(measured: Path, *, keep: bool = True) -> comparison.Setup:
        chosen = candidates(["q4_0", "q8_0"], QuantizeOptions(quality="fast"))
        learn = load_text(words_file)
        return comparison.Setup(chosen, learn, load_text(measured), 1, repetitions=0, threads=1, keep_files=keep)

    stop_at = "q8_0"
    with pytest.raises(KeyboardInterrupt):
        comparison.compare(small, tmp_path, setup(text))
    stop_at = ""
    first = comparison.compare(small, tmp_path, setup(text))
    assert made == ["q4_0", "q8_0"] and all(row.prompt_speed is None for row in first.rows)
    assert comparison.compare(small, tmp_path, setup(text)) == first and len(made) == 2
    comparison.compare(small, tmp_path, setup(words_file, keep=False))
    assert made == ["q4_0", "q8_0"] * 2
    assert [path.name for path in tmp_path.iterdir()] == [comparison.STATE]


def test_names_of_candidates() -> None:
    found = candidates([*DEFAULT, "AGQ4:5.5"], QuantizeOptions())
    assert len(found) == len(DEFAULT) + 1 and len({c.file_name for c in found}) == len(found)
    assert found[-1].options is not None and found[-1].options.target_bpw == 5.5
    for name in ("agq4", "agq4:tiny", "agq4:3", "agq4:nan", "q9_0", ""):
        with pytest.raises(InputError, match="a type must be one of"):
            candidates([name], QuantizeOptions())
