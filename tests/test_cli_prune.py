"""Calibrating pruning with a running model, and the commands around it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny_models
from command_line import process, run
from low_level import LowModel

import agq_gguf
from agq_gguf.cli import prune
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.pruning.calibrate import calibrate_pruning
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import STAYED, Work, work_of
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize

FAST = QuantizeOptions(threads=1, matrix=MatrixOptions(learn_codebook=False))
QUICK = ("--calibration", "--prompts", "2", "-t", "1", "-q")


@pytest.fixture(scope="module")
def unpruned(models: Path) -> Path:
    source = tiny_models.write_llama(models / "four-f16.gguf", n_layer=4)
    quantize(source, models / "four-agq4.gguf", options=FAST)
    return models / "four-agq4.gguf"


@pytest.fixture(scope="module")
def pruned(unpruned: Path, words_file: Path) -> Path:
    path = unpruned.with_name("four-pruned.gguf")
    choice = PruneOptions(share=0.25, score="received", keep=16, prompts=3, threads=1, curve=(0.1, 0.4))
    seen: list[tuple[str, int, int, str]] = []
    report = calibrate_pruning(
        unpruned, path, calibration=words_file, choice=choice, progress=lambda *step: seen.append(step)
    )
    assert report is not None and report.chosen.saving == pytest.approx(0.25, abs=0.01)
    assert all(done <= total for _, done, total, _ in seen) and {phase for phase, *_ in seen} == {"prune", "write"}
    return path


def work(path: Path) -> Work:
    with open_gguf(path) as reader:
        return work_of({name: tensor.n_elements for name, tensor in reader.tensors.items()})


def test_the_file_prunes_as_it_was_calibrated(pruned: Path, words: str) -> None:
    """What a fresh context does with the file's own records is what the curve in the metadata promises."""
    info = inspect_file(pruned).pruning
    assert info is not None and info.calibration == "words.txt, 3 prompts of 448 tokens"
    assert [round(p.saving, 2) for p in info.curve] == pytest.approx([0.1, 0.25, 0.4], abs=0.02)
    assert [p.kl for p in info.curve] == sorted(p.kl for p in info.curve) and info.curve[0].kl > 0
    model = LowModel(pruned)
    from agq_gguf.runtime.model import Model

    with Model(pruned, vocab_only=True) as vocabulary:
        tokens = vocabulary.tokenize(words)[: 4 * 448].reshape(4, 448)
    savings = {}
    for spec in ("file", info.curve[1].spec, info.curve[2].spec, "off"):
        left = []
        for prompt in tokens:
            with model.context(spec) as context:
                context.decode(prompt.tolist())
                left.append(np.array(agq_gguf.last_pruned(), np.int32))
        savings[spec] = work(pruned).saving(left)
    model.close()
    assert savings["file"] == savings[info.curve[1].spec] == pytest.approx(0.25, abs=0.05)
    assert savings[info.curve[2].spec] == pytest.approx(0.4, abs=0.05)
    assert savings["off"] == 0


def test_calibration_gives_the_same_file_again(pruned: Path, words_file: Path, tmp_path: Path) -> None:
    """Also from a file that is pruned already: its own records do not count."""
    choice = PruneOptions(share=0.25, score="received", keep=16, prompts=3, threads=1, curve=(0.1, 0.4))
    calibrate_pruning(pruned, tmp_path / "again.gguf", calibration=words_file, choice=choice)
    with open_gguf(pruned) as a, open_gguf(tmp_path / "again.gguf") as b:
        assert {k: v.raw for k, v in a.metadata.items()} == {k: v.raw for k, v in b.metadata.items()}


