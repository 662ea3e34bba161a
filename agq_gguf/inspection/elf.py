"""Reads from a program or library of Linux (ELF, 64 bits) what the dynamic linker would read. Nothing is executed."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from agq_gguf.errors import InputError

_MAGIC = b"\x7fELF"
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_GNU_HASH = 1, 4, 5, 6, 10, 0x6FFFFEF5
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_MAX_SYMBOLS = 1 << 22


@dataclass(frozen=True)
class Elf:
    """What a file tells the dynamic linker."""

    path: Path
    machine: int  # e_machine: 62 x86-64, 183 AArch64
    interpreter: str | None  # the dynamic linker that it names; None: a library, or linked statically
    needed: tuple[str, ...]  # names of the libraries that it depends on
    defined: frozenset[str]  # functions and data that others can use
    undefined: frozenset[str]  # those that it takes from others

    def contains(self, text: bytes) -> bool:
        """Whether these bytes are anywhere in the file."""
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(text) >= 0


def is_elf(path: Path) -> bool:
    """Whether a file begins as ELF files do."""
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def read_elf(path: Path) -> Elf:
    """What the file tells the dynamic linker. Raises InputError if it is no such file, or malformed."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != _MAGIC:
                raise InputError(f"{path}: not an ELF file")
            if data[4:6] != b"\x02\x01":
                raise InputError(f"{path}: an ELF file of 32 bits or big-endian; only 64 bits little-endian are read")
            return _Reader(path, data).read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise InputError(f"{path}: a malformed ELF file ({error})") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self._segments: list[tuple[int, int, int]] = []  # address, offset, bytes of what is loaded

    def read(self) -> Elf:
        machine = struct.unpack_from("<H", self._data, 18)[0]
        (begin,) = struct.unpack_from("<Q", self._data, 32)
        size, count = struct.unpack_from("<HH", self._data, 54)
        interpreter, dynamic = None, b""
        for i in range(count):
            kind, _, offset, address, _, n_bytes = struct.unpack_from("<IIQQQQ", self._data, begin + i * size)
            if kind == _PT_LOAD:
                self._segments.append((address, offset, n_bytes))
            elif kind == _PT_INTERP:
                interpreter = self._data[offset : offset + n_bytes].split(b"\0")[0].decode("utf-8", "replace")
            elif kind == _PT_DYNAMIC:
                dynamic = self._data[offset : offset + n_bytes]
        entries = list(struct.iter_unpack("<QQ", dynamic[: len(dynamic) // 16 * 16]))
        table = dict(reversed(entries))  # the first entry of each kind
        if _DT_STRTAB not in table:
            return Elf(self._path, machine, interpreter, (), frozenset(), frozenset())
        at = self._offset(table[_DT_STRTAB])
        strings = self._data[at : at + table.get(_DT_STRSZ, 0)]
        needed = tuple(_text(strings, value) for tag, value in entries if tag == _DT_NEEDED)
        defined: set[str] = set()
        undefined: set[str] = set()
        if _DT_SYMTAB in table:
            symbols = self._offset(table[_DT_SYMTAB])
            for i in range(1, self._symbol_count(table)):
                name, _, _, section, _, _ = _SYMBOL.unpack_from(self._data, symbols + i * _SYMBOL.size)
                (defined if section else undefined).add(_text(strings, name))
        return Elf(self._path, machine, interpreter, needed, frozenset(defined), frozenset(undefined))

    def _offset(self, address: int) -> int:
        """Where in the file the byte is that is loaded to an address."""
        for begin, offset, n_bytes in self._segments:
            if begin <= address < begin + n_bytes:
                return address - begin + offset
        raise ValueError(f"nothing is loaded to address {address:#x}")

    def _symbol_count(self, table: dict[int, int]) -> int:
        """Number of dynamic symbols, which only the hash tables tell."""
        if _DT_HASH in table:
            count = self._word(self._offset(table[_DT_HASH]) + 4)
        elif _DT_GNU_HASH in table:
            listed = self._count_gnu(self._offset(table[_DT_GNU_HASH]))
            # Without it: linkers put the names right behind the symbols.
            count = max(0, table[_DT_STRTAB] - table[_DT_SYMTAB]) // _SYMBOL.size if listed is None else listed
        else:
            raise ValueError("no hash table of the symbols")
        if count > _MAX_SYMBOLS:
            raise ValueError(f"{count} symbols")
        return count

    def _count_gnu(self, at: int) -> int | None:
        """The last symbol of the last chain is the last of all; None if nothing is defined, and so nothing listed."""
        n_buckets, first, n_filter = struct.unpack_from("<III", self._data, at)
        buckets = at + 16 + 8 * n_filter
        if n_buckets > _MAX_SYMBOLS:
            raise ValueError(f"{n_buckets} buckets of symbols")
        last = max(struct.unpack_from(f"<{n_buckets}I", self._data, buckets), default=0)
        if last < first:
            return None
        chains = buckets + 4 * n_buckets
        while not self._word(chains + 4 * (last - first)) & 1:
            last += 1
        return last + 1

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._data, at)[0])


def _text(strings: bytes, at: int) -> str:
    end = strings.index(b"\0", at)
    return strings[at:end].decode("utf-8", "replace")
