"""Names that the source tree defines, and names that its documents and comments mention; used by test_docs.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("agq_gguf", "benchmarks", "cmake", "cpp", "docs", "examples", "tests")
_WORD = re.compile(r"--[\w-]+|\w[\w-]*\.\w+|\w+")
_CXX_COMMENT = re.compile(r"//([^\n]*)|/\*.*?\*/", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:(?:\.|::|->)[A-Za-z_]\w*)*(?:\(.*\))?")
_OPTION = re.compile(r"(--?[A-Za-z][\w-]*)(?:[ =].*)?")


@cache
def files(*suffixes: str) -> tuple[Path, ...]:
    """Files of the source tree with one of these suffixes, in a fixed order."""
    found = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return tuple(sorted(path for path in found if "__pycache__" not in path.parts))


def documents() -> list[Path]:
    """All Markdown files that people read."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def _python_words(text: str) -> Iterator[str]:
    """Words of names and strings in Python code, without comments and docstrings."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                yield node.name
            if node.body and isinstance(node.body[0], ast.Expr):
                docstrings.add(id(node.body[0].value))
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield from _WORD.findall(value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, bytes):
                yield from _WORD.findall(node.value.decode("latin-1"))
            elif isinstance(node.value, str):
                yield from _WORD.findall(node.value)


@cache
def defined() -> frozenset[str]:
    """Words that occur in code, outside of comments and docstrings, and names of files and folders."""
    words: set[str] = set()
    for path in files(".py"):
        if path.name != "test_docs.py":  # it lists names that are not here
            words.update(_python_words(path.read_text(encoding="utf-8")))
    for path in files(".cpp", ".h", ".c"):
        words.update(_WORD.findall(_CXX_COMMENT.sub(" ", path.read_text(encoding="utf-8"))))
    for path in [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *files(".cmake")]:
        words.update(_WORD.findall(re.sub(r"#.*", "", path.read_text(encoding="utf-8"))))
    for path in files(".py", ".cpp", ".h", ".c", ".cmake", ".gguf", ".txt", ".md", ".svg", ".j2", ".stream"):
        words.update((path.name, path.stem, *path.relative_to(ROOT).parts))
    return frozenset(words | {path.name for path in ROOT.iterdir()})


def named_in_documents() -> Iterator[tuple[str, str]]:
    """Where a backquoted name stands, and the name; code blocks are left out."""
    for path in documents():
        if path.name == "commands.md":
            continue  # made from the program itself
        text = re.sub(
            r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), path.read_text(encoding="utf-8"), flags=re.S | re.M
        )
        for line in text.splitlines():
            if not line.startswith("    "):
                for name in re.findall(r"`([^`]+)`", line):
                    yield str(path.relative_to(ROOT)), name


def named_in_comments() -> Iterator[tuple[str, str]]:
    """The same for comments and docstrings in the code; in C++ comments, for every word with an underscore as well."""
    for path in files(".cpp", ".h"):
        if path.is_relative_to(ROOT / "cpp"):
            for line in path.read_text(encoding="utf-8").splitlines():
                if comment := re.search(r"//(.*)", line):
                    place = str(path.relative_to(ROOT))
                    yield from ((place, name) for name in re.findall(r"`([^`]+)`", comment[1]))
                    unquoted = re.sub(r"`[^`]*`", "", comment[1])
                    yield from ((place, name) for name in re.findall(r"(?<![\w.])[a-z]+_\w+", unquoted))
    for path in files(".py"):
        if path.is_relative_to(ROOT / "agq_gguf"):
            for line in path.read_text(encoding="utf-8").splitlines():
                for name in re.findall(r"`+([^`\n]+)`+", line):
                    yield str(path.relative_to(ROOT)), name


def is_defined(name: str, words: frozenset[str]) -> bool:
    """Whether a name exists in the tree; True for what is neither an identifier nor an option, such as `2^-e`."""
    if option := _OPTION.fullmatch(name):
        return option[1] in words or option[1].lstrip("-").replace("-", "_") in words
    if not _IDENTIFIER.fullmatch(name):
        return True
    plain = name.split("(")[0]
    if plain in words:
        return True
    parts = re.split(r"\.|::|->", plain)
    if len(parts) == 2 and parts[1] in ("cpp", "h", "json", "md", "py", "txt"):
        return False  # a file
    return all(part in words for part in parts)