def test_command_in_place_and_removal(unpruned: Path, words_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(unpruned.read_bytes())
    how = ("--share", "0.2", "--layers", "1", "--score", "recent", *QUICK[:1], words_file, *QUICK[1:])
    shown = run("calibrate-pruning", path, *how)
    # With a reach, neighbours share their importance, so that the wanted number of tokens is met but for a few.
    assert re.search(r"\* +(19\.[5-9]|20\.[0-5])%", shown.stdout) and "1:t" in shown.stdout
    told = json.loads(run("inspect", path, "--json").stdout)
    assert told["pruning"]["saving"] == pytest.approx(0.2, abs=0.01) and len(told["pruning"]["curve"]) >= 3
    record = next(t["agq"]["pruning"] for t in told["tensors"] if t["name"] == "blk.1.attn_output.weight")
    assert record["score"] == "recent" and record["keep"] == 64
    assert "measured" not in run("inspect", path).stdout and "unpruned NLL" in run("inspect", path).stdout
    run("calibrate-pruning", path, "--share", "0")
    with open_gguf(path) as cleared, open_gguf(unpruned) as source:
        assert {k: v.raw for k, v in cleared.metadata.items()} == {k: v.raw for k, v in source.metadata.items()}
        assert all(bytes(cleared.raw(name)) == bytes(source.raw(name)) for name in source.tensors)
    assert inspect_file(path).pruning is None


def test_json(unpruned: Path, words_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    arguments = ("-o", out, "--share", "0.1", "--layers", "0,2", "--json")
    told = json.loads(run("calibrate-pruning", unpruned, *arguments, *QUICK[:1], words_file, *QUICK[1:]).stdout)
    assert told["carriers"] == {"0": "blk.0.attn_output.weight", "2": "blk.2.attn_output.weight"}
    assert told["chosen"]["saving"] == pytest.approx(0.1, abs=0.01)
    assert [layer for layer, _ in told["chosen"]["plan"]["thresholds"]] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--score", "recent"], 2, "the option score needs a share of the work to save; give one with --share"),
        (["--answers", "0"], 2, "0.01"),
        (
            ["--calibration", "{words}", "--share", "0.3", "--layers", "3"],
            2,
            "layer 3 cannot be a pruning layer; possible layers: 0, 1, 2",
        ),
        (
            ["--calibration", "{words}", "--share", "0.3", "--layers", "1,x"],
            2,
            "expected layer numbers such as 3,7, got '1,x'",
        ),
        (
            ["--calibration", "{words}", "--share", "0.3", "--score", "newest"],
            2,
            "score must be one of first, received, recent, learned, heads, got 'newest'",
        ),
        (["--calibration", "{words}", "--share", "0.8", "--keep", "255"], 2, "cannot save 80% of the work"),
        (["--calibration", "{short}", "--share", "0.3"], 2, "at least 512 are needed"),
        (["--calibration", "{missing}"], 2, "cannot be read"),
        (["--share", "0.95"], 2, "less than or equal to 0.9"),
    ],
)
def test_refusals(
    unpruned: Path, words_file: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "short.txt").write_text("the cat " * 20)
    places = {"words": words_file, "short": tmp_path / "short.txt", "missing": tmp_path / "no.txt"}
    given = [a.format(**places) for a in arguments]
    out = tmp_path / "out.gguf"
    result = run("calibrate-pruning", unpruned, "-o", out, "-t", "1", "-q", *given, code=code)
    assert message in re.sub(r"[│\s]+", " ", result.stderr)
    assert not out.exists()


def test_models_that_cannot_be_calibrated(llama_f16: Path, words_file: Path) -> None:
    before = llama_f16.read_bytes()
    result = run("calibrate-pruning", llama_f16, "--calibration", words_file, "-t", "1", "-q", code=3)
    assert "has no AGQ4 matrix" in result.stderr
    assert llama_f16.read_bytes() == before


def test_quantize_with_pruning(words_file: Path, tmp_path: Path) -> None:
    source = tiny_models.write_llama(tmp_path / "in.gguf", n_layer=2, n_ff=128, context=256)
    out = tmp_path / "out.gguf"
    how = ("--calibration", words_file, "--calibration-tokens", "512", "--quality", "fast", "-t", "1", "-q")
    shown = run("quantize", source, out, *how, "--prune", "0.2")
    assert "work saved" in shown.stdout
    info = inspect_file(out)
    assert info.pruning is not None and info.pruning.saving == pytest.approx(0.2, abs=0.01)
    assert run("verify", out).exit_code == 0
    run("quantize", source, out, "--calibration", "none", "--prune", "0.2", code=2)
    result = run("quantize", source, out, *how, "--prune", "0.9", code=2)
    assert "is complete, but drops no tokens" in result.stderr and inspect_file(out).pruning is None


