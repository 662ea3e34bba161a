"""Time per kind of node, measured inside the plugin while a model runs."""

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
    """All nodes of one kind."""

    kind: str  # operation, and for matrix products which matrix
    nodes: int
    seconds: float


@contextmanager
def profiled(*, cpu_time: bool = False) -> Iterator[list[NodeTime]]:
    """Collects into the list, which is filled at the end with the longest time first, what runs inside the context.

    The plugin must be registered, else HostError. Models without AGQ4 are measured too, once the process has loaded one
    with it. Clocks are nodes of their own, so that a step takes a little longer than without them. `cpu_time` counts
    what one thread really ran, for contexts with one thread on a machine that is busy with other work.
    """
    if not is_registered():
        raise HostError("the plugin is not registered, it cannot measure nodes")
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
