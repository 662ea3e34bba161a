"""`chat` and `generate` with what people really have: odd templates, long conversations, bytes that are no text."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import architectures
import gguf
import pytest
from command_line import COMMAND, environment, heeding_interrupts, process, run

from agq_gguf.errors import HostError, InputError
from agq_gguf.runtime.chat_format import Prompt, by_name, format_names
from agq_gguf.runtime.conversation import Conversation
from agq_gguf.runtime.model import Batch, Context
from agq_gguf.runtime.text import TextModel

BROKEN = {
    "syntax": "{% for m in messages %}{{ m.content }}{% endfor",
    "a Go template": "{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}",
    "an unknown filter": "{% for m in messages %}{{ m.content | from_json }}{% endfor %}",
    "an unknown tag": "{% whatever %}{% for m in messages %}{{ m.content }}{% endfor %}",
}
UNSUITED = {
    "no system role": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "adds what is not there": "{% for m in messages %}{{ m.content + m.tool_calls }}{% endfor %}",
    "calls what is not there": "{{ nosuch('x') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "wants parts": "{% for m in messages %}{{ m.content[0].text + 'x' }}{% endfor %}",
}
SIMPLE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")


def with_template(source: Path, target: Path, template: str) -> Path:
    """A copy of a model with another chat template."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "tokenizer.chat_template"):
            kind = field.types[0]
            sub_type = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=sub_type)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_compiled(name: str, llama_f16: Path, tmp_path: Path) -> None:
    path = with_template(llama_f16, tmp_path / "m.gguf", BROKEN[name])
    refusal = run("chat", path, "-t", 1, input="hello\n", code=2).stderr
    assert "the chat template cannot be compiled" in refusal and "--chat-format" in refusal and ".;" not in refusal
    assert len(run("generate", path, "-p", "the", "-n", 4, "-t", 1).stdout) > 2
    assert run("chat", path, "-t", 1, "-n", 4, "--chat-format", "chatml", input="hello\n").stdout


@pytest.mark.parametrize("name", UNSUITED)
def test_a_template_that_does_not_suit_the_conversation(name: str, llama_f16: Path, tmp_path: Path) -> None:
    path = with_template(llama_f16, tmp_path / "m.gguf", UNSUITED[name])
    refusal = run("chat", path, "-t", 1, "--system", "be brief", input="hello\n", code=2).stderr
    assert "the chat template cannot show this conversation" in refusal and "--chat-format" in refusal


