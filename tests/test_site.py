"""The documentation is true: pages made from the program are up to date, the site builds, its snippets run."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from command_line import environment

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_command_reference_is_up_to_date() -> None:
    wanted = load(DOCS / "make_commands.py").reference()
    assert (DOCS / "commands.md").read_text(encoding="utf-8") == wanted, "run: python docs/make_commands.py"


def test_figures_are_up_to_date() -> None:
    module = load(DOCS / "figures" / "make_figures.py")
    assert {path.stem for path in (DOCS / "figures").glob("*.svg")} == set(module.FIGURES)
    for name, draw in module.FIGURES.items():
        drawn = (DOCS / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == draw(), "run: python docs/figures/make_figures.py"


def test_the_site_builds(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    written = {path.relative_to(DOCS) for path in DOCS.rglob("*.md")}
    site = tmp_path / "site"
    assert {path.with_suffix(".html") for path in written} <= {path.relative_to(site) for path in site.rglob("*.html")}
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted(path.as_posix() for path in written)


def test_messages_in_troubleshooting_are_ours() -> None:
    """Each quoted message stands in the sources, but for those of the host."""
    sources = "\n".join(
        path.read_text(encoding="utf-8") for folder in ("agq_gguf", "cpp") for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    )  # fmt: skip
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # messages in several literals
    theirs = (
        "Failed to load model from file",
        "invalid ggml type",
        "type 38",
        "invalid tensor type received",
        "has invalid data",
        "found tensors with invalid data",
    )
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 25
    missing = [m for row in rows for m in re.findall(r"`([^`]+)`", row) if m not in sources and m not in theirs]
    assert not missing


def snippets(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


PAGES = [path.name for path in sorted(DOCS.glob("*.md")) if path.name != "commands.md"]


@pytest.mark.parametrize(
    ("page", "number"), [(page, i) for page in PAGES for i in range(len(snippets(page, "python")))]
)
def test_python_snippets(
    page: str, number: int, llama_f16: Path, llama_agq: Path, words_file: Path, tmp_path: Path
) -> None:
    shutil.copy(llama_f16, tmp_path / "model-f16.gguf")
    # Pruning works on any model; in this one layer 3 is followed by others.
    model = ROOT / "agq_gguf" / "data" / "story-f16.gguf" if page == "pruning.md" else llama_agq
    shutil.copy(model, tmp_path / "model-agq4.gguf")
    shutil.copy(words_file, tmp_path / "text.txt")
    result = subprocess.run(
        [sys.executable, "-c", snippets(page, "python")[number]],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment(), timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    if page == "pruning.md":
        layers = ast.literal_eval(result.stdout)
        assert 0.4 < layers.count(3) / len(layers) <= 0.5 and layers.count(3) + layers.count(-1) == len(layers)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_tutorial(tmp_path: Path) -> None:
    """The commands of the tutorial, one after the other, as they stand there."""
    (tmp_path / "bin").mkdir()
    for name, command in (("agq-gguf", "-m agq_gguf"), ("python", "")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        program.chmod(0o755)
    (tmp_path / "work").mkdir()
    script = "set -e\n" + "\n".join(snippets("tutorial.md", "sh"))
    result = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path / "work", timeout=900,
        env=environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "intact (" in result.stdout
    assert "Ella hid the brown lamp under the bed." in result.stdout
    assert "Finn liked to eat honey cake." in result.stdout
    assert (tmp_path / "work" / "report.html").stat().st_size > 1 << 20
