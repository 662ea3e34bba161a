"""The table of pruning scores in C++ and the registry in Python name the same scores by the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

from agq_gguf.format.pruning_record import SCORES

CPP = Path(__file__).resolve().parent.parent / "cpp"


def rows() -> dict[str, str]:
    """Name and number, as C++ writes it, of each row of the table in C++."""
    table = re.search(r"#define AGQ_SCORES\(row\) (.*)", (CPP / "scores" / "score.h").read_text(encoding="utf-8"))
    assert table
    found = {}
    for name in re.findall(r"row\((\w+)\)", table[1]):
        source = (CPP / "scores" / f"{name}.cpp").read_text(encoding="utf-8")
        row = re.search(rf'const score score_{name} = \{{\s*"(\w+)", (\w+),', source)
        assert row and row[1] == name, f"scores/{name}.cpp does not define score_{name}"
        found[name] = row[2]
    return found


def test_files_store_the_same_numbers() -> None:
    stored = {name: int(number) for name, number in rows().items() if number != "not_stored"}
    assert stored == {name: number for number, name in enumerate(SCORES)}
    blocks = (CPP / "format" / "blocks.h").read_text(encoding="utf-8")
    assert f"max_prune_score = {len(SCORES) - 1}," in blocks


def test_no_other_file_names_a_score() -> None:
    """But for the default: what depends on a score is a property of its row."""
    named = re.compile(r"score_(first|recent|learned|random)\b|prune_score::")
    elsewhere = [p for p in CPP.rglob("*.[ch]*") if p.parent.name not in ("scores", "format")]
    assert len(elsewhere) > 50
    assert not [p.name for p in elsewhere if named.search(p.read_text(encoding="utf-8"))]
