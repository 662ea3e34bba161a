"""Every command with every kind of model, float and AGQ4: a result that can be judged, or a refusal of one line.

Never a signal, a traceback, or an empty success. One process for each model runs all commands, so that an abort of
llama.cpp's shows as the end of that process.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import field_architectures
import pytest
import tiny_architectures
import tiny_models
from command_line import environment

pytestmark = pytest.mark.slow

WRITERS: dict[str, Callable[[Path | str], Path]] = {
    **tiny_architectures.DECODERS,
    **field_architectures.WRITERS,
    "bert": tiny_models.write_bert,
    "t5": tiny_architectures.write_t5,
    "deepseek2-mtp": lambda path: field_architectures.write_deepseek2(path, further=True),
    "gpt-oss-mxfp4": lambda path: field_architectures.write_gpt_oss(path, mxfp4=True),
}
SILENT = ("bert", "t5", "gemma-embedding")  # they predict no next token
REFUSALS = (2, 3, 4)  # exit codes of a refusal: input, format, host

# Runs commands in this process and prints, for each, its exit code, both streams and the exception.
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from agq_gguf.cli.app import app
runner = CliRunner()
for words in json.loads(sys.argv[1]):
    result = runner.invoke(app, words, input="the red key\\n")
    told = None if isinstance(result.exception, SystemExit) else result.exception
    shown = result.exit_code, result.stdout, result.stderr, repr(told) if told else ""
    print(json.dumps([words[0], *shown]), flush=True)
"""

Shown = dict[str, tuple[int, str, str, str]]


def run_all(commands: list[list[object]]) -> Shown:
    """Exit code, stdout, stderr and exception of each command, by its name."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, words], capture_output=True, text=True, check=False, timeout=600,
        env=environment(),
    )  # fmt: skip
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    ended = commands[len(found)][0] if len(found) < len(commands) else ""
    assert result.returncode == 0 and not ended, (
        f"{ended} ended the process: {result.returncode}, {result.stderr[-900:]}"
    )
    return {name: (code, out, err, exception) for name, code, out, err, exception in found}


def check(name: str, shown: tuple[int, str, str, str], generates: bool) -> None:
    """Whether one command did what it should."""
    code, out, err, exception = shown
    assert not exception and "Traceback" not in out + err, (name, shown)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code != 0), (name, shown)
    if code:
        assert code in REFUSALS, (name, shown)
        return
    # Four tokens of a random model may all be spaces, which is text; a model that says nothing gives an empty line.
    assert out.strip("\r\n") or name in ("quantize", "chat"), (name, shown)
    if name in ("generate", "chat", "evaluate", "bench"):
        assert generates, f"{name} should have refused: {out[:200]}"
    if name == "evaluate":
        found: dict[str, Any] = json.loads(out)
        assert math.isfinite(found["perplexity"]) and found["perplexity"] < 2 * found["reference_perplexity"], found
        assert 0 <= found["mean_kl"] < 1, found


@pytest.mark.parametrize("name", WRITERS)
def test_every_command(name: str, tmp_path: Path, words_file: Path) -> None:
    source = WRITERS[name](tmp_path / "float.gguf")
    ours = tmp_path / "agq4.gguf"
    quick: list[object] = ["--calibration", words_file, "--calibration-tokens", 512, "-t", 1]
    requantize = ["--allow-requantize"] if "mxfp4" in name else []
    shown = run_all([["quantize", source, ours, *quick, *requantize]])
    assert shown["quantize"][0] == 0, shown
    for path in (source, ours):
        reading: list[object] = ["-t", 1]
        commands: list[list[object]] = [
            ["inspect", path], ["verify", path],
            ["generate", path, "-p", "the red key", "-n", 4, *reading],
            ["chat", path, "-n", 4, "--chat-format", "chatml", *reading],
            ["evaluate", path, "--reference", source, "--text", words_file, "-c", 32, "--chunks", 2, "--json",
             *reading],
            ["bench", path, "-p", 8, "-n", 2, "-r", 1, *reading],
            ["quantize", path, tmp_path / "again.gguf", "--dry-run"],
            ["calibrate-pruning", path, "-o", tmp_path / "pruned.gguf", "--calibration", words_file, "--prompts", 2,
             "--share", 0.1, "--layers", 0, *reading],
            ["report", path, "-o", tmp_path / "r.html", "--text", words_file, "--tokens", 64, *reading],
        ]  # fmt: skip
        for command, result in run_all(commands).items():
            check(command, result, name not in SILENT)
        found = run_all(commands[2:5])
        if name in SILENT:
            assert all("predicts no next token" in result[2] for result in found.values()), found
        else:
            assert all(result[0] == 0 and len(result[1]) > 1 for result in found.values()), found