PROMPT = " ".join(["the red key in the box and the dog went to the king who said"] * 12)


def test_generate_shows_what_was_dropped(pruned: Path) -> None:
    arguments = ("generate", pruned, "-p", PROMPT, "-n", "4", "-t", "1", "--temp", "0")
    shown = run(*arguments, "--prune", "1:0.5", "--show-pruned")
    prompt = shown.stdout[: shown.stdout.rindex("\n", 0, -1)]
    text = re.sub(r"\{1:([^}]*)\}", r"\1", prompt).replace("\n", " ")
    assert PROMPT in re.sub(" +", " ", text)
    dropped = "".join(re.findall(r"\{1:([^}]*)\}", prompt))
    assert 0.4 < len(dropped) / len(text) < 0.6
    assert re.search(r"4\d% of the work saved|3\d% of the work saved", shown.stderr)
    # What follows is what the model says without being asked to show it.
    assert shown.stdout.endswith(run(*arguments, "--prune", "1:0.5").stdout)
    masked = run(*arguments, "--prune", "mask,1:0.5", "--show-pruned")
    assert masked.stdout.startswith(prompt) and "mask saves no work" in masked.stderr
    unpruned = run(*arguments, "--prune", "off", "--show-pruned")
    assert "no token of this prompt was dropped" in unpruned.stderr and "{" not in unpruned.stdout
    assert "is not understood" in run(*arguments, "--prune", "1:2:3", code=2).stderr


@pytest.mark.parametrize("show_pruned", [[], ["--show-pruned"]])
@pytest.mark.parametrize(
    ("kind", "spec", "prompt", "reason"),
    [
        ("four", "1:0.5", "the red key", "it has 4 tokens, and fewer than 64 are not pruned"),
        ("four", "1:0.5; min=16", "the red key", "it has 4 tokens, and fewer than 16 are not pruned"),
        ("four", "1:0.5;score=learned", PROMPT, "the file has no learned score for layer 1"),  # what the plugin says
        ("four", "file", PROMPT, "the setting asks for none"),
        ("four", "1:0", PROMPT, "the setting asks for none"),
        ("mamba", "0:0.5", PROMPT, "recurrent and hybrid models are not pruned"),
        ("mamba", "0:0.5", "the red key", "recurrent and hybrid models are not pruned"),
        ("four", "1:0.5", PROMPT, ""),
        ("four", "off", PROMPT, ""),
    ],
)
def test_generate_says_why_nothing_was_dropped(
    kind: str, spec: str, prompt: str, reason: str, show_pruned: list[str], unpruned: Path, tmp_path: Path
) -> None:
    path = unpruned if kind == "four" else architectures.DECODERS[kind](tmp_path / "m.gguf")
    shown = run("generate", path, "-p", prompt, "-n", 2, "-t", 1, "--prune", spec, *show_pruned).stderr
    assert shown.count("\n") == (bool(reason) or bool(show_pruned))
    assert not reason or re.search(rf"no token of this prompt was dropped: .*{reason}", shown)


@pytest.mark.parametrize("spec", ["99:0.5", "3:0.5", "1:0.2,3:t0.5;score=recent", "mask, 4:0.5", "1:0.2, 99 : 0.5"])
def test_generate_refuses_layers_that_the_model_lacks(spec: str, unpruned: Path) -> None:
    refused = run("generate", unpruned, "-p", "the", "-t", 1, "--prune", spec, code=2).stderr
    assert "cannot be a pruning layer, because other layers must follow; the model has the layers 0 to 3" in refused


def test_marks_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    prune.show_prompt([("kept ", STAYED), ("gone ", 3), ("later", 12), ("\x1b[2J", STAYED)], 0.25)
    out, err = capsys.readouterr()
    assert "\x1b[9;31mgone" in out and "₃" in out and "₁₂" in out and "\x1b[2J" not in out
    assert "25% of the work saved" in err


def test_environment_of_a_process(pruned: Path) -> None:
    """`--prune` is stronger than AGQ_PRUNE, which is stronger than the file."""
    result = process("generate", pruned, "-p", PROMPT, "-n", "1", "-t", "1", "--show-pruned", "--prune", "off")
    assert result.returncode == 0 and "no token" in result.stderr
