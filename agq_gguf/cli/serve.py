"""The command `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Context, Threads
from agq_gguf.errors import InputError


def serve(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL",
            help="GGUF file, or a folder of them; llama_cpp.server takes several files.",
            show_default=False,
        ),
    ],
    server: Annotated[
        str,
        typer.Option(
            help="llama-server to use, or python for llama-cpp-python's server; default: the llama-server on PATH, "
            "else llama-cpp-python's.",
            show_default=False,
        ),
    ] = "",
    slots: Annotated[int, typer.Option(min=1, help="Requests that llama-server answers at the same time.")] = 4,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free port.")] = 8000,
    context: Context = 0,
    threads: Threads = 0,
    flash_attention: Annotated[bool, typer.Option("--flash-attn/--no-flash-attn", help="Use flash attention.")] = True,
    api_key: Annotated[
        str,
        typer.Option(envvar="AGQ_API_KEY", help="Key that clients must send; default: no key.", show_default=False),
    ] = "",
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="llama_cpp.server: allow requests for log probabilities.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting of llama_cpp.server.", show_default=False),
    ] = None,
) -> None:
    """Serve a model with an OpenAI-compatible API.

    Starts llama.cpp's llama-server with the plugin if there is one: it answers several people at once and has a web
    page. Given a folder, it loads the models that requests name. What follows -- goes to it. Otherwise runs
    llama-cpp-python's server, which answers one request at a time.
    End with Ctrl-C. Clients find the model at http://HOST:PORT/v1 under its file name without .gguf.
    """
    from agq_gguf.integrations.llama_server import ServerOptions, find_server, serve_with

    # What follows -- counts as further models; an option begins with a dash.
    end = next((i for i, model in enumerate(models) if str(model).startswith("-")), len(models))
    models, rest = models[:end], tuple(map(str, models[end:]))
    of_python = len(models) > 1 or bool(settings) or logprobs
    program = None if server == "python" or (of_python and not server) else find_server(server or None)
    if program is not None:
        if of_python:
            raise InputError(
                "llama-server takes one file or folder, and has no --set or --logprobs; use --server python"
            )
        options = ServerOptions(host, port, context, slots, threads, flash_attention, api_key, rest)
        code = serve_with(program, models[0], options, lambda url: show.say(f"serving at {url}/v1 with {program}"))
        if code:
            raise typer.Exit(code)
        return
    if rest:
        raise InputError(f"expected options of serve, got {' '.join(rest)}; what follows -- is for llama-server")
    note = "" if server == "python" or of_python else _NO_SERVER
    _serve_in_python(models, host, port, context, threads, flash_attention, api_key, logprobs, settings or [], note)


_NO_SERVER = (
    "note: there is no llama-server on PATH: llama-cpp-python's server answers one request at a time, and has no web "
    "page; --server PATH names a llama-server"
)


def _serve_in_python(
    models: list[Path], host: str, port: int, context: int, threads: int, flash_attention: bool, api_key: str,
    logprobs: bool, settings: list[str], note: str,
) -> None:  # fmt: skip
    from agq_gguf.integrations.server import serve as run

    # Without the first, a request ends as soon as another one arrives.
    chosen: dict[str, Any] = {
        "interrupt_requests": False, "flash_attn": flash_attention, "logits_all": logprobs,
    }  # fmt: skip
    if context:
        chosen["n_ctx"] = context
    if threads:
        chosen |= {"n_threads": threads, "n_threads_batch": threads}
    if api_key:
        chosen["api_key"] = api_key
    for entry in settings:
        name, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter(f"--set expects NAME=VALUE, got {entry!r}")
        chosen[name] = _value(value)

    def ready(url: str) -> None:
        show.say(f"serving at {url}/v1")
        if note:
            show.complain(note)

    run(models, host=host, port=port, settings=chosen, ready=ready)


def _value(text: str) -> Any:
    """A value for a setting: lists and objects are JSON; the server converts other text itself."""
    return json.loads(text) if text.startswith(("[", "{")) else text
