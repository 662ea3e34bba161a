"""The clients that people use, against a real llama-server with the plugin, and what goes wrong in real use.

    AGQ_LLAMA_SERVER=build/bin/llama-server pytest --slow tests/test_server_clients.py

`AGQ_SOAK_SECONDS` is how long the mixed load lasts (60 by default).
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from browser import Browser, needs_chromium
from real_server import PEOPLE, ask, running_server, started_by

from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize

pytestmark = pytest.mark.slow

CONTEXT = 512  # tokens of each slot
END = "2"  # the token that ends a text of the tiny models
SECONDS = float(os.environ.get("AGQ_SOAK_SECONDS", "60"))
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# With nothing before a call, `tool_choice="required"` makes llama-server's grammar begin with the call. Templates whose
# calls stand in a <tool_call> section let any text come first, and a model of random weights never ends it.
CALLING_TEMPLATE = TEMPLATE.replace(
    "{{ message.content }}",
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "<function={{ call.function.name }}>{{ call.function.arguments | tojson }}</function>{% endfor %}",
)


@pytest.fixture(scope="module")
def server(llama_agq: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    # Without --cache-ram 0 the server keeps prompts of the past in memory, up to 8 GiB.
    own = ("--chat-template-file", template, "--cache-ram", 0)
    with running_server(llama_agq, "-c", CONTEXT, "--slots", PEOPLE, "--", *own) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, int]) -> openai.OpenAI:
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0, timeout=120)


def messages(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_openai_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="any", messages=messages("the red key"), max_tokens=12, temperature=0, stream=True
    )
    parts = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert parts[-1].finish_reason == "length"
    assert len("".join(part.delta.content or "" for part in parts)) > 10


def test_openai_tools_reach_the_model(client: openai.OpenAI) -> None:
    """A model of this size does not call them; their description is in its prompt."""
    parameters = {"type": "object", "properties": {"color": {"type": "string"}}, "required": ["color"]}
    tool: Any = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": parameters}}
    read = {}
    given: tuple[Any, ...] = ([], [tool])
    for tools in given:
        answer = client.chat.completions.create(
            model="any",
            messages=messages("paint it"),
            max_tokens=4,
            temperature=0,
            **({"tools": tools} if tools else {}),
        )
        assert answer.usage is not None
        read[len(tools)] = answer.usage.prompt_tokens
    assert read[1] > read[0] + 50


def test_openai_gets_a_tool_call(llama_agq: Path, tmp_path: Path) -> None:
    """One that is required, whole and streamed: the tool's name, and arguments as its schema has them.

    Without a push towards the end of text, which the grammar allows after a call, this model calls again and again.
    """
    template = tmp_path / "calls.jinja"
    template.write_text(CALLING_TEMPLATE, encoding="utf-8")
    properties = {"color": {"type": "string", "enum": ["red", "blue"]}, "twice": {"type": "boolean"}}
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    tool = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": parameters}}
    with running_server(llama_agq, "-c", CONTEXT, "--slots", 1, "--", "--chat-template-file", template) as (url, _):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120)
        wanted: dict[str, Any] = {
            "model": "any", "messages": messages("paint the door"), "tools": [tool], "tool_choice": "required",
            "max_tokens": 120, "temperature": 0, "logit_bias": {END: 100},
        }  # fmt: skip
        answer = client.chat.completions.create(**wanted).choices[0]
        parts = [part.choices[0] for part in client.chat.completions.create(stream=True, **wanted) if part.choices]
    assert answer.finish_reason == parts[-1].finish_reason == "tool_calls"
    [call] = answer.message.tool_calls
    streamed = [call.function for part in parts for call in part.delta.tool_calls or []]
    assert call.function.name == "".join(function.name or "" for function in streamed) == "paint"
    for text in (call.function.arguments, "".join(function.arguments or "" for function in streamed)):
        given = json.loads(text)
        assert given.keys() == properties.keys()
        assert given["color"] in ("red", "blue") and isinstance(given["twice"], bool)


def test_openai_json_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"door": {"type": "boolean"}}, "required": ["door"]}
    format_: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model="any", messages=messages("is it a door"), response_format=format_, max_tokens=60, temperature=0
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert isinstance(found["door"], bool)


def test_langchain(server: tuple[str, int]) -> None:
    """Needs langchain-openai, which is not among the packages for tests."""
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=server[0] + "/v1", api_key="none", model="any", max_tokens=8, temperature=0
    )
    assert len(str(chat.invoke("the blue door").content)) > 5
    assert len("".join(str(part.content) for part in chat.stream("the blue door"))) > 5


@pytest.fixture(scope="module")
def story(packaged_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The story model with all matrices AGQ4: it runs where a server's own kernels are too new for the CPU."""
    path = tmp_path_factory.mktemp("story") / "story.gguf"
    options = QuantizeOptions(threads=1, output_type="agq4", embedding_type="agq4")
    quantize(packaged_model, path, calibration=packaged_model.with_name("calibration.txt"), options=options)
    return path


