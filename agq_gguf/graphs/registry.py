"""Chooses the PyTorch graph of a model, or says why it is not supported."""

from __future__ import annotations

from agq_gguf.gguf_io.reader import Reader
from agq_gguf.graphs import bloom_mpt, llama
from agq_gguf.graphs.bloom_mpt import GeluGraph
from agq_gguf.graphs.llama import LlamaGraph

ARCHITECTURES = (*llama.ARCHITECTURES, *bloom_mpt.ARCHITECTURES)


def why_not(reader: Reader) -> str:
    """Why no PyTorch graph supports this model; empty if one does."""
    if reader.architecture not in ARCHITECTURES:
        return f"architecture {reader.architecture}; supported are {', '.join(ARCHITECTURES)}"
    return (bloom_mpt if reader.architecture in bloom_mpt.ARCHITECTURES else llama).why_not(reader)


def graph_of(reader: Reader, cache: int) -> LlamaGraph:
    """The graph of a model that `why_not` finds supported; it caches up to `cache` bytes of weights."""
    return (GeluGraph if reader.architecture in bloom_mpt.ARCHITECTURES else LlamaGraph)(reader, cache)
