"""The gguf package's own scripts on AGQ4 files, as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment
from command_line import run as run_command

from agq_gguf.errors import EditedError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.inspection.verify import verify

HOSTILE = sorted((Path(__file__).parent / "hostile").glob("*.gguf"))


def run(*arguments: object, code: int = 0, module: str = "agq_gguf.gguf_tools") -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture
def model(llama_agq: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(llama_agq, tmp_path / "model.gguf"))


def test_the_scripts_alone_do_not_know_the_type(model: Path) -> None:
    """The reason for all this; if it fails one day, the module can go."""
    assert "38) is not a valid" in run(model, code=1, module="gguf.scripts.gguf_dump").stderr


def test_dump(model: Path) -> None:
    assert "256,   128,     1,     1 | AGQ4    | blk.1.ffn_down.weight" in run("dump", model).stdout
    found = json.loads(run("dump", "--json", model).stdout)
    assert found["tensors"]["blk.0.attn_q.weight"]["type"] == "AGQ4"
    assert "AGQ4" in run("dump", model, "--markdown").stdout


def test_new_metadata(model: Path, tmp_path: Path) -> None:
    """Only the metadata differs, and `verify` says so."""
    target = tmp_path / "renamed.gguf"
    run("new-metadata", "--general-name", "another name", model, target)
    with open_gguf(model) as before, open_gguf(target) as after:
        assert after.get("general.name") == "another name" != before.get("general.name")
        assert list(after.tensors) == list(before.tensors)
        assert all(bytes(after.raw(name)) == bytes(before.raw(name)) for name in before.tensors)
    assert verify(model).problems == []
    assert verify(target).only_edited
    assert "edited" in run_command("verify", target, code=EditedError.exit_code).stderr
    run_command("generate", target, "-p", "the", "-n", 2, "-t", 1)


def test_set_metadata(model: Path) -> None:
    run("set-metadata", "--force", model, "tokenizer.ggml.bos_token_id", 2)
    with open_gguf(model) as reader:
        assert reader.get("tokenizer.ggml.bos_token_id") == 2
    assert verify(model).only_edited
    run("set-metadata", "--force", model, "tokenizer.ggml.bos_token_id", 1)
    assert verify(model).problems == []


def test_usage(model: Path) -> None:
    assert "dump          show metadata" in run(code=2).stdout
    assert "new-metadata" in run("--help").stdout
    assert "usage: python -m agq_gguf.gguf_tools dump [-h]" in run("dump", "--help").stdout
    assert run("hash", model, code=2).stderr.startswith("error: there is no script 'hash'; known are dump")
    assert run("set-metadata", model, "no.such.key", 1, code=1).stderr.endswith("not found\n")


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_malformed_files(path: Path) -> None:
    error = run("dump", path, code=2).stderr
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is a text, not a model, and long enough to have a header")
    for name in ("text.gguf", "none.gguf"):
        error = run("dump", tmp_path / name, code=2).stderr.splitlines()[-1]
        assert error.startswith("error: ")