def test_own_template_file_and_formats(llama_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def answer(text: TextModel, prompt: Prompt, **_: object) -> list[str]:
        seen.append(prompt.text)
        return ["fine"]

    monkeypatch.setattr(TextModel, "continued", answer)
    path = with_template(llama_f16, tmp_path / "m.gguf", SIMPLE)
    (tmp_path / "t.jinja").write_text("<{{ messages[-1].content }}>", encoding="utf-8")
    run("chat", path, "-t", 1, input="hello\nagain\n")
    run("chat", path, "-t", 1, "--template", tmp_path / "t.jinja", input="hello\n")
    run("chat", path, "-t", 1, "--chat-format", "plain", input="hello\n")
    run("chat", path, "-t", 1, "--chat-format", "gemma", input="hello\n")
    assert seen == [
        "[user] hello\n",
        "[user] hello\n[assistant] fine\n[user] again\n",
        "<hello>",
        "hello\n",
        "<start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n",
    ]
    assert "chat format must be one of" in run("chat", path, "--chat-format", "x", input="", code=2).stderr
    assert "exclude" in run("chat", path, "--chat-format", "x", "--template", path, input="", code=2).stderr


def test_formats_of_llama_cpp() -> None:
    assert {"chatml", "gemma", "llama3", "mistral-v1"} <= set(format_names())
    long = [{"role": "user", "content": "\N{SNOWMAN}" * 5000}]
    assert long[0]["content"] in by_name("chatml")(long).text


def lines(messages: object) -> Prompt:
    """A format in which each message is a line."""
    assert isinstance(messages, list)
    return Prompt("".join(f"{m['role'][0]}: {m['content']}\n" for m in messages), True)


def test_a_long_conversation_drops_the_oldest_turns(llama_f16: Path) -> None:
    with TextModel(llama_f16, context=128, threads=1) as text:
        talk = Conversation(text, lines, "the system", tokens=16, temperature=0, seed=1)
        dropped = 0
        for i in range(12):
            said = "".join(talk.answer(f"the red key in the box {i}"))
            assert said.strip()
            dropped += talk.dropped
            prompt = talk._prompt().text
            assert prompt.startswith("s: the system\n") and f"box {i}" in prompt
            assert len(text.tokenize(Prompt(prompt, True))) < 128
        assert dropped > 8 and len(talk.messages) == 24  # nothing that was said is lost
        with pytest.raises(InputError, match="shorten it or use a larger --ctx"):
            list(talk.answer("key " * 300))
        assert (len(talk.messages), talk.dropped) == (24, 0)  # no note about turns beside the error
        assert "".join(talk.answer("the cat"))
        assert "the red key in the box 3" in talk.as_markdown()


def test_bytes_that_are_no_text(llama_f16: Path) -> None:
    shown = subprocess.run(
        [*COMMAND, "chat", str(llama_f16), "-n", "4", "-t", "1", "--temp", "0", "--chat-format", "plain"],
        input=b"caf\xe9 \xff\xfe\nthe cat\n", capture_output=True, timeout=120, check=False, env=environment(),
    )  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert len(shown.stdout.splitlines()) >= 2


def test_stops_are_held_back(llama_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TextModel(llama_f16, context=64, threads=1) as text:
        plain = "".join(text.continued("the red key", tokens=12, temperature=0))
        stop = plain[4:8]
        cut = "".join(text.continued(Prompt("the red key", False, (stop,)), tokens=12, temperature=0))
        assert stop not in cut
        same = "".join(text.continued(Prompt("the red key", False, ("no such text",)), tokens=12, temperature=0))
        assert same == "".join(text.continued(Prompt("the red key", False), tokens=12, temperature=0))


def test_a_second_text_with_the_same_beginning(llama_f16: Path) -> None:
    """What the cache holds is used again, and changes nothing."""
    with TextModel(llama_f16, context=128, threads=1) as text:
        first = "".join(text.continued("the red key in the box", tokens=10, temperature=0))
        text.read(text.tokenize("the red door"))
        assert "".join(text.continued("the red key in the box", tokens=10, temperature=0)) == first


WITHOUT_READLINE = "import sys\nsys.modules['readline'] = None\nfrom agq_gguf.cli.app import main\nmain()\n"


class Terminal:
    """`chat` at a pseudo-terminal, as somebody sees it."""

    def __init__(
        self, path: Path, *options: object, edits: bool = True, variables: dict[str, str] | None = None
    ) -> None:
        self._master, slave = pty.openpty()
        program = COMMAND if edits else [sys.executable, "-c", WITHOUT_READLINE]
        self.process = subprocess.Popen(
            [*program, "chat", str(path), "-t", "1", "--temp", "0", *map(str, options)],
            stdin=slave, stdout=slave, stderr=slave, preexec_fn=self._prepare, start_new_session=True,
            env=environment(**{"TERM": "dumb", "INPUTRC": os.devnull, **(variables or {})}),
        )  # fmt: skip
        os.close(slave)
        self._shown = b""

    @staticmethod
    def _prepare() -> None:
        """In the new process: Ctrl-C that is typed at this terminal reaches it."""
        heeding_interrupts()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def until(self, text: bytes) -> bytes:
        """What is shown before this text."""
        while text not in self._shown:
            assert select.select([self._master], [], [], 20)[0], self._shown
            try:
                self._shown += os.read(self._master, 4096)
            except OSError:
                pytest.fail(f"the chat ended: {self._shown!r}")
        found, self._shown = self._shown.split(text, 1)
        return found

    def type(self, typed: bytes) -> None:
        while typed:
            typed = typed[os.write(self._master, typed) :]

    def ask(self, typed: bytes) -> bytes:
        """Types a line, and returns what is shown before the next prompt."""
        self.type(typed + b"\n")
        return self.until(b"\n> ")

    def __enter__(self) -> Terminal:
        assert b"/help lists commands" in self.until(b"\n> ")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        os.close(self._master)


@needs_terminal
@pytest.mark.parametrize("edits", [True, False])
def test_a_chat_at_a_terminal(edits: bool, llama_f16: Path, tmp_path: Path) -> None:
    path = with_template(llama_f16, tmp_path / "m.gguf", SIMPLE)
    saved = tmp_path / "talk.md"
    (tmp_path / "home").mkdir()
    (tmp_path / "mine.md").write_text("a file of the user")
    with Terminal(path, "-n", 8, edits=edits, variables={"HOME": str(tmp_path / "home")}) as chat:
        for typed, answer in [
            (b"/help", b"stop the answer"), (b"/nonsense", b"unknown command /nonsense"),
            (b"/system be brief", b"system prompt changed"), (b"the cat", b""),
            (b"/save " + os.fsencode(saved), b"written"), (b'"""\nthe dog\nand the cat\n"""', b""),
            (b"/save " + os.fsencode(saved), b"written"),  # again: its own file
            (b"/save /no/such/folder/x", b"cannot write there"), (b"/save", b"needs the name of a file"),
            (b"/save " + b"x" * 300, b"cannot write there"),
            (b"/save " + os.fsencode(path), b"is a GGUF model"), (b"/save ~/talk.md", b"/talk.md: written"),
            (b"/save " + os.fsencode(tmp_path / "mine.md"), b"exists already; give the name of a new file"),
            (b"/reset", b"a new conversation"),
        ]:  # fmt: skip
            assert answer in chat.ask(typed)
        chat.type(b'"""\n')
        chat.until(b". ")
        chat.ask(b'"""')  # nothing between
        chat.type(b"half a line")
        chat.until(b"half a line")
        time.sleep(0.5)  # until it waits for the next key
        chat.type(b"\x03")  # Ctrl-C drops the line, and does not end the program
        chat.until(b"\n> ")
        assert b"unknown command /other" in chat.ask(b"/other")
        chat.type(b"\x04")
        assert chat.process.wait(60) == 0
    text = saved.read_text(encoding="utf-8")
    assert (tmp_path / "home" / "talk.md").read_text(encoding="utf-8") == text
    assert text.startswith("**System**\n\nbe brief\n\n**User**\n\nthe cat\n")
    assert "**User**\n\nthe dog\nand the cat\n" in text
    assert (tmp_path / "mine.md").read_text() == "a file of the user"


@needs_terminal
@pytest.mark.parametrize("edits", [True, False])
@pytest.mark.parametrize("word", [b"/quit", b"/exit"])
def test_words_that_leave(word: bytes, edits: bool, llama_f16: Path) -> None:
    with Terminal(llama_f16, "--chat-format", "plain", edits=edits) as chat:
        chat.type(word + b"\n")
        assert chat.process.wait(60) == 0


@needs_terminal
@pytest.mark.parametrize("edits", [True, False])
def test_sigterm_at_the_prompt(edits: bool, llama_f16: Path) -> None:
    with Terminal(llama_f16, "--chat-format", "plain", edits=edits) as chat:
        time.sleep(0.5)  # until it waits: a signal just before is seen at the next key
        chat.process.send_signal(signal.SIGTERM)
        chat.until(b"error: interrupted")
        assert chat.process.wait(60) == 130


@needs_terminal
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8", "TERM": "xterm"}])
def test_lines_of_any_length_at_a_terminal(locale: dict[str, str], llama_f16: Path, tmp_path: Path) -> None:
    """A terminal that edits lines itself keeps 4095 bytes of each."""
    path, saved = with_template(llama_f16, tmp_path / "m.gguf", SIMPLE), tmp_path / "talk.md"
    messages = ["the cat " * n + "caf\u00e9" for n in (1, 511, 512, 750)]
    with Terminal(path, "-n", 1, "-c", 8192, variables=locale) as chat:
        for message in messages:
            assert b"warning" not in chat.ask(message.encode())
        chat.ask(b"bytes \xe9 of \xff\xfe another encoding")
        assert b"written" in chat.ask(b"/save " + os.fsencode(saved))
    said = re.findall(r"\*\*User\*\*\n\n(.*)", saved.read_text(encoding="utf-8"))
    assert said[:4] == messages
    # readline leaves out a byte that begins a character which does not follow; others are replaced.
    assert re.fullmatch("bytes \N{REPLACEMENT CHARACTER}? of \N{REPLACEMENT CHARACTER}{2} another encoding", said[4])


@needs_terminal
def test_the_line_before_can_be_called_back(llama_f16: Path) -> None:
    with Terminal(llama_f16, "--chat-format", "plain", variables={"TERM": "xterm"}) as chat:
        chat.ask(b"/nonsense")
        assert b"unknown command /nonsense2" in chat.ask(b"\x1b[A2")  # the key that goes up


@needs_terminal
def test_long_lines_without_readline(llama_f16: Path, tmp_path: Path) -> None:
    path, saved = with_template(llama_f16, tmp_path / "m.gguf", SIMPLE), tmp_path / "talk.md"
    with Terminal(path, "-n", 1, "-c", 8192, edits=False) as chat:
        assert b"warning" not in chat.ask(b"a" * 4094)
        assert chat.ask(b"b" * 4095).count(b"a terminal keeps only 4095 bytes of a line") == 1
        assert chat.ask(b"c" * 6000).count(b"a terminal keeps only 4095 bytes of a line") == 1
        chat.ask(b"/save " + os.fsencode(saved))
    said = re.findall(r"\*\*User\*\*\n\n(.*)", saved.read_text(encoding="utf-8"))
    assert [(text[0], len(text)) for text in said] == [("a", 4094), ("b", 4095), ("c", 4095)]


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(llama_f16: Path) -> None:
    with TextModel(llama_f16, context=128, threads=1) as text:
        talk = Conversation(text, lines, tokens=50, temperature=0, seed=1)
        answer = talk.answer("the cat")
        first = next(answer)
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
        assert [m["role"] for m in talk.messages] == ["user", "assistant"]
        assert talk.messages[1]["content"] == first
        assert "".join(talk.answer("the dog"))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, HostError("the computation failed")])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_call_that_ends_in_an_exception(
    name: str, fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during a call is raised when llama.cpp has put its tokens into the cache. The next answer is right."""
    path = architectures.DECODERS[name](tmp_path / "m.gguf")
    with TextModel(path, context=128, threads=1) as text:
        expected = "".join(text.continued("the red key", tokens=8, temperature=0))
        longer = "".join(text.continued("the red key in the box", tokens=8, temperature=0))
        for calls in (1, 2, 5):  # while it reads the prompt, and while it answers

            def decode(batch: Batch, left: list[int] = [calls]) -> None:  # noqa: B006
                Context.decode(text.context, batch)
                left[0] -= 1
                if left[0] == 0:
                    raise fault

            monkeypatch.setattr(text.context, "decode", decode)
            with pytest.raises(type(fault) if isinstance(fault, Exception) else KeyboardInterrupt):
                "".join(text.continued("the cat and the dog", tokens=8, temperature=0))
            monkeypatch.undo()
            assert "".join(text.continued("the red key", tokens=8, temperature=0)) == expected
            assert "".join(text.continued("the red key in the box", tokens=8, temperature=0)) == longer


@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGTERM, 1, 130), (signal.SIGINT, 30, 0)])
def test_signals_while_it_answers(number: signal.Signals, times: int, code: int, llama_f16: Path) -> None:
    """SIGINT stops an answer, and the next one follows; SIGTERM ends the program."""
    with subprocess.Popen(
        [*COMMAND, "chat", str(llama_f16), "-c", "128", "-n", "60", "-t", "1", "--chat-format", "plain"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        preexec_fn=heeding_interrupts, text=True,
    ) as chat:  # fmt: skip
        assert chat.stdin and chat.stdout and chat.stderr
        chat.stdin.write("the cat\n" * 60)
        chat.stdin.close()
        assert chat.stdout.read(1)  # it answers
        for _ in range(times):
            time.sleep(0.01)
            if chat.poll() is None:
                chat.send_signal(number)
        chat.stdout.read()
        error = chat.stderr.read()
        assert chat.wait(60) == code, error
        assert ("error: interrupted" in error) == (code == 130) and "llama.cpp" not in error


def test_a_name_that_is_no_text(llama_agq: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    path.write_bytes(llama_agq.read_bytes())
    shown = process("generate", path, "-p", "the", "-n", 4, "-t", 1)
    assert (shown.returncode, shown.stderr) == (0, "") and len(shown.stdout) > 2
