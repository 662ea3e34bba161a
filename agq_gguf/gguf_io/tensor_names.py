"""Parses and builds the names of a model's tensors. Tables in the `gguf` package map Hugging Face names to them."""

from __future__ import annotations

import re

OUTPUT = "output.weight"
EMBEDDING = "token_embd.weight"

_IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)
_SUFFIX = ".weight"


def layer_of(name: str) -> int | None:
    """The layer of a tensor; None outside the layers."""
    found = _IN_LAYER.fullmatch(name)
    return int(found[1]) if found else None


def split_name(name: str) -> tuple[int | None, str]:
    """Layer and the rest of the name: (3, ``attn_q.weight``); the layer is None outside the layers."""
    found = _IN_LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found else (None, name)


def kind_of(name: str) -> str:
    """The name without its layer and without ``.weight``, such as ``attn_q``."""
    return split_name(name)[1].removesuffix(_SUFFIX)


def is_further_prediction(name: str) -> bool:
    """Whether the name shows that its layer is a block for multi-token prediction (metadata `nextn_predict_layers`)."""
    return kind_of(name).startswith("nextn.")
