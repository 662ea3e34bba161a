"""The plugin fills one slot of ggml's type table and leaves the memory around it as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command_line import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")

# Prints the protection of the slot's pages before and after the plugin is registered. With an argument, the pages are
# made writable first, as if the host had its table in plain data.
PROGRAM = """
import ctypes, mmap, sys
import llama_cpp
from agq_gguf import register

ggml = llama_cpp.llama_cpp._lib
traits = ggml.ggml_get_type_traits
traits.restype, traits.argtypes = ctypes.c_void_p, [ctypes.c_int]
slot, size = traits(38), traits(1) - traits(0)

def protection(address):
    for line in open("/proc/self/maps"):
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return line.split()[1]

if len(sys.argv) > 1:
    pages = slot & -mmap.PAGESIZE
    length = 2 * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(pages), ctypes.c_size_t(length), 3) == 0
ends = slot, slot + size - 1
before = [protection(address) for address in ends]
register()
assert ctypes.string_at(ctypes.cast(slot, ctypes.POINTER(ctypes.c_char_p))[0]) == b"agq4"
print(*before, *(protection(address) for address in ends))
"""


@pytest.mark.parametrize(("arguments", "expected"), [([], "r--p"), (["writable"], "rw-p")])
def test_the_pages_get_their_former_protection(arguments: list[str], expected: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [expected] * 4
