"""Every error that a user can see: one base class, a few children, an exit code on each."""

from __future__ import annotations

import re
from importlib import metadata


class AgqError(Exception):
    """Base of all errors raised on purpose. The message says what was found, what was expected and what to do.

    ``exit_code`` is the exit code of the command line.
    """

    exit_code = 1


class InputError(AgqError):
    """A file or an option cannot be used: it is missing, damaged, or of the wrong kind or shape."""

    exit_code = 2


class FormatError(InputError):
    """The bytes are not a valid AGQ4 matrix, or AGQ4 cannot store the matrix."""

    exit_code = 3


class EditedError(FormatError):
    """All tensors are what `quantize` wrote, but the metadata is not."""

    exit_code = 6


class HostError(AgqError):
    """The installed llama-cpp-python (or the program that loads the plugin) cannot be used with this plugin."""

    exit_code = 4


class OutputError(AgqError):
    """The result could not be written (disk full, no permission, target in use)."""

    exit_code = 5


def missing_package(task: str, cause: ImportError | str, extra: str) -> HostError:
    """The error for a task that needs a package of an optional `extra`, with the command that installs it.

    `task` is the subject of the sentence, such as "quantizing" or "plots"; `cause` is the failed import, or the name of
    the package.
    """
    package = cause if isinstance(cause, str) else (cause.name or "a package").partition(".")[0]
    problem = "is not installed"
    if isinstance(cause, ImportError) and not isinstance(cause, ModuleNotFoundError):
        problem = f"cannot be imported ({cause})"
    return HostError(f"{task} needs {package}, which {problem}; install it with: {install_command(extra, package)}")


def install_command(extra: str, package: str) -> str:
    """The pip command for everything in an `extra` of this package; `package` alone if this package is not installed.

    It names the requirements themselves, so it works from a clone and from a wheel.
    """
    try:
        lines = metadata.requires("agq-gguf") or []
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        lines = []
    wanted = [f'"{requirement}"' for requirement in _requirements(lines, extra)]
    return f"pip install {' '.join(wanted or [package])}"


def _requirements(lines: list[str], extra: str) -> list[str]:
    """Requirements of an extra, from lines of package metadata; extras of this package are resolved."""
    found: list[str] = []
    for line in lines:
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        if not re.search(rf"""extra\s*==\s*["']{re.escape(extra)}["']""", condition):
            continue
        own = re.fullmatch(r"agq[-_.]gguf\[(.+)\]", requirement, re.IGNORECASE)
        found += [r for name in own[1].split(",") for r in _requirements(lines, name.strip())] if own else [requirement]
    return list(dict.fromkeys(found))
