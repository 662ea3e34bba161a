"""Which models run in PyTorch: the graph of each architecture that has one, or why there is none."""

from __future__ import annotations

from agq_gguf import gelu_graph, llama_graph
from agq_gguf.gelu_graph import GeluGraph
from agq_gguf.llama_graph import LlamaGraph
from agq_gguf.reader import Reader

ARCHITECTURES = (*llama_graph.ARCHITECTURES, *gelu_graph.ARCHITECTURES)


def why_not(reader: Reader) -> str:
    """Why this model cannot run here; empty if it can."""
    if reader.architecture not in ARCHITECTURES:
        return f"architecture {reader.architecture}, known here are {', '.join(ARCHITECTURES)}"
    return (gelu_graph if reader.architecture in gelu_graph.ARCHITECTURES else llama_graph).why_not(reader)


def graph_of(reader: Reader, cache: int) -> LlamaGraph:
    """The graph of a model of which `why_not` says nothing; it keeps up to `cache` bytes of weights."""
    return (GeluGraph if reader.architecture in gelu_graph.ARCHITECTURES else LlamaGraph)(reader, cache)
