"""Dialogues rendered with the model's chat template, as `chat` does, but without today's date."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.runtime.chat_format import own_template
from agq_gguf.runtime.model import Model
from agq_gguf.text import Dialogue, Piece

_DATE = datetime(2026, 1, 1)  # for templates that tell the model the date: the same tokens come out every day

Turns = tuple[tuple[str, str], ...]


def tokens_of(model: Model, pieces: Iterable[Piece]) -> tuple[NDArray[np.int32], list[str]]:
    """Token ids of a text without special tokens at its ends, and warnings.

    Dialogues are plain text if the model has no chat template. If its template fails they are, too, with a warning.
    """
    kept = tuple(pieces)
    rendered, warnings = _rendered(model, [piece for piece in kept if isinstance(piece, Dialogue)])
    tokens = [np.empty(0, np.int32)]
    for piece in kept:
        if isinstance(piece, str):
            tokens.append(model.tokenize(piece, add_special=False))
        elif rendered:
            tokens.append(model.tokenize(rendered[piece], add_special=False, parse_special=True))
        else:
            tokens.append(model.tokenize(piece.plain, add_special=False))
    return np.concatenate(tokens), warnings


def prompt_renderer(model: Model) -> Callable[[Turns], str] | None:
    """Renders turns, the last of them the user's, as the text of a prompt up to the header of the assistant's turn.

    None if the model has no chat template, or one that fails or does not show what a user says as it is. The texts are
    the same every day, and begin with the model's beginning token if its template writes it.
    """
    template, said = own_template(model), "What is said here?"
    try:
        render = _renderer(model, template, asks=True) if template else None
        return render if render and render((("user", said),)).count(said) == 1 else None
    except Exception:  # a template is a program from the file; it may raise anything
        return None


def _rendered(model: Model, dialogues: list[Dialogue]) -> tuple[dict[Dialogue, str], list[str]]:
    """Dialogue -> its text in the model's template; nothing if that does not work."""
    template = own_template(model)
    if not dialogues or not template:
        return {}, []
    try:
        render = _renderer(model, template)
        return {dialogue: _one(render, dialogue.turns) for dialogue in dialogues}, []
    except Exception as e:  # a template is a program from the file; whatever it raises, the text is still of use
        reason = " ".join(str(e).split()) or type(e).__name__
        return {}, [
            f"the model's chat template cannot be used ({reason[:200]}); the dialogues of the calibration text were "
            "read as plain text"
        ]


def _one(render: Callable[[Turns], str], turns: Turns) -> str:
    """A dialogue in the template. Templates without a role for the system get its words in the user's first turn."""
    try:
        return render(turns)
    except Exception:
        if turns[0][0] != "system":
            raise
        (_, system), (role, first), *rest = turns
        return render(((role, f"{system}\n\n{first}"), *rest))


def _renderer(model: Model, template: str, *, asks: bool = False) -> Callable[[Turns], str]:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    class Formatter(Jinja2ChatFormatter):
        @staticmethod
        def strftime_now(f: str) -> str:
            return _DATE.strftime(f)

    # Each chunk of a calibration text begins with the token for the beginning; dialogues in the middle of one do not.
    bos = model.text_of(model.bos) if asks else ""
    formatter = Formatter(template, eos_token=model.text_of(model.eos), bos_token=bos, add_generation_prompt=asks)

    def render(turns: Turns) -> str:
        messages: Any = [{"role": role, "content": content} for role, content in turns]
        text = formatter(messages=messages).prompt
        if not text.strip():
            raise ValueError("it gives no text")
        return text

    return render
