"""Writes docs/commands.md from the command line itself; tests/test_site.py fails if it is out of date.

python docs/make_commands.py
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from agq_gguf.cli.app import app

TARGET = Path(__file__).parent / "commands.md"
HEAD = """# Commands

`docs/make_commands.py` writes this page from the program itself. `agq-gguf --version` shows the versions of this
package and of the packages it needs. `agq-gguf --debug COMMAND` shows tracebacks and llama.cpp's log. Exit codes:
0 success, 2 a file or an option cannot be used, 3 damaged AGQ4 data, 4 the installed llama-cpp-python cannot be used or
a package is missing, 5 the result cannot be written, 6 only the metadata of a model was edited.
"""


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any, Any]]:
    """Name, type, typer's description and default of each parameter.

    They come from the signature, because typer's internals differ between releases.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *described = typing.get_args(hints[name])
        found.append((name, kind, described[0], parameter.default))
    return found


def _value(kind: Any, described: Any) -> str:
    """The placeholder for an option's value."""
    if described.metavar:
        return str(described.metavar)
    plain = [part for part in typing.get_args(kind) if part is not type(None)] or [kind]
    inner = typing.get_args(plain[0]) or plain
    if isinstance(inner[0], type) and issubclass(inner[0], Enum):
        return "|".join(str(choice.value) for choice in inner[0]).replace("|", "\\|")
    return {int: "N", float: "X", Path: "FILE", str: "TEXT"}.get(inner[0], "VALUE")


def _argument(name: str, kind: Any, described: Any) -> str:
    """An argument's name, with dots if it may be repeated."""
    return (described.metavar or name.upper()) + ("..." if typing.get_origin(kind) is list else "")


def _row(name: str, kind: Any, described: Any, default: Any) -> str:
    help_text = " ".join((described.help or "").split()).replace("|", "\\|")
    if isinstance(described, ArgumentInfo):
        return f"| `{_argument(name, kind, described)}` | {help_text} | |"
    # Inside Annotated, the first name stands where the default would be.
    declared = [described.default] if isinstance(described.default, str) else []
    names = [part for text in [*declared, *(described.param_decls or ())] for part in text.split("/")]
    names = sorted(names or [f"--{name.replace('_', '-')}"], key=lambda n: not n.startswith("--"))
    shown = ", ".join(f"`{n}`" for n in names) + ("" if kind is bool else f" {_value(kind, described)}")
    if default is inspect.Parameter.empty:
        value = "required"
    elif default is None or default == "" or kind is bool:
        value = "on" if default is True else ""
    else:
        value = f"`{getattr(default, 'value', default)}`"
    return f"| {shown} | {help_text} | {value} |"


def reference() -> str:
    """The page as Markdown."""
    parts = [HEAD.rstrip()]
    commands = {
        (c.name or c.callback.__name__.replace("_", "-")): c.callback for c in app.registered_commands if c.callback
    }
    for name, function in sorted(commands.items()):
        parameters = _parameters(function)
        arguments = " ".join(_argument(n, k, d) for n, k, d, _ in parameters if isinstance(d, ArgumentInfo))
        options = " [OPTIONS]" if any(isinstance(d, OptionInfo) for _, _, d, _ in parameters) else ""
        parts += ["", f"## {name}", "", inspect.cleandoc(function.__doc__ or "")]
        parts += ["", f"    agq-gguf {name} {arguments}".rstrip() + options]
        if parameters:
            parts += ["", "| | | default |", "|---|---|---|", *(_row(*parameter) for parameter in parameters)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