@needs_chromium
def test_the_page_in_a_browser(story: Path, tmp_path: Path) -> None:
    with running_server(story) as (url, _):
        try:
            # The page may exist in compressed form only.
            urllib.request.urlopen(urllib.request.Request(url, headers={"accept-encoding": "gzip"}), timeout=30).close()
        except urllib.error.HTTPError as e:
            e.close()
            pytest.skip(f"this llama-server was built without its page: {e}")
        with Browser(tmp_path) as page:
            page.open(url)
            page.wait("document.querySelector('textarea') !== null")
            seen = 0
            while seen < len(page.requests()):  # a question asked while the page still loads gets lost in it
                seen = len(page.requests())
                time.sleep(3)
                page.run("0")  # reads the events
            page.run("document.querySelector('textarea').focus(); 0")
            page.call("Input.insertText", text="who found the key?")
            page.wait("document.querySelector('textarea').value.endsWith('?')")
            for kind in ("rawKeyDown", "keyUp"):
                page.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13)
            # The model's stories have sentences such as "Ivy found the key."
            page.wait(r"/the key\?[^]* the key[^?]*\./.test(document.body.innerText)")
            assert not page.problems()


def test_a_prompt_beyond_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="any", prompt="the red key " * CONTEXT, max_tokens=4)
    assert client.completions.create(model="any", prompt="the", max_tokens=4).choices[0].text


def test_a_cancelled_request_frees_its_slot(server: tuple[str, int], client: openai.OpenAI) -> None:
    for _ in range(2 * PEOPLE):
        stream = client.completions.create(model="any", prompt="the king", max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
    assert client.completions.create(model="any", prompt="the", max_tokens=4).choices[0].text
    for _ in range(100):
        slots = json.loads(urllib.request.urlopen(server[0] + "/slots", timeout=30).read())
        if not any(slot["is_processing"] for slot in slots):
            break
        time.sleep(0.1)
    assert not any(slot["is_processing"] for slot in slots)


def resident(process: int) -> int:
    """Bytes of the server's memory: of the process that `serve` started, or of itself."""
    server = (started_by(process) or [process])[0]
    status = Path(f"/proc/{server}/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])


def test_mixed_load(server: tuple[str, int], client: openai.OpenAI) -> None:
    """Eight people for a while, each doing everything in turn: all is answered, and memory does not grow."""
    prompts = [f"the {color} key in the box" for color in ("red", "blue", "green", "black")]
    url, process = server

    def complete(prompt: str) -> str:
        """Computes the whole prompt: behind a cached part, few tokens are computed at once, with other last bits."""
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "cache_prompt": False}
        return str(json.loads(ask(url, "/v1/completions", body))["choices"][0]["text"])

    alone = {prompt: complete(prompt) for prompt in prompts}
    done: Counter[str] = Counter()
    failures: list[str] = []
    end = time.monotonic() + SECONDS

    def person(number: int) -> None:
        luck = random.Random(number)
        while time.monotonic() < end and not failures:
            what = luck.choice(("complete", "stream", "cancel", "schema", "too long"))
            prompt = luck.choice(prompts)
            try:
                if what == "complete":
                    done["same" if complete(prompt) == alone[prompt] else "other"] += 1
                elif what == "schema":
                    body = {"prompt": prompt, "max_tokens": 30, "json_schema": {"type": "boolean"}}
                    assert json.loads(json.loads(ask(url, "/completion", body))["content"]) in (True, False)
                elif what == "too long":
                    with pytest.raises(openai.BadRequestError):
                        client.completions.create(model="any", prompt="the red key " * CONTEXT, max_tokens=4)
                else:
                    stream = client.completions.create(model="any", prompt=prompt, max_tokens=60, stream=True)
                    count = 0
                    for count, _ in enumerate(stream, 1):
                        if what == "cancel" and count > luck.randrange(20):
                            stream.close()
                            break
                    assert count > 0
                done[what] += 1
            except Exception as e:
                failures.append(f"{what}: {e!r}")

    begun = resident(process)
    people = [threading.Thread(target=person, args=(i,)) for i in range(PEOPLE)]
    for one in people:
        one.start()
    time.sleep(SECONDS / 3)
    third = resident(process)
    for one in people:
        one.join()
    print(f"\n{dict(done)}; memory {begun >> 20}, {third >> 20}, {resident(process) >> 20} MiB")
    assert not failures and min(done[kind] for kind in ("complete", "stream", "cancel", "schema", "too long")) > 0
    assert done["same"] >= 0.99 * done["complete"]
    assert resident(process) < 1.1 * third
