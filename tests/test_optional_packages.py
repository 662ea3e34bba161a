"""Every command without the packages of the extras, as after `pip install .`: it works, or names what is missing."""

from __future__ import annotations

from pathlib import Path

from command_line import run_all
from typer import Context
from typer.main import get_command

import agq_gguf
from agq_gguf.cli.app import app

OPTIONAL = ("torch", "safetensors", "sentencepiece", "tokenizers", "transformers", "matplotlib", "plotly",
            "fastapi", "uvicorn")  # fmt: skip


def test_every_command(llama_agq: Path, llama_f16: Path, words_file: Path, tmp_path: Path) -> None:
    short: list[object] = ["-t", 1]
    needing: dict[str, list[object]] = {
        "quantize": [llama_f16, tmp_path / "q.gguf"],
        "import-hf": [tmp_path, tmp_path / "i.gguf"],
        "compare": [llama_f16, "-o", tmp_path / "c.json"],
        "demo": [],
        "serve": [llama_agq, "--port", 0],
        "report": [llama_agq, "-o", tmp_path / "r.html"],
    }
    working: dict[str, list[object]] = {
        "inspect": [llama_agq],
        "verify": [llama_agq],
        "evaluate": [llama_agq, "--reference", llama_f16, "--text", words_file, "-c", 32, "--chunks", 2, *short],
        "bench": [llama_agq, "-p", 8, "-n", 2, "-r", 1, *short],
        "generate": [llama_agq, "-p", "the red key", "-n", 4, *short],
        "chat": [llama_agq, "-n", 4, "--chat-format", "chatml", *short],
        "calibrate-pruning": [llama_agq, "-o", tmp_path / "p.gguf", "--calibration", words_file, "--prompts", 2,
                              "--share", 0.2, *short],
        "card": [llama_agq, "-o", tmp_path / "card.md"],
        "doctor": [],
        "backend-path": [],
    }  # fmt: skip
    group = get_command(app)
    known = group.list_commands(Context(group))  # type: ignore[attr-defined]
    assert {*needing, *working} == set(known)
    commands: list[list[object]] = [[name, *arguments] for name, arguments in {**needing, **working}.items()]
    for name, shown in run_all(commands, without=OPTIONAL).items():
        assert not shown.exception and "Traceback" not in shown.stderr, (name, shown)
        if name in needing:
            assert shown.code == 4 and "which is not installed; install it with: pip install" in shown.stderr, shown
        else:
            assert shown.code == 0, (name, shown)
    assert agq_gguf.inspect_file(tmp_path / "p.gguf").pruning is not None


def test_calibration_by_answers(tmp_path: Path, llama_agq: Path) -> None:
    """It needs no torch; a model that answers nothing is told so. The score `learned` needs it."""
    out, text = tmp_path / "out.gguf", tmp_path / "text.txt"
    text.write_text(
        " ".join(f"The {bird} of the old house sang to the moon." for bird in ("thrush", "robin", "wren", "finch") * 60)
    )
    common: list[object] = ["calibrate-pruning", llama_agq, "-o", out, "--calibration", text, "-t", 1]
    [answers] = run_all([[*common, "--prompts", 6]], without=OPTIONAL).values()
    assert answers.code == 2 and "questions about planted facts" in answers.stderr, answers
    [learned] = run_all([[*common, "--prompts", 2, "--share", 0.2, "--score", "learned"]], without=OPTIONAL).values()
    assert learned.code == 4 and "the score 'learned' needs torch, which is not installed" in learned.stderr, learned
    assert not out.exists()
