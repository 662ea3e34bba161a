"""The documents name files, commands, options and functions that exist, and keep to their form."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import source_names
from typer.testing import CliRunner

from agq_gguf.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = source_names.documents()
FOLDERS = "|".join(source_names.CODE)
LINE = 120
GUIDE_LINES = 120

# Names of other projects that no code here uses, by where they come from.
EXTERNAL = {
    "llama.cpp": (
        r"GGML_\w+", r"ggml_\w+", r"rpc_server::\w+", "rpc_tensor", "set_tensor", "offload_kqv",
        "simple", "--check-tensors", "gguf_init_from_file", "src1", "vec_dot", r"blk\.N\.ffn\.act\.scales",
    ),
    "ik_llama.cpp": ("-rtr",),
    "compilers and CMake": (r"-D\w+=.*", r"-f[a-z-]+"),
    "instructions of Arm and AMX": (
        "ld1", "ld4r", "ldp", "mla", "sdot", "smlal", "smmla", "smopa", "st2", "tbl", "tdpbu?su?d", "uadalp", "ushr",
        "vqtbl1q",
    ),
    "operating systems": ("arch_prctl", "GetModuleHandle", "sysctl"),
    "the terminal": ("NO_COLOR",),
    "placeholders": (r"\w*NAME\w*",),
}  # fmt: skip

# Comments that name what is gone; take an entry out when its comment is mended.


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]*\w)", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    missing += [link for link in linked if not (document.parent / link).exists()]
    assert not missing


def test_paths_in_the_code_exist() -> None:
    missing = {
        f"{relative(path)}: {name}"
        for path in source_names.files(".py", ".cpp", ".h", ".c", ".cmake")
        if path != Path(__file__)
        for name in re.findall(
            rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]*\.(?:md|py|h|cpp|txt|gguf))", path.read_text(encoding="utf-8")
        )
        if "NAME" not in name and not (ROOT / name).exists()
    }
    assert not missing


def test_headings_that_the_code_cites_exist() -> None:
    """The code says: docs/pruning.md, "Control"."""
    cited = [
        (relative(path), page, " ".join(re.sub(r"\n\s*(///?|#)?", " ", heading).split()))
        for path in source_names.files(".py", ".cpp", ".h")
        for page, heading in re.findall(r'(docs/[\w/-]+\.md), "([^"]+)"', path.read_text(encoding="utf-8"))
    ]
    assert len(cited) > 5
    missing = [
        (place, page, heading)
        for place, page, heading in cited
        if not re.search(rf"^#+ {re.escape(heading)}", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not missing


def missing_names(mentioned: list[tuple[str, str]]) -> set[str]:
    words = source_names.defined()
    external = re.compile("|".join(f"(?:{pattern})" for patterns in EXTERNAL.values() for pattern in patterns))
    return {
        f"{place}: {name}"
        for place, name in mentioned
        if not external.fullmatch(name) and not source_names.is_defined(name, words)
    }


def test_names_in_documents_exist() -> None:
    mentioned = list(source_names.named_in_documents())
    assert len(mentioned) > 500
    assert not missing_names(mentioned)


def test_names_in_comments_exist() -> None:
    mentioned = list(source_names.named_in_comments())
    assert len(mentioned) > 500
    missing = missing_names(mentioned)
    assert not missing


def test_external_names_are_needed() -> None:
    """The list of names of others holds nothing that is not mentioned, or that exists here."""
    words = source_names.defined()
    mentioned = [*source_names.named_in_documents(), *source_names.named_in_comments()]
    unknown = {name for _, name in mentioned if not source_names.is_defined(name, words)}
    patterns = [pattern for patterns in EXTERNAL.values() for pattern in patterns]
    assert not [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in unknown)]


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "commands.md"], ids=relative)
def test_lines_are_short(document: Path) -> None:
    """A row of a table cannot be broken; all else can."""
    lines = document.read_text(encoding="utf-8").splitlines()
    long = [i for i, line in enumerate(lines, 1) if len(line) > LINE and not line.startswith("|")]
    assert not long


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_guides_are_short(page: Path) -> None:
    if page.name != "commands.md":  # made from the program itself
        assert len(page.read_text(encoding="utf-8").splitlines()) < GUIDE_LINES


@cache
def helped(command: str) -> str:
    """What a command says of itself."""
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert shown.exit_code == 0, command
    return shown.output


def test_commands_and_options_exist() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    used = re.findall(r"agq-gguf ([a-z-]+)((?: [^\n`]*)?)", text)
    assert len(used) > 8
    for command, arguments in used:
        if command in ("and", "to", "runs", "turns"):
            continue
        assert helped(command)
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in helped(command), f"{command} {option}"


def test_every_environment_variable_is_in_the_table() -> None:
    """docs/environment.md names what the plugin, the package and the tests read; of ours, nothing that they do not."""
    reads = re.compile(
        r'(?:getenv|variable|environ(?:\.get)?|envvar)\W{1,4}"([A-Z][A-Z_]+)"|"([A-Z][A-Z_]+)" (?:not )?in os\.environ'
    )
    read = {
        name
        for path in source_names.files(".py", ".cpp", ".h")
        for found in reads.finditer(path.read_text(encoding="utf-8"))
        for name in found.groups()
        if name and name not in ("PYTHONPATH", "PATH")
    }
    # The plugin keeps the names of its variables in a table.
    plugin = (ROOT / "cpp" / "base" / "environment.cpp").read_text(encoding="utf-8")
    read |= set(re.findall(r'"(AGQ_[A-Z_]+)"', plugin))
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    table = {name for row in re.findall(r"^\| (`[^|]*)\|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(read) > 8
    missing, unread = read - table, {name for name in table if name.startswith("AGQ_")} - read
    assert not missing
    assert not unread


def test_ci_runs_the_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    after = readme.split("<!-- test command -->")[1].split("```")[1]
    assert re.search(r"^pip install .*\.\[test\].*&& pytest -n 2 --dist loadfile$", after, re.MULTILINE)
