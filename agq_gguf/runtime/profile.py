"""Time per kind of graph node, measured by the plugin while a model runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agq_gguf.errors import HostError
from agq_gguf.native import plugin_library
from agq_gguf.runtime.plugin import is_registered


@dataclass(frozen=True)
class NodeTime:
    """Total time of all nodes of one kind."""

    kind: str  # the operation; for matrix products also the matrix
    nodes: int
    seconds: float


@contextmanager
def profiled(*, cpu_time: bool = False) -> Iterator[list[NodeTime]]:
    """Measures the nodes that run inside the block. At its end the list is filled, longest time first.

    Raises HostError if the plugin is not registered. Models without AGQ4 tensors are measured only after the process
    has loaded a model with AGQ4 tensors. The clocks are extra nodes, so a step takes slightly longer. `cpu_time` counts
    CPU time instead of wall time: use it with one thread, on a machine that runs other work.
    """
    if not is_registered():
        raise HostError("profiling needs the plugin, which is not registered; load a model with AGQ4 tensors first")
    found: list[NodeTime] = []
    with plugin_library() as plugin:
        plugin.agq_profile(2 if cpu_time else 1)
        try:
            yield found
        finally:
            plugin.agq_profile(0)
            text = ctypes.create_string_buffer(plugin.agq_profile_report(None, 0))
            plugin.agq_profile_report(text, len(text))
            lines = (line.split("\t") for line in text.raw.decode("utf-8", "replace").splitlines())
            times = [NodeTime(kind, int(nodes), int(nanoseconds) * 1e-9) for kind, nodes, nanoseconds in lines]
            found += sorted(times, key=lambda time: -time.seconds)
