"""The commands `generate` and `chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.files import check_output, write_text
from agq_gguf.cli.options import Context, ModelArgument, Seed, Temperature, Threads
from agq_gguf.cli.prune import check_layers, pruning, show_dropped, why_all_kept
from agq_gguf.errors import AgqError, InputError
from agq_gguf.runtime.interrupts import Terminated
from agq_gguf.text import read_text

if TYPE_CHECKING:
    from agq_gguf.runtime.chat_format import Formatter
    from agq_gguf.runtime.conversation import Conversation
    from agq_gguf.runtime.text import TextModel

_HELP = """\
/help           this list
/reset          begin a new conversation
/system TEXT    change the system prompt; without TEXT: remove it
/save FILE      write the conversation into a new file (Markdown)
\"\"\"             begin and end a message of several lines
Ctrl-C          stop the answer
/quit, Ctrl-D   leave"""

_TERMINAL_LINE = 4095  # bytes that Linux keeps of a typed line that no program edits, without its end


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Maximum number of tokens to generate.")] = 128,
    temperature: Temperature = 0.8,
    seed: Seed = -1,
    context: Context = 0,
    threads: Threads = 0,
    prune: Annotated[
        str | None,
        typer.Option(
            help="Pruning, such as off, or 3:0.5 (drop half of the prompt's tokens after layer 3); "
            "default: what the file says.",
            show_default=False,
        ),
    ] = None,
    show_pruned: Annotated[
        bool, typer.Option("--show-pruned", help="First print the prompt and mark the dropped tokens.")
    ] = False,
) -> None:
    """Continue a text."""
    from agq_gguf.runtime.text import TextModel

    with pruning(prune), TextModel(model, context=context, threads=threads, tell=show.complain) as text:
        if prune is not None:
            check_layers(prune, text.model)
        ids = text.tokenize(prompt)
        if show_pruned:
            show_dropped(text, model, prune, ids)
        for i, piece in enumerate(text.continued(ids, tokens=tokens, temperature=temperature, seed=seed)):
            if i == 0 and not show_pruned and (why := why_all_kept(text, prune, len(ids))):
                show.complain(f"note: no token of this prompt was dropped: {why}")
            _write(piece)
        _write("\n")


def chat(
    model: ModelArgument,
    system: Annotated[str, typer.Option(help="System prompt.", show_default=False)] = "",
    chat_format: Annotated[
        str,
        typer.Option(
            "--chat-format",
            help="One of llama.cpp's chat formats, such as chatml, instead of the model's own template; "
            "plain: no format.",
            show_default=False,
        ),
    ] = "",
    template: Annotated[
        Path | None, typer.Option(help="File with a chat template (Jinja) to use instead.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Maximum number of tokens per answer.")] = 512,
    temperature: Temperature = 0.8,
    seed: Seed = -1,
    context: Context = 0,
    threads: Threads = 0,
) -> None:
    """Chat with a model.

    /help lists what you can type, Ctrl-C stops an answer, Ctrl-D ends.

    Lines may also come from a pipe.
    """
    from agq_gguf.runtime.conversation import Conversation
    from agq_gguf.runtime.text import TextModel

    with TextModel(model, context=context, threads=threads, tell=show.complain) as text:
        formatter = _formatter(text, model, chat_format, template)
        talk = Conversation(text, formatter, system, tokens=tokens, temperature=temperature, seed=seed)
        interactive = sys.stdin.isatty()
        ctrl_c = _CtrlC()
        if interactive:
            show.complain(f"{model.name}: type a message; /help lists commands, Ctrl-D ends")
        saved: set[Path] = set()
        for message in _messages(ctrl_c, interactive):
            if interactive and message in ("/quit", "/exit"):
                return
            if interactive and message.startswith("/"):
                _command(talk, message, saved)
            else:
                _answer(ctrl_c, talk, message)


class _CtrlC:
    """Lets Ctrl-C stop one piece of work, and nothing between two pieces: a second Ctrl-C must not end the chat."""

    def __init__(self) -> None:
        self._stops = False  # whether there is something to stop
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stops:
            self._stops = False
            raise KeyboardInterrupt

    def stopped(self, work: Callable[[], None]) -> bool:
        """Does the work. Whether Ctrl-C stopped it."""
        try:
            self._stops = True
            work()
            self._stops = False  # here, so that no signal is raised behind the handlers below
        except Terminated:
            raise
        except KeyboardInterrupt:
            return True
        finally:
            self._stops = False  # after any other exception
        return False


def _formatter(text: TextModel, model: Path, chat_format: str, template: Path | None) -> Formatter:
    """How conversations become prompts: as the user says, else as the model's file says."""
    from agq_gguf.runtime.chat_format import by_name, by_template, own_template, plain

    if chat_format and template:
        raise InputError("--chat-format and --template exclude each other; give one of them")
    if template:
        return by_template(text.model, read_text(template), str(template))
    if chat_format:
        return plain if chat_format == "plain" else by_name(chat_format)
    own = own_template(text.model)
    if own:
        return by_template(text.model, own, str(model))
    show.complain(
        f"warning: {model} has no chat template, so it was probably not trained to chat: it continues what you type; "
        "choose a format with --chat-format or --template"
    )
    return plain


