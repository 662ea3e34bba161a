"""Texts that users give: one reader for all commands, with a clear refusal of what is no UTF-8 text."""

from __future__ import annotations

import gzip
import os
import threading
from pathlib import Path

import pytest
from command_line import run

from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.tensor_names import kind_of, layer_of, split_name
from agq_gguf.text import load_text, read_text

TEXT = "Grüße, the café is open. " * 40

NO_TEXTS = {
    "latin-1": (TEXT.encode("latin-1"), "byte 2 is 0xFC"),
    "cut in a character": (TEXT.encode()[:3], "byte 2 is 0xC3"),
    "UTF-16 with a mark": (TEXT.encode("utf-16"), "UTF-16"),
    "UTF-16, big end first": (("\ufeff" + TEXT).encode("utf-16-be"), "UTF-16"),
    "UTF-16 without a mark": ("plain".encode("utf-16-le"), "byte 1 is zero"),
    "UTF-32": (TEXT.encode("utf-32"), "UTF-32"),
    "gzip": (gzip.compress(TEXT.encode()), "gunzip"),
    "zip": (b"PK\x03\x04rest", "zip archive"),
    "Parquet": (b"PAR1rest", "Parquet"),
    "PDF": (b"%PDF-1.7", "PDF"),
    "a model": (b"GGUF\x03\x00\x00\x00", "GGUF model"),
    "a program": (b"\x7fELF\x02\x01\x01\x00\x00", "byte 7 is zero"),
    "nothing": (b" \n\t", "empty"),
}


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_what_is_no_text_is_named(kind: str, tmp_path: Path) -> None:
    content, message = NO_TEXTS[kind]
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_mark_of_utf_8_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_text(tmp_path / "t.txt") == TEXT


def test_every_command_refuses_before_it_works(small: Path, tmp_path: Path) -> None:
    latin, out = tmp_path / "latin1.txt", tmp_path / "out.gguf"
    latin.write_bytes(TEXT.encode("latin-1"))
    for arguments in (
        ("quantize", small, out, "--calibration", latin, "--prune", 0.3),
        ("quantize", small, out, "--calibration", latin, "--target-bpw", 6),
        ("evaluate", small, "--reference", small, "--text", latin),
        ("report", small, "--text", latin, "-o", tmp_path / "page.html"),
    ):
        assert "byte 2 is 0xFC" in run(*arguments, code=InputError.exit_code).stderr
    assert list(tmp_path.iterdir()) == [latin]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_once_and_serves_all_stages(small: Path, words: str, tmp_path: Path) -> None:
    pipe, plain = tmp_path / "pipe", tmp_path / "plain.txt"
    os.mkfifo(pipe)
    plain.write_text(words, encoding="utf-8")
    options = ("-t", 1, "--target-bpw", 8.4, "--calibration-tokens", 256)
    run("quantize", small, tmp_path / "from-file.gguf", "--calibration", plain, *options)
    writer = threading.Thread(target=pipe.write_text, args=(words, "utf-8"))
    writer.start()
    run("quantize", small, tmp_path / "from-pipe.gguf", "--calibration", pipe, *options)
    writer.join()
    # Metadata names the text; everything else is the same.
    with open_gguf(tmp_path / "from-file.gguf") as one, open_gguf(tmp_path / "from-pipe.gguf") as other:
        assert all(one.raw(name) == other.raw(name) for name in one.tensors)


def test_strings_are_kept_as_pieces() -> None:
    loaded = load_text(iter(["a", "b"]))
    assert list(loaded) == ["a", "b"] and loaded.whole == "ab" and loaded.name == "text"
    assert load_text(loaded) is loaded


def test_names_of_tensors() -> None:
    assert layer_of("blk.12.ffn_up.weight") == 12 and layer_of("output.weight") is None and layer_of("blk.x.y") is None
    assert split_name("blk.0.a.b.c") == (0, "a.b.c") and split_name("token_embd.weight") == (None, "token_embd.weight")
    assert kind_of("blk.7.attn_k.weight") == "attn_k" and kind_of("output.weight") == "output"
