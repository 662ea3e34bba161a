"""Says what a file is that is not GGUF, from its first bytes."""

from __future__ import annotations

import struct

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_NAME_BYTES = 256  # of the first entry in an old importance matrix
_BEGINNINGS = {
    LFS_POINTER: "a Git LFS pointer, which only names the file; fetch the file itself with: git lfs pull",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint; give a GGUF file, or the folder of the checkpoint",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"<!DOCTYPE": "a web page, so the download failed; download the file again",
    b"<html": "a web page, so the download failed; download the file again",
    b"tjgg": "a model in a format older than GGUF; convert the original checkpoint again",
    b"lmgg": "a model in a format older than GGUF; convert the original checkpoint again",
    b"fmgg": "a model in a format older than GGUF; convert the original checkpoint again",
}


def what_it_is(head: bytes, n_bytes: int) -> str:
    """What a file of `n_bytes` bytes is and what to do, from its first kilobyte; '' if nothing is recognized."""
    for beginning, found in _BEGINNINGS.items():
        if head.startswith(beginning):
            return found
    if _is_safetensors(head, n_bytes):
        return "a safetensors file; give the folder of the checkpoint to `agq-gguf quantize`, or convert it to GGUF"
    if _is_old_imatrix(head, n_bytes):
        return (
            "an importance matrix in llama.cpp's old format (.dat); convert it with: "
            "llama-imatrix --in-file OLD.dat -o NEW.gguf"
        )
    return ""


def _is_safetensors(head: bytes, n_bytes: int) -> bool:
    """Eight bytes with the length of a header, and a header in JSON."""
    if len(head) < 10:
        return False
    (length,) = struct.unpack_from("<Q", head)
    return 2 <= length <= n_bytes - 8 and head[8:9] == b"{" and head[9:10] in b'" }\n'


def _is_old_imatrix(head: bytes, n_bytes: int) -> bool:
    """A number of entries; the first has a name with its length, a number of calls and a number of values."""
    if len(head) < 8:
        return False
    entries, length = struct.unpack_from("<ii", head)
    if not (0 < entries < 1 << 20 and 0 < length <= _NAME_BYTES and len(head) >= 16 + length):
        return False
    calls, values = struct.unpack_from("<ii", head, 8 + length)
    name = head[8 : 8 + length]
    return name.isascii() and name.decode().isprintable() and calls >= 0 and 0 < 4 * values <= n_bytes
