"""Turns a conversation into a prompt: by the model's own template, by a template file, or by a format of llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError
from agq_gguf.runtime.library import llama_api

if TYPE_CHECKING:
    from agq_gguf.runtime.model import Model

Message = dict[str, str]  # role and content

_TEMPLATE_KEY = b"tokenizer.chat_template"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and whether it begins with the model's special tokens already."""

    text: str
    has_special: bool
    stops: tuple[str, ...] = ()  # texts that end the answer


Formatter = Callable[[Sequence[Message]], Prompt]


def prompt_tokens(model: Model, text: str) -> NDArray[np.int32]:
    """Token ids of a prompt that a template made: the beginning token is added only if the text does not have it."""
    found = model.tokenize(text, add_special=False, parse_special=True)
    begins = model.add_bos and not (len(found) and found[0] == model.bos)
    return np.concatenate([np.array([model.bos], np.int32), found]) if begins else found


def plain(messages: Sequence[Message]) -> Prompt:
    """The texts one after another, for models that were never taught to chat."""
    return Prompt("\n".join(message["content"] for message in messages) + "\n", False)


def own_template(model: Model) -> str:
    """The chat template in the model's file; empty if it has none."""
    api = llama_api()
    room = 1 << 12
    while True:
        raw = ctypes.create_string_buffer(room)
        n = api.llama_model_meta_val_str(model.handle, _TEMPLATE_KEY, raw, room)
        if n < room:
            return raw.value.decode("utf-8", "replace") if n > 0 else ""
        room = n + 1


def by_template(model: Model, template: str, origin: str) -> Formatter:
    """A formatter by a Jinja template; `origin` names it in messages.

    Raises InputError if jinja2 cannot compile the template, and when a conversation does not suit it.
    """
    from jinja2 import TemplateError
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        render: Any = Jinja2ChatFormatter(template, model.text_of(model.eos), model.text_of(model.bos))
    except TemplateError as e:
        raise InputError(_unusable(origin, "cannot be compiled", e)) from e

    def formatted(messages: Sequence[Message]) -> Prompt:
        try:
            found = render(messages=list(messages))
        except (TemplateError, ValueError, TypeError, AttributeError, LookupError) as e:
            raise InputError(_unusable(origin, "cannot show this conversation", e)) from e
        stops = [found.stop] if isinstance(found.stop, str) else list(found.stop or [])
        return Prompt(found.prompt, True, tuple(stop for stop in stops if stop))

    return formatted


def _unusable(origin: str, problem: str, cause: Exception) -> str:
    reason = str(cause).rstrip(".")
    return f"{origin}: the chat template {problem}: {reason}; choose another with --chat-format or --template"


def format_names() -> list[str]:
    """The names of llama.cpp's own formats."""
    api = llama_api()
    n = api.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * n)()
    api.llama_chat_builtin_templates(names, n)
    return sorted(name.decode() for name in names if name)


def by_name(name: str) -> Formatter:
    """A formatter by one of llama.cpp's own formats. Raises InputError for other names."""
    if name not in (known := format_names()):
        raise InputError(f"chat format must be one of {', '.join(known)}, got {name!r}")
    api = llama_api()

    def formatted(messages: Sequence[Message]) -> Prompt:
        chat = (api.llama_chat_message * len(messages))()
        for entry, message in zip(chat, messages, strict=True):
            entry.role, entry.content = message["role"].encode(), message["content"].encode("utf-8", "replace")
        room = 256 + 2 * sum(len(message["content"].encode("utf-8", "replace")) + 64 for message in messages)
        while True:
            raw = ctypes.create_string_buffer(room)
            n = api.llama_chat_apply_template(name.encode(), chat, len(messages), True, raw, room)
            if n < 0:
                raise InputError(f"the chat format {name} cannot show this conversation; choose another")
            if n <= room:
                return Prompt(raw.raw[:n].decode("utf-8", "replace"), True)
            room = n

    return formatted
