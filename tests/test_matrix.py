"""Every command with every kind of model, float and AGQ4: a result that can be judged, or a refusal of one line.

Never a signal, a traceback, or an empty success. One process for each model runs all commands, so that an abort of
llama.cpp's shows as the end of that process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
from command_line import Shown, run_all

pytestmark = pytest.mark.slow

WRITERS: dict[str, Callable[[Path | str], Path]] = {
    **architectures.DECODERS,
    **architectures.FIELD,
    **architectures.ENCODERS,
    **architectures.EMBEDDERS,
    "deepseek2-mtp": lambda path: architectures.write_deepseek2(path, further=True),
    "gpt-oss-mxfp4": lambda path: architectures.write_gpt_oss(path, mxfp4=True),
}
SILENT = architectures.ENCODERS  # they predict no next token
REFUSALS = (2, 3, 4)  # exit codes of a refusal: input, format, host


def check(name: str, shown: Shown, generates: bool) -> None:
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
    if name in ("generate", "chat", "bench"):
        assert generates, f"{name} should have refused: {out[:200]}"
    if name == "evaluate":
        found: dict[str, Any] = json.loads(out)
        if "perplexity" in found:
            assert math.isfinite(found["perplexity"]) and found["perplexity"] < 2 * found["reference_perplexity"], found
            assert 0 <= found["mean_kl"] < 1, found
        else:
            assert 0 <= found["mean_distance"] < 1, found


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
            assert (found.pop("evaluate")[0] == 0) == (name in architectures.EMBEDDERS)
            assert all("predicts no next token" in result[2] for result in found.values()), found
        else:
            assert all(result[0] == 0 and len(result[1]) > 1 for result in found.values()), found
