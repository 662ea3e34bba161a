"""Folders of cpp/ include one way only: from the entry points down to what knows nothing of the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CPP = Path(__file__).resolve().parent.parent / "cpp"

# From the top down. A file may include its own folder and those of later rows. Folders of one row are strangers.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("abi",),
    ("backend",),
    ("rewrite", "prune"),
    ("scores",),
    ("nodes",),
    ("graph",),
    ("kernels/x86", "kernels/arm"),
    ("kernels/portable",),
    ("kernels",),
    ("proof",),
    ("host",),
    ("format",),
    ("base",),
)
ROW = {folder: row for row, folders in enumerate(LAYERS) for folder in folders}
# Kernels are compiled for instruction sets that the CPU may lack. An inline function of another folder that they share
# with the rest of the program could end up in it.
ONLY = {folder: ("kernels", "kernels/portable", "format") for folder in ROW if folder.startswith("kernels")}


def may_include(folder: str, other: str) -> bool:
    if other == folder:
        return True
    return ROW[other] > ROW[folder] and (folder not in ONLY or other in ONLY[folder])


def includes(file: Path) -> Iterator[str]:
    yield from re.findall(r'^\s*#\s*include "([^"]+)"', file.read_text(encoding="utf-8"), re.MULTILINE)


def violations(root: Path) -> list[str]:
    found = []
    for file in sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cpp")):
        folder = file.parent.relative_to(root).as_posix()
        for name in includes(file):
            other = Path(name).parent.as_posix()
            if not (root / name).is_file():
                found.append(f"{folder}/{file.name} includes {name}, which is not a path from cpp/")
            elif not may_include(folder, other):
                found.append(f"{folder}/{file.name} includes {name}, but {folder} must not include {other}")
    return found


def test_every_folder_has_its_layer() -> None:
    folders = {path.parent.relative_to(CPP).as_posix() for path in CPP.rglob("*.[ch]*")}
    assert folders == set(ROW)


def test_includes_go_one_way() -> None:
    assert violations(CPP) == []


@pytest.mark.parametrize(
    ("file", "included"),
    [
        ("graph/dataflow.h", "prune/pruner.h"),
        ("rewrite/fusion.cpp", "prune/settings.h"),
        ("prune/pruner.cpp", "rewrite/fusion.h"),
        ("kernels/x86/avx2.cpp", "host/host.h"),
        ("kernels/kernel.h", "kernels/x86/x86_cpu.h"),
        ("host/host.cpp", "host.h"),
    ],
)
def test_a_broken_rule_is_seen(file: str, included: str, tmp_path: Path) -> None:
    for path in (file, included if "/" in included else f"host/{included}"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / file).write_text(f'#include "{included}"\n', encoding="utf-8")
    assert [line.split(" includes ")[0] for line in violations(tmp_path)] == [file]
