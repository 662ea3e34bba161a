"""The command line: its commands, its exit codes. Only this package prints.

Modules that load llama_cpp or torch are imported inside the commands, so that ``agq-gguf --help`` is quick.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agq_gguf._version import __version__
from agq_gguf.cli import (
    bench,
    chat,
    compare,
    demo,
    doctor,
    evaluate,
    import_hf,
    inspect,
    prune,
    quantize,
    report,
    serve,
    verify,
)
from agq_gguf.cli import output as show
from agq_gguf.errors import AgqError, HostError, OutputError
from agq_gguf.runtime.interrupts import terminate

_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended
_BROKEN_PIPE = 141  # what shells report for a process whose output pipe was closed


class _Commands(TyperGroup):
    """Turns errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        debug = bool(ctx.params.get("debug"))
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except AgqError as e:
            if debug:
                raise
            _fail(str(e), e.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted", _INTERRUPTED)
        except BrokenPipeError:
            _end_output()  # the reader of stdout has gone
            raise typer.Exit(_BROKEN_PIPE) from None
        except (OSError, MemoryError) as e:
            if debug:
                raise
            if _is_full(e):
                _fail_full(e)
            _fail(str(e) or "not enough memory", AgqError.exit_code)


def _fail(message: str, exit_code: int) -> None:
    show.complain(f"error: {message}")
    raise typer.Exit(exit_code) from None


def _is_full(e: BaseException) -> bool:
    """Whether stdout, which has no name, has no room for more."""
    return isinstance(e, OSError) and e.filename is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _fail_full(e: BaseException) -> None:
    _end_output()
    _fail(f"the output cannot be written: {getattr(e, 'strerror', e)}", OutputError.exit_code)


def _end_output() -> None:
    """Redirects stdout, so that the flush at the end of the process succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Opens standard streams that are closed, as for some services.

    Else the first files that are opened take their numbers, and what llama.cpp logs would be written into them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None,  # plain help: rich's tables cut option names in a terminal of 80 columns
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of ``agq-gguf``."""
    # SIGTERM cleans up as Ctrl-C does: half-written files are removed.
    signal.signal(signal.SIGTERM, terminate)
    _open_streams()
    try:
        app(prog_name="agq-gguf")
    except OSError as e:  # of --help and --version, which no command has seen
        if not _is_full(e):
            raise
        _end_output()
        show.complain(f"error: the output cannot be written: {e.strerror}")
        sys.exit(OutputError.exit_code)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from agq_gguf.runtime.library import ggml_version

    show.say(f"agq-gguf {__version__}")
    for package in ("llama-cpp-python", "gguf"):
        try:
            show.say(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            show.say(f"{package} not installed")
    try:
        show.say(f"ggml {ggml_version()}")
    except HostError:
        show.say("ggml not installed")
    raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and llama.cpp's log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Quantize GGUF models to AGQ4 (4.25 bits per weight) and run them in stock llama-cpp-python."""
    if debug:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")


# In the order of `agq-gguf --help`.
for _command in (
    quantize.quantize,
    inspect.inspect,
    evaluate.evaluate,
    bench.bench,
    chat.generate,
    chat.chat,
    demo.backend_path,
    demo.demo,
    doctor.doctor,
    prune.calibrate_pruning,
    serve.serve,
    verify.verify,
    report.report,
    compare.compare,
    compare.card,
    import_hf.import_hf,
):
    app.command()(_command)
