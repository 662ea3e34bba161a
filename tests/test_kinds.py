"""Files that are not what a command wants are named for what they are, with what to do."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from safetensors.torch import save_file

from agq_gguf.calibration.imatrix import load_imatrix
from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.import_hf import import_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 270885952\n"


def old_imatrix(name: bytes = b"blk.0.attn_q.weight") -> bytes:
    """As llama-imatrix --output-format dat writes it."""
    values = np.ones(64, "<f4").tobytes()
    return struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 3, 64) + values + struct.pack("<ii", 3, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "is a Git LFS pointer, which only names the file; fetch the file itself with: git lfs pull"),
        (old_imatrix(), "is an importance matrix in llama.cpp's old format (.dat); convert it with: llama-imatrix"),
        (b"PK\x03\x04" + bytes(60), "is a zip archive"),
        (b"\x1f\x8b" + bytes(60), "is compressed with gzip"),
        (b"<!DOCTYPE html><html><head>", "is a web page, so the download failed"),
        (b"tjgg" + bytes(60), "is a model in a format older than GGUF"),
        (b"something else altogether, of no known kind", "not a GGUF file"),
        (struct.pack("<Q", 1 << 60) + b'{"a": 1}' + bytes(30), "not a GGUF file"),  # a length beyond the file
        (struct.pack("<ii", 1, 1 << 30) + bytes(60), "not a GGUF file"),
        (old_imatrix(b"\xff\xfe\x00")[:60], "not a GGUF file"),
        (bytes(64), "not a GGUF file"),
    ],
)
def test_files_by_their_beginning(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        open_gguf(path)
    assert str(refused.value).startswith(f"{path}: {message}")
    assert "\n" not in str(refused.value)


def test_safetensors_is_not_gguf(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    shown = run("quantize", tmp_path / "model.safetensors", tmp_path / "out.gguf", code=2)
    assert "model.safetensors: is a safetensors file; give the folder of the checkpoint" in shown.stderr
    assert shown.stderr.count("\n") == 1 and not (tmp_path / "out.gguf").exists()


def test_an_old_imatrix_is_named(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(old_imatrix())
    with pytest.raises(InputError, match="old format"):
        load_imatrix(path)
    shown = run("quantize", small, tmp_path / "out.gguf", "--imatrix", path, code=2)
    assert "llama-imatrix --in-file OLD.dat -o NEW.gguf" in shown.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.filterwarnings("ignore")
def test_a_pointer_in_a_checkpoint(own_checkpoint: Any, tmp_path: Path, name: str) -> None:
    folder = own_checkpoint("opt")
    (folder / name).write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{name}: is a Git LFS pointer"):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_not_a_file(own_checkpoint: Any) -> None:
    shown = run("inspect", own_checkpoint("opt"), code=2)
    assert "is a Hugging Face checkpoint; `agq-gguf quantize` takes its folder" in shown.stderr
