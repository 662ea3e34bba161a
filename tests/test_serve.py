"""The server and the examples, each as a process of its own, as users start them."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_chromium
from command_line import COMMAND, environment, process

from agq_gguf.errors import InputError
from agq_gguf.runtime.text import TextModel

EXAMPLES = Path(__file__).parent.parent / "examples"
KEY = "some-key"


@pytest.fixture(scope="module")
def server(llama_agq: Path, llama_q8: Path) -> Iterator[str]:
    """Address of a running server with two models, one of them AGQ4, that asks for a key."""
    command = [*COMMAND, "serve", llama_agq, llama_q8, "--port", "0", "-t", "1", "-c", "256", "--set", "n_ubatch=64"]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(AGQ_API_KEY=KEY),
    ) as running:  # fmt: skip
        assert running.stdout is not None and running.stderr is not None
        watchdog = threading.Timer(120, running.kill)
        watchdog.start()
        line = running.stdout.readline()
        watchdog.cancel()
        found = re.fullmatch(r"serving at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found, line + running.stderr.read()
        yield found[1]
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 0
        assert "Traceback" not in errors


def post(url: str, body: dict[str, Any], key: str = KEY) -> dict[str, Any]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def example(name: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_both_models_answer_with_their_own_text(server: str, llama_agq: Path, llama_q8: Path) -> None:
    for name, path in ((llama_agq.stem, llama_agq), (llama_q8.stem, llama_q8), ("no-such-model", llama_agq)):
        body = {"model": name, "prompt": "the red key", "max_tokens": 8, "temperature": 0, "repeat_penalty": 1.0}
        text = post(f"{server}/completions", body)["choices"][0]["text"]
        with TextModel(path, context=256, threads=1) as model:
            wanted = "".join(model.continued("the red key", tokens=8, temperature=0, seed=1))
        assert text == wanted, name


def test_the_key_is_asked_for(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(f"{server}/completions", {"prompt": "the"}, key="wrong")
    assert refused.value.code == 401
    refused.value.close()


def test_openai_client(server: str, llama_agq: Path) -> None:
    shown = example("openai_client.py", "the red key", "--base-url", server, "--api-key", KEY, "--tokens", 8)
    name = re.escape(llama_agq.stem)
    assert re.fullmatch(f"{name} continues: .{{8,}}{name} answers: .{{8,}}\n", shown, re.DOTALL), shown


def test_langchain(llama_agq: Path) -> None:
    shown = example("langchain_llamacpp.py", llama_agq, "the cat", "the king", "--tokens", 8)
    assert re.search(r"^the cat:.{4,}", shown, re.MULTILINE) and re.search(r"^the king:.{4,}", shown, re.MULTILINE)


@pytest.fixture(scope="module")
def chat_app(llama_agq: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "chat_app.py"), str(llama_agq), "--port", str(port)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            try:
                urllib.request.urlopen(url, timeout=10).close()
                break
            except OSError:
                assert running.poll() is None
                time.sleep(0.1)
        yield url
        running.terminate()


def test_chat_app(chat_app: str) -> None:
    with urllib.request.urlopen(chat_app, timeout=60) as response:
        page = response.read().decode()
    assert "v1/chat/completions" in page
    assert not re.search(r"(src|href)=", page)  # nothing from elsewhere
    body = {"messages": [{"role": "user", "content": "who found the key"}], "max_tokens": 8}
    assert post(f"{chat_app}v1/chat/completions", body)["choices"][0]["message"]["content"]


@pytest.mark.slow
@needs_chromium
def test_chat_app_in_a_browser(chat_app: str, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.open(chat_app)
        browser.run("document.querySelector('input').value = 'who found the key'; 0")
        browser.run("document.querySelector('button').click()")
        assert browser.wait("document.querySelector('.assistant[data-done]')?.textContent")
        assert browser.run("document.querySelector('.user').textContent") == "who found the key"
        assert not browser.problems()
        assert all(url.startswith(chat_app) for url in browser.requests())


def test_refusals_are_one_line(llama_agq: Path, bert_f16: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = process("serve", llama_agq, "--port", port)
        assert result.returncode == InputError.exit_code
        assert f"port {port}" in result.stderr and result.stderr.count("\n") == 1
    for options, message in (
        (["--set", "n_cxt=3"], "no setting 'n_cxt'; its settings are api_key"),
        (["--set", "n_batch=many"], "does not accept n_batch='many'"),
    ):
        result = process("serve", llama_agq, "--port", "0", *options)
        assert result.returncode == InputError.exit_code, result.stderr
        assert message in result.stderr and "Traceback" not in result.stderr
    assert "predicts no next token" in process("serve", bert_f16, "--port", "0").stderr
    assert "cannot be opened" in process("serve", tmp_path / "none.gguf", "--port", "0").stderr
