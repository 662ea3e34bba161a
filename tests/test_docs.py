"""The documents name files that exist and commands that the program has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agq_gguf.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "agq_gguf|cpp|cmake|tests|docs|benchmarks|examples"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]*\w)", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    missing += [link for link in linked if not (document.parent / link).exists()]
    assert not missing


def test_commands_and_options_exist() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    used = re.findall(r"agq-gguf ([a-z-]+)((?: [^\n`]*)?)", text)
    assert len(used) > 8
    for command, arguments in used:
        if command in ("and", "to", "runs", "turns"):
            continue
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
        assert shown.exit_code == 0, command
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in shown.output, f"{command} {option}"


def test_ci_runs_the_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    after = readme.split("<!-- test command -->")[1].split("```")[1]
    assert re.search(r"^pip install .*\.\[test\].*&& pytest$", after, re.MULTILINE)
