"""Messages about packages that are not installed name a pip command that works without an index of this package."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from agq_gguf.errors import HostError, install_command, missing_package

METADATA = [
    "numpy>=1.24",
    'torch>=2.2; extra == "convert"',
    "safetensors>=0.4 ; extra == 'convert'",
    'agq-gguf[convert]; extra == "report"',
    'jinja2>=3.1; python_version >= "3.10" and extra == "report"',
    'llama-cpp-python[server]; extra == "serve"',
    'agq-gguf[report,serve]; extra == "test"',
]


@pytest.fixture
def requires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: METADATA)


@pytest.mark.usefixtures("requires")
@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ("convert", '"torch>=2.2" "safetensors>=0.4"'),
        ("report", '"torch>=2.2" "safetensors>=0.4" "jinja2>=3.1"'),
        ("serve", '"llama-cpp-python[server]"'),
        ("test", '"torch>=2.2" "safetensors>=0.4" "jinja2>=3.1" "llama-cpp-python[server]"'),
    ],
)
def test_command_of_an_extra(extra: str, wanted: str) -> None:
    assert install_command(extra, "x") == f"pip install {wanted}"


def test_command_of_a_tree_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_command("convert", "torch") == "pip install torch"


@pytest.mark.usefixtures("requires")
def test_message() -> None:
    command = 'pip install "llama-cpp-python[server]"'
    found = missing_package(
        "serving", ModuleNotFoundError("No module named 'uvicorn.config'", name="uvicorn.config"), "serve"
    )
    assert isinstance(found, HostError)
    assert str(found) == f"serving needs uvicorn, which is not installed; install it with: {command}"
    found = missing_package("serving", ImportError("libx.so: not found", name="uvicorn"), "serve")
    assert str(found) == (
        f"serving needs uvicorn, which cannot be imported (libx.so: not found); install it with: {command}"
    )


def test_pip_understands_the_commands() -> None:
    """With the metadata of the installed package, and with names that are installed here: nothing is downloaded."""
    commands = [install_command(extra, "") for extra in ("convert", "plot", "report", "serve")]
    found = [command.removeprefix("pip install ").replace('"', "").split() for command in commands]
    assert all(found)
    requirements = sorted({requirement for requirements in found for requirement in requirements})
    assert not any("agq" in requirement for requirement in requirements)
    result = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *requirements],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
