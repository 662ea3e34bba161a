"""`serve` with llama.cpp's llama-server: how it is found and started, and several people at once.

    AGQ_LLAMA_SERVER=build/bin/llama-server pytest --slow tests/test_llama_server.py

runs the last tests with a real one; a stand-in program shows everywhere what it would be started with.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny_models
from command_line import COMMAND, environment, heeding_interrupts, process
from real_server import PEOPLE, ask, running_server, started_by

from agq_gguf.errors import InputError
from agq_gguf.integrations import llama_server
from agq_gguf.integrations.llama_server import ServerOptions, command_line, find_server
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.text import TextModel

# Writes down what it was started with, and answers like a server whose model is loaded.
STAND_IN = """#!{python}
import http.server, json, os, sys
arguments = sys.argv[1:]
with open({log!r}, "w") as file:
    json.dump([arguments, os.environ.get("GGML_BACKEND_PATH"), os.environ.get("LD_PRELOAD")], file)
if "--fail" in arguments:
    sys.exit("no such option: --fail")
if "--signal" in arguments:
    os.kill(os.getpid(), int(arguments[-1]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *_): pass
host, port = (arguments[arguments.index(name) + 1] for name in ("--host", "--port"))
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called llama-server."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "log.json")))
    program.chmod(0o755)
    return program


def started(*arguments: object, **variables: str) -> tuple[str, str, int]:
    """Starts `serve`, waits for its address, ends it as Ctrl-C does; returns the address, stderr and the exit code."""
    command = [*COMMAND, "serve", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables),
        preexec_fn=heeding_interrupts,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        line = running.stdout.readline()
        with urllib.request.urlopen(line.split()[2] + "/models", timeout=60) as response:
            assert response.status == 200
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    return line, errors, running.returncode


def test_the_command_line() -> None:
    options = ServerOptions("::1", 8080, 0, 3, 2, False, "secret", ("--metrics", "--cache-reuse", "64"))
    words = command_line(Path("bin/llama-server"), Path("models/story-agq4.gguf"), options, 512)
    assert words[0] == "bin/llama-server" and words[-3:] == ["--metrics", "--cache-reuse", "64"]
    pairs = dict(zip(words[1:-3:2], words[2:-3:2], strict=True))
    assert pairs == {
        "--model": "models/story-agq4.gguf", "--alias": "story-agq4", "--host": "::1", "--port": "8080",
        "--ctx-size": "1536", "--parallel": "3", "--threads": "2", "--threads-batch": "2", "--flash-attn": "off",
        "--api-key": "secret",
    }  # fmt: skip
    assert "8192" in command_line(Path("s"), Path("m"), ServerOptions(slots=2), 1 << 17)


def test_where_the_program_is_looked_for(stand_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() is None
    assert find_server(stand_in) == stand_in
    monkeypatch.setenv("PATH", str(stand_in.parent))
    assert find_server() == stand_in
    with pytest.raises(InputError, match="is no program that can be run"):
        find_server(tmp_path / "nothing")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into programs")
def test_a_program_that_cannot_load_the_plugin(stand_in: Path, llama_agq: Path) -> None:
    shown = process("serve", llama_agq, "--server", stand_in, "--port", 0)
    assert shown.returncode == 2 and "llama-server" in shown.stderr and "Traceback" not in shown.stderr


def test_serve_starts_it(
    stand_in: Path, llama_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_server, "environment_for", lambda program: {**os.environ, "GGML_BACKEND_PATH": "plugin"})
    addresses: list[str] = []

    def ready(url: str) -> None:
        addresses.append(url)
        raise KeyboardInterrupt

    options = ServerOptions(slots=2, rest=("--metrics",))
    assert llama_server.serve_with(stand_in, llama_f16, options, ready) == 0
    [url] = addresses
    arguments, backend, _ = json.loads((tmp_path / "log.json").read_text())
    assert backend == "plugin" and arguments[-1] == "--metrics"
    assert url == f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"
    with pytest.raises(Exception, match="ended with exit code 1"):
        llama_server.serve_with(stand_in, llama_f16, ServerOptions(rest=("--fail",)), ready)
    assert "no such option" in capfd.readouterr().err
    for number, message in ((signal.SIGILL, "built for newer CPUs"), (signal.SIGKILL, "was ended by SIGKILL")):
        with pytest.raises(Exception, match=message):
            llama_server.serve_with(stand_in, llama_f16, ServerOptions(rest=("--signal", str(int(number)))), ready)


KILLED = """
import os, sys
from pathlib import Path
from agq_gguf.integrations import llama_server
llama_server.environment_for = lambda program: dict(os.environ)
serving = llama_server.ServerOptions()
llama_server.serve_with(Path(sys.argv[1]), Path(sys.argv[2]), serving, lambda url: print(flush=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux to end the child")
def test_the_server_ends_if_serve_is_killed(stand_in: Path, llama_f16: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(stand_in), str(llama_f16)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as running:
        assert running.stdout is not None
        running.stdout.readline()
        [server] = started_by(running.pid)
        running.kill()
    end = time.monotonic() + 30
    while Path(f"/proc/{server}").exists() and "(zombie)" not in Path(f"/proc/{server}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_folder_is_for_llama_server_to_read(
    stand_in: Path, llama_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models are loaded when requests name them, so none is opened before: the second one is no GGUF file."""
    monkeypatch.setattr(llama_server, "environment_for", lambda program: dict(os.environ))
    folder = tmp_path / "models"
    (folder / "story").mkdir(parents=True)
    (folder / "story" / "any.gguf").write_bytes(b"no model")

    def ready(url: str) -> None:
        raise KeyboardInterrupt

    assert llama_server.serve_with(stand_in, folder, ServerOptions(slots=2, context=512), ready) == 0
    arguments = json.loads((tmp_path / "log.json").read_text())[0]
    assert arguments[arguments.index("--models-dir") + 1] == str(folder)
    assert arguments[arguments.index("--ctx-size") + 1] == "1024"
    assert not {"--model", "--alias"} & set(arguments)


def test_a_folder_that_cannot_be_served(stand_in: Path, llama_f16: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "too-deep.gguf").symlink_to(llama_f16)
    refused = process("serve", folder, "--server", stand_in)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "has no GGUF file" in refused.stderr
    (folder / "story.gguf").symlink_to(llama_f16)
    for more in ([], [llama_f16]):
        refused = process("serve", folder, *more, "--server", "python")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "is a folder, which only llama-server serves" in refused.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names, or change them")
def test_a_name_that_is_not_utf_8_in_the_server_that_cannot_open_it(llama_f16: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"story\xff.gguf")
    path.symlink_to(llama_f16)
    refused = process("serve", path, "--server", "python", "--port", 0, errors="replace")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "needs a file name in UTF-8; rename the file" in refused.stderr


def test_what_is_only_for_one_of_the_servers(stand_in: Path, llama_f16: Path) -> None:
    for options in (["--set", "n_batch=64"], ["--logprobs"]):
        assert "use --server python" in process("serve", llama_f16, "--server", stand_in, *options).stderr
    refusal = process("serve", llama_f16, "--server", "python", "--port", 0, "--", "--metrics").stderr
    assert "is for llama-server" in refusal


def test_without_a_program_it_says_what_is_missing(llama_f16: Path, tmp_path: Path) -> None:
    line, errors, code = started(llama_f16, "--port", 0, "-c", 128, "-t", 1, PATH=str(tmp_path))
    assert re.match(r"serving at http://127.0.0.1:\d+/v1\n", line) and code == 0
    assert "one request at a time" in errors


# a real one


@pytest.fixture(scope="module")
def served(llama_agq: Path) -> Iterator[str]:
    with running_server(llama_agq, "-c", 256, "--slots", PEOPLE) as (url, _):
        yield url


@pytest.mark.slow
def test_several_people_at_once(served: str, llama_agq: Path) -> None:
    """Each gets what it would get alone, streamed to the end."""
    prompts = [f"the red key in the box {i} and the blue door" for i in range(PEOPLE)]
    with TextModel(llama_agq, context=256, threads=1) as model:
        alone = ["".join(model.continued(p, tokens=12, temperature=0)) for p in prompts]
    answers: list[str] = [""] * PEOPLE

    def person(i: int) -> None:
        body = {"prompt": prompts[i], "max_tokens": 12, "temperature": 0, "stream": True}
        events = [e[6:] for e in ask(served, "/v1/completions", body).split("\n\n") if e.startswith("data: ")]
        assert events[-1] == "[DONE]"
        parts = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert parts[-1]["finish_reason"] == "length"
        answers[i] = "".join(part["text"] for part in parts)

    people = [threading.Thread(target=person, args=(i,)) for i in range(PEOPLE)]
    for one in people:
        one.start()
    for one in people:
        one.join()
    same = sum(answer.strip() == wanted.strip() for answer, wanted in zip(answers, alone, strict=True))
    assert all(len(answer) > 10 for answer in answers) and same >= PEOPLE - 1


def first_tokens(url: str, prompts: list[list[str]], at_once: bool) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each answer, with the logarithm of their probability."""
    answers: list[list[tuple[int, float]]] = [[] for _ in prompts]

    def person(i: int) -> None:
        body = {"prompt": " ".join(prompts[i]), "n_predict": 6, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        found = json.loads(ask(url, "/completion", body))["completion_probabilities"]
        answers[i] = [(token["id"], token["logprob"]) for token in found]

    people = [threading.Thread(target=person, args=(i,)) for i in range(len(prompts))]
    for one in people:
        one.start()
        if not at_once:
            one.join()
    for one in people:
        one.join()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["--kv-unified", "--no-kv-unified"])
def test_pruned_for_several_people(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what it would get with the server for itself."""
    # In F32, because 8-bit activations make more of the differences between kernels.
    model = tiny_models.write_llama(tmp_path / "model.gguf", dtype="f32", n_layer=4, n_embd=256)
    prompts = [np.random.default_rng(i).choice(tiny_models.WORDS, 100 + 9 * i).tolist() for i in range(4)]
    found = {}
    for prune in ("1:0.5;score=heads;heads=1:0.0+1.1", "off"):
        monkeypatch.setenv("AGQ_PRUNE", prune)
        with running_server(model, "-c", 256, "--slots", 4, "--", cache) as (url, _):
            found[prune] = [first_tokens(url, prompts, at_once) for at_once in (False, True)]
    (alone, together), (unpruned, _) = found.values()
    for one, beside, whole in zip(alone, together, unpruned, strict=True):
        assert len(one) == 6
        assert [token for token, _ in beside] == [token for token, _ in one]
        np.testing.assert_allclose([p for _, p in beside], [p for _, p in one], atol=0.01)
        assert abs(one[0][1] - whole[0][1]) > 0.02  # tokens are dropped


def completion(url: str, model: str) -> str:
    """The text that a model continues a prompt with; the whole prompt is computed each time."""
    body = {"model": model, "prompt": "the red key", "max_tokens": 12, "temperature": 0, "cache_prompt": False}
    return str(json.loads(ask(url, "/v1/completions", body))["choices"][0]["text"])


@pytest.mark.slow
def test_a_folder_of_models(llama_agq: Path, gpt2_f16: Path, bert_f16: Path, words_file: Path, tmp_path: Path) -> None:
    """Each answers as it does alone; what cannot be answered is an error, and the server lives on."""
    folder = tmp_path / "models"
    folder.mkdir()
    options = QuantizeOptions(threads=1, calibration_tokens=1024, matrix=MatrixOptions(learn_codebook=False))
    quantize(gpt2_f16, folder / "gpt2-agq4.gguf", calibration=words_file, options=options)
    (folder / "llama-agq4.gguf").symlink_to(llama_agq)
    (folder / "bert.gguf").symlink_to(bert_f16)
    architectures.write_t5(folder / "t5.gguf")
    (folder / "broken.gguf").write_bytes(b"no model")
    names = ("gpt2-agq4", "llama-agq4")
    alone = {}
    for name in names:
        with running_server(folder / f"{name}.gguf", "--slots", 2) as (url, _):
            alone[name] = completion(url, name)
            assert completion(url, "no-such-model") == alone[name]  # a server of one model answers to any name
    assert len(set(alone.values())) == 2 and all(len(text) > 10 for text in alone.values())
    with running_server(folder, "--slots", 2) as (url, process):
        listed = json.loads(urllib.request.urlopen(f"{url}/v1/models", timeout=60).read())["data"]
        assert sorted(model["id"] for model in listed) == ["bert", "broken", "gpt2-agq4", "llama-agq4", "t5"]
        for wrong, code in (("no-such-model", 400), ("t5", 500), ("bert", 500), ("broken", 500)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                completion(url, wrong)
            with refused.value as answer:
                assert answer.code == code and json.load(answer)["error"]["message"], wrong
            for name in names:
                assert completion(url, name) == alone[name]
        assert len(started_by(process)) >= 3  # the router and a process for each of the two; all end with it


@pytest.mark.slow
def test_health_schema_and_page(served: str) -> None:
    with urllib.request.urlopen(f"{served}/health", timeout=30) as response:
        assert response.status == 200
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    body = {
        "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "a number"}],
        "max_tokens": 40, "temperature": 0, "chat_template": "chatml",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }  # fmt: skip
    text = json.loads(ask(served, "/v1/chat/completions", body))["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{")
