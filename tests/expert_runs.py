"""Runs models with experts and keeps what comes out, in a process of its own: AGQ_FUSE is read once in a process.

    python tests/expert_runs.py SUFFIX MODEL...

Writes MODEL + SUFFIX, an .npz file, for each model: logits of several situations, and tensors that were asked for. A
file MODEL + ".lora" is an adapter for it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
from low_level import LowContext, LowModel, tokens

from agq_gguf.runtime.ggml import GgmlTensor

ASKED = (
    "ffn_norm", "attn_post_norm", "ffn_moe_probs", "ffn_moe_topk", "ffn_moe_weights", "ffn_moe_weights_sum",
    "ffn_moe_weights_norm", "ffn_moe_gate", "ffn_moe_up", "ffn_moe_gate_biased", "ffn_moe_up_biased",
    "ffn_moe_swiglu", "ffn_moe_swiglu_oai", "ffn_moe_down", "ffn_moe_down_biased", "ffn_moe_weighted", "ffn_moe_out",
)  # fmt: skip
TERMS = ("ffn_moe_down_biased", "ffn_moe_down", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights")
Found = dict[str, np.ndarray]


class Watcher:
    """An evaluation callback that keeps the tensors with some names."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.found = names, Found()

    def __call__(self, address: Any, ask: bool, _: Any) -> bool:
        t = ctypes.cast(address, ctypes.POINTER(GgmlTensor)).contents
        name = t.name.decode()
        wanted = name.rpartition("-")[0] in self.names
        if wanted and not ask:
            size = sum((n - 1) * step for n, step in zip(t.ne, t.nb, strict=True)) + 4
            raw = np.frombuffer(ctypes.string_at(t.data, size), np.int32 if "topk" in name else np.float32)
            strides, shape = tuple(t.nb)[::-1], tuple(t.ne)[::-1]
            self.found[name] = np.lib.stride_tricks.as_strided(raw, shape, strides).copy()
        return wanted


def texts(context: LowContext) -> np.ndarray:
    """Logits of texts of 1, 3 and 40 tokens, each from an empty cache, and of single tokens after the last."""
    found = []
    for n in (1, 3, 40):
        api.llama_memory_clear(context.memory, True)
        found.append(context.decode(tokens(n, n), outputs=range(n)))
    found += [context.decode([50 + i], 40 + i) for i in range(3)]
    return np.concatenate(found)


def watched(model: LowModel, names: tuple[str, ...], n: int) -> tuple[np.ndarray, Found]:
    """Logits of a text of `n` tokens, and what the callback has seen."""
    watcher = Watcher(names)
    with model.context(n_ctx=64, callback=watcher) as context:
        return context.decode(tokens(n, n)), watcher.found


def steered(context: LowContext) -> np.ndarray:
    """With a control vector in all layers behind the first."""
    width, layers = api.llama_model_n_embd(context.model.model), api.llama_model_n_layer(context.model.model)
    vector = (np.random.default_rng(1).standard_normal(width * layers) / 4).astype(np.float32)
    data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert api.llama_set_adapter_cvec(context.context, data, vector.size, width, 1, layers) == 0
    return texts(context)


def adapted(context: LowContext, path: Path) -> np.ndarray:
    adapter = api.llama_adapter_lora_init(context.model.model, os.fsencode(path))
    assert adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert api.llama_set_adapter_lora(context.context, adapter, 1.0) == 0
    return texts(context)


def run(path: Path) -> Found:
    found = Found()

    def in_context(what: Callable[..., np.ndarray], *arguments: object) -> np.ndarray:
        with model.context(n_ctx=64, threads=2) as context:
            return what(context, *arguments)

    with LowModel(path) as model:
        found["plain"] = in_context(texts)
        found["steered"] = in_context(steered)
        for n, names in ((1, ASKED), (40, ASKED[::4])):
            for name in names:
                logits, tensors = watched(model, (name,), n)
                if tensors:
                    found[f"logits/{name}/{n}"] = logits
                    found.update({f"tensor/{key}/{n}": value for key, value in tensors.items()})
            _, tensors = watched(model, (*TERMS, "ffn_moe_out"), n)
            found.update({f"terms/{key}/{n}": value for key, value in tensors.items()})
        adapter = path.with_name(path.name + ".lora")
        if adapter.exists():
            found["adapted"] = in_context(adapted, adapter)
    return found


if __name__ == "__main__":
    for name in sys.argv[2:]:
        np.savez(name + sys.argv[1], **run(Path(name)))  # type: ignore[arg-type]