def _messages(ctrl_c: _CtrlC, interactive: bool) -> Iterator[str]:
    """What the user types, one message at a time; bytes that are not UTF-8 are replaced."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    read_line = _line_reader(interactive)
    block: list[str] | None = None  # lines of a message that began with three quotes
    line = ""

    def read() -> None:
        nonlocal line
        line = read_line("> " if block is None else ". ")

    while True:
        if ctrl_c.stopped(read):
            _write("\n")
            block = None
            continue
        if not line:
            if interactive:
                _write("\n")
            if block:
                yield "\n".join(block)
            return
        line = line.rstrip("\r\n")
        if block is None and line.strip().startswith('"""'):
            block, line = [], line.strip()[3:]
        if block is None:
            if line.strip():
                yield line.strip()
        elif line.rstrip().endswith('"""'):
            message = "\n".join([*block, line.rstrip()[:-3]]).strip("\n")
            block = None
            if message.strip():
                yield message
        else:
            block.append(line)


def _line_reader(interactive: bool) -> Callable[[str], str]:
    """A function that shows a prompt, if somebody types, and reads a line with its end; an empty text at the end."""
    if not interactive:
        return lambda prompt: sys.stdin.readline()
    return _edited_line if sys.stdout.isatty() and _can_edit() else _typed_line


def _can_edit() -> bool:
    """Whether `input` lets users edit what they type, in lines of any length, with those of before."""
    try:
        import readline
    except ImportError:  # on Windows, and in some builds of Python
        return False
    # In the locale "C" it takes bytes beyond ASCII for keys.
    for setting in ("input-meta on", "output-meta on", "convert-meta off"):
        readline.parse_and_bind(f"set {setting}")
    return True


def _edited_line(prompt: str) -> str:
    try:
        return input(prompt) + "\n"
    except EOFError:
        return ""


def _typed_line(prompt: str) -> str:
    _write(prompt)
    line = sys.stdin.readline()
    if len(line.rstrip("\r\n").encode("utf-8", "replace")) >= _TERMINAL_LINE and sys.platform != "win32":
        show.complain(
            f"warning: a terminal keeps only {_TERMINAL_LINE} bytes of a line, so the end of this one may be missing; "
            'type a long message in several lines, with """ before the first and after the last'
        )
    return line


def _answer(ctrl_c: _CtrlC, talk: Conversation, message: str) -> None:
    """Prints the model's answer; Ctrl-C stops it, and what was said until then is kept."""

    def answer() -> None:
        for piece in talk.answer(message):
            _write(piece)

    try:
        ctrl_c.stopped(answer)
    except AgqError as e:
        if not sys.stdin.isatty():
            raise
        show.complain(f"error: {e}")
    _write("\n")
    if talk.dropped:
        show.complain(f"note: the context is full: the {talk.dropped} oldest messages are no longer read")


def _command(talk: Conversation, line: str, saved: set[Path]) -> None:
    """Does what a line that begins with a slash says; `saved` are the files that this chat has written."""
    word, _, rest = line.partition(" ")
    if word == "/help":
        show.say(_HELP)
    elif word == "/reset":
        talk.reset()
        show.complain("a new conversation")
    elif word == "/system":
        talk.system = rest.strip()
        show.complain("system prompt changed" if talk.system else "system prompt removed")
    elif word == "/save":
        _save(talk, rest.strip(), saved)
    else:
        show.complain(f"unknown command {word}; /help lists all")


def _save(talk: Conversation, name: str, saved: set[Path]) -> None:
    if not name:
        show.complain("/save needs the name of a file")
        return
    try:
        target = Path(name).expanduser()
        check_output(target)
        whole = target.resolve()
        if target.exists() and whole not in saved:
            raise InputError(f"{target}: exists already; give the name of a new file")
        write_text(target, talk.as_markdown(), new=whole not in saved)
        saved.add(whole)
    except (AgqError, RuntimeError) as e:  # RuntimeError: a home folder that is not known
        show.complain(f"error: {e}")
    else:
        show.complain(f"{target}: written")


def _write(text: str) -> None:
    sys.stdout.write(text if text == "\n" else show.safe(text))
    sys.stdout.flush()
