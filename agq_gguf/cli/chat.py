"""The commands `generate` and `chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Context, ModelArgument, Seed, Temperature, Threads
from agq_gguf.cli.prune import pruning, read_prompt


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
    from agq_gguf.runtime.text import generated_text, open_llama

    with pruning(prune):
        llama = open_llama(model, context=context, threads=threads)
    try:
        start = read_prompt(llama, model, prompt) if show_pruned else prompt
        _stream(generated_text(llama, start, tokens=tokens, temperature=temperature, seed=seed))
    finally:
        llama.close()


def chat(
    model: ModelArgument,
    system: Annotated[str, typer.Option(help="System prompt.", show_default=False)] = "",
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Maximum number of tokens per answer.")] = 512,
    temperature: Temperature = 0.8,
    seed: Seed = -1,
    context: Context = 0,
    threads: Threads = 0,
) -> None:
    """Chat with a model, line by line; end with Ctrl-D.

    Lines may also come from a pipe.
    """
    from agq_gguf.runtime.text import chat_answer, open_llama

    llama = open_llama(model, context=context, threads=threads)
    messages = [{"role": "system", "content": system}] if system else []
    try:
        while True:
            if sys.stdin.isatty():
                sys.stdout.write("> ")
                sys.stdout.flush()
            line = sys.stdin.readline()
            if not line:
                break
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.strip()})
            answer = _stream(chat_answer(llama, messages, tokens=tokens, temperature=temperature, seed=seed))
            messages.append({"role": "assistant", "content": answer})
    finally:
        llama.close()


def _stream(pieces: Any) -> str:
    """Prints pieces of text as they come, then a line end; returns the whole text."""
    whole = []
    for piece in pieces:
        whole.append(piece)
        sys.stdout.write(show.safe(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(whole)
