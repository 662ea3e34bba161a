"""`python -m agq_gguf.gguf_tools dump|new-metadata|set-metadata`: the scripts of the `gguf` package, with AGQ4.

Started by themselves (`gguf-dump`) they end at the first AGQ4 tensor: "38 is not a valid GGMLQuantizationType".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from agq_gguf.errors import AgqError, HostError, InputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.integrations import gguf_package

_SCRIPTS = {
    "dump": "gguf_dump",
    "new-metadata": "gguf_new_metadata",
    "set-metadata": "gguf_set_metadata",
}
_PROGRAM = "python -m agq_gguf.gguf_tools"
_USAGE = f"""usage: {_PROGRAM} {{{",".join(_SCRIPTS)}}} ...

Runs a script of the gguf package, which also knows the type AGQ4 here:

  dump          show metadata and tensors of a file
  new-metadata  copy a file with other metadata
  set-metadata  change a number in the metadata of a file

"{_PROGRAM} dump --help" shows the options of dump; the others are alike."""


def run(arguments: Sequence[str]) -> None:
    """Runs the script that the first argument names with the other arguments.

    Raises SystemExit as the script does, and AgqError for a file that is malformed or cannot be read.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        raise SystemExit(0 if arguments else 2)
    name, *rest = arguments
    if name not in _SCRIPTS:
        raise InputError(f"there is no script {name!r}; known are {', '.join(_SCRIPTS)}")
    if not gguf_package.extend():
        raise HostError("the package gguf is not installed; install it with: pip install gguf")
    _check_input(rest)
    script = import_module(f"gguf.scripts.{_SCRIPTS[name]}")
    sys.argv = [f"{_PROGRAM} {name}", *rest]
    script.main()


def _check_input(arguments: list[str]) -> None:
    """Reads the header of the input with our reader, which a malformed file cannot keep busy or make crash."""
    for path in map(Path, arguments):
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
        except OSError:  # an option or a value
            continue
        if is_gguf:
            open_gguf(path).close()
            return


def main() -> None:
    """Entry point: errors are one line and an exit code."""
    try:
        run(sys.argv[1:])
    except AgqError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (EOFError, LookupError, MemoryError, OSError, ValueError) as error:  # which gguf's scripts do not catch
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
