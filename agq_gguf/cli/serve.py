"""The command `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Context, Threads


def serve(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="GGUF files; the first is the default.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free port.")] = 8000,
    context: Context = 0,
    threads: Threads = 0,
    flash_attention: Annotated[bool, typer.Option("--flash-attn/--no-flash-attn", help="Use flash attention.")] = True,
    api_key: Annotated[
        str,
        typer.Option(envvar="AGQ_API_KEY", help="Key that clients must send; default: no key.", show_default=False),
    ] = "",
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Allow requests for log probabilities.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting of llama_cpp.server.", show_default=False),
    ] = None,
) -> None:
    """Serve models with an OpenAI-compatible API.

    Runs llama-cpp-python's server; end with Ctrl-C. Clients find the models at http://HOST:PORT/v1 under their file
    names without .gguf; /docs describes all routes.
    """
    from agq_gguf.integrations.server import serve as run

    chosen: dict[str, Any] = {"flash_attn": flash_attention, "logits_all": logprobs}
    if context:
        chosen["n_ctx"] = context
    if threads:
        chosen |= {"n_threads": threads, "n_threads_batch": threads}
    if api_key:
        chosen["api_key"] = api_key
    for entry in settings or []:
        name, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter(f"--set expects NAME=VALUE, got {entry!r}")
        chosen[name] = _value(value)
    run(models, host=host, port=port, settings=chosen, ready=lambda url: show.say(f"serving at {url}/v1"))


def _value(text: str) -> Any:
    """A value for a setting: lists and objects are JSON; the server converts other text itself."""
    return json.loads(text) if text.startswith(("[", "{")) else text
