"""Opens graphs in PyTorch, for tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from agq_gguf.gguf_io.reader import Reader, open_gguf
from agq_gguf.graphs import parts
from agq_gguf.graphs.levelled import Pair, levelled
from agq_gguf.graphs.run import Executor
from agq_gguf.graphs.support import graph_for
from agq_gguf.runtime.model import Model


@contextmanager
def opened(path: Path, length: int, cache: int = 1 << 30) -> Iterator[tuple[Executor, Reader, Model]]:
    """The executor of a file's graph for texts of some tokens, not compared with llama.cpp."""
    with open_gguf(path) as reader, Model(path) as model:
        graph = graph_for(reader, model, some_tokens(1, length)[0].numpy().astype(np.int32) % model.n_vocab)
        yield Executor(graph, lambda name: torch.from_numpy(reader.read(name)), cache), reader, model


Opener = Callable[..., Executor]


def some_tokens(n: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens [n, length] that a test model has."""
    return torch.randint(300, 500, (n, length), generator=torch.Generator().manual_seed(seed))


def matrices_of(run: Executor, *, blocks_only: bool = True) -> set[str]:
    """Weights that are multiplied at one place; without the router, and without the output if `blocks_only`."""
    used = parts.products(run.graph)
    return {
        name
        for name, count in used.items()
        if count == 1 and "gate_inp" not in name and (name.startswith("blk.") or not blocks_only)
    }


def pairs_of(run: Executor, wanted: Collection[str], tokens: torch.Tensor) -> list[Pair]:
    """`levelled` on the beginning of a batch."""
    return levelled(run, wanted, tokens[:1])
