"""The reason why a model's graph cannot run in PyTorch."""

from __future__ import annotations


class Unsupported(Exception):
    """The text says what the graph has, as a clause about the model: "its graph has RWKV_WKV7, which ...".

    Users never see it as an error: `best` becomes `balanced`, with the text in a warning.
    """
