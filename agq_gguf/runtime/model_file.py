"""Checks a model file before llama.cpp opens it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from agq_gguf.errors import HostError, InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.gguf_io.tensor_names import is_further_prediction, layer_of, split_name
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.plugin import register_for_models

# How a model makes one embedding of a text: llama.h's LLAMA_POOLING_TYPE_*.
POOLING_NONE, POOLING_LAST, POOLING_RANK = 0, 3, 4
_VOCABULARY_KEYS = {"tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"}


@dataclass(frozen=True)
class FileFacts:
    """Facts about a model file that are needed before it is loaded."""

    agq_tensors: int
    causal: bool  # False: an encoder, which predicts no next token
    pooling: int  # one of POOLING_*, or another one of llama.cpp's
    n_ctx_train: int  # tokens; 0 if the file does not say
    positions: int  # learned positions: the model cannot run beyond them; 0: it has rotary or other positions
    tokens: bytes  # the vocabulary, as bytes of the file
    cache_bytes: int  # of keys and values of a token in F16, without sliding windows; 0: none, or not known

    @property
    def embeds(self) -> bool:
        """Whether its embeddings are what it is for: an encoder, or a model whose file says how to pool tokens."""
        return not self.causal or self.pooling > POOLING_NONE


def check_model_file(path: str | os.PathLike[str]) -> FileFacts:
    """Reads the whole header. Raises InputError with a reason, where llama.cpp would only say that loading failed."""
    with open_model(path) as reader:
        if not reader.architecture or not reader.tensors:
            raise InputError(f"{path}: not a model: the GGUF file has no architecture or no tensors")
        vocabulary = [reader.metadata[key].raw for key in sorted(reader.metadata) if key in _VOCABULARY_KEYS]
        return FileFacts(
            sum(tensor.type_name == blocks.TYPE_NAME for tensor in reader.tensors.values()),
            reader.flag(f"{reader.architecture}.attention.causal", True),
            int(reader.number(f"{reader.architecture}.pooling_type", POOLING_NONE)),
            int(reader.number(f"{reader.architecture}.context_length", 0)),
            _positions(reader),
            b"".join(vocabulary),
            _cache_bytes(reader),
        )


def _positions(reader: Reader) -> int:
    table = reader.tensors.get("position_embd.weight")
    return table.shape[0] if table is not None and len(table.shape) == 2 else 0


def _cache_bytes(reader: Reader) -> int:
    """Bytes of keys and values for each token, in F16, by the shapes of the matrices that make them; 0 for MLA."""
    apart = {  # layers without such a cache
        layer_of(name)
        for name in reader.tensors
        if is_further_prediction(name) or name.endswith(".attn_kv_a_mqa.weight")
    }
    rows = 0
    for name, tensor in reader.tensors.items():
        layer, kind = split_name(name)
        output = reader.tensors.get(f"blk.{layer}.attn_output.weight")
        if layer in apart or output is None or len(tensor.shape) != 2:
            continue
        if kind in ("attn_k.weight", "attn_v.weight"):
            rows += tensor.shape[0]
        elif kind == "attn_qkv.weight":
            rows += max(tensor.shape[0] - output.shape[-1], 0)
    return 2 * rows


def prepare(path: str | os.PathLike[str]) -> FileFacts:
    """Checks a model file and registers the plugin if the file needs it. Raises InputError or HostError."""
    facts = check_model_file(path)
    if facts.agq_tensors:
        try:
            with quiet_log():
                register_for_models()
        except HostError as e:
            message = f"{path} holds {facts.agq_tensors} AGQ4 tensors, which need the AGQ plugin; {e}"
            raise HostError(message) from e
    return facts
