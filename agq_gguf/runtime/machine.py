"""The machine: its processor, which kernels it can run, and how fast it reads memory and multiplies."""

from __future__ import annotations

import ctypes
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_gguf.errors import HostError
from agq_gguf.native import plugin_library

READ_BYTES = 256 << 20  # larger than most caches
# Linux's names for the features that determine the speed of ggml and the plugin.
_FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "amx_int8", "asimd", "asimddp", "i8mm", "sve", "sve2",
)  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """What the operating system says about the processor."""

    name: str
    features: list[str]  # those that matter for speed; empty if the system has no /proc/cpuinfo


@dataclass(frozen=True)
class Kernel:
    """A kernel of the plugin."""

    name: str
    supported: bool  # by this CPU and operating system
    chosen: bool  # whether products use it


@dataclass(frozen=True)
class Speed:
    """Speed of all threads together."""

    threads: int
    read_bytes_per_second: float
    operations_per_second: float  # 8-bit by 4-bit products with the chosen kernel; 0: no kernel is chosen
    cpu_share: float  # share of the time in which the threads ran; less than 1 if they waited for a CPU


def processor(root: Path = Path("/")) -> Processor:
    """The processor of this machine. `root` is the folder that holds proc; tests set it."""
    fields: dict[str, str] = {}
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        pass
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Processor(name, [feature for feature in _FEATURES if feature in flags])


def free_memory() -> int | None:
    """Bytes that can be had without swapping, also within the limits of a container; None if the system does not say.

    Raises HostError if the plugin cannot be loaded.
    """
    with plugin_library() as plugin:
        return int(plugin.agq_free_memory()) or None


def kernels() -> list[Kernel]:
    """All kernels of the plugin, best first. Raises HostError if the plugin cannot be loaded."""
    return list(_kernels())


def _kernels() -> Iterator[Kernel]:
    name, supported, chosen = ctypes.c_char_p(), ctypes.c_int32(), ctypes.c_int32()
    with plugin_library() as plugin:
        index = 0
        while plugin.agq_kernel(index, ctypes.byref(name), ctypes.byref(supported), ctypes.byref(chosen)):
            yield Kernel((name.value or b"").decode(), bool(supported.value), bool(chosen.value))
            index += 1


def measure_speed(threads: int, seconds: float = 2.0) -> Speed:
    """Measures for about `seconds` in `threads` threads at once: half the time reads, half the time products.

    Raises HostError if the plugin cannot be loaded or memory runs out.
    """
    n = max(READ_BYTES // 8 // threads // 8 * 8, 1 << 20)  # words that each thread reads
    try:
        with plugin_library() as plugin, ThreadPoolExecutor(threads) as pool:
            begin = threading.Barrier(threads, timeout=60)  # the timeout helps if a thread cannot start
            busy: list[float] = []

            def read(_: int) -> float:
                try:
                    words = np.ones(n, np.uint64)  # in memory near the CPU of the thread
                except MemoryError:
                    begin.abort()
                    raise
                return _share(begin, busy, lambda: plugin.agq_read_speed(words.ctypes.data, n, seconds / 2))

            def multiply(_: int) -> float:
                return _share(begin, busy, lambda: plugin.agq_product_speed(seconds / 2))

            read_speed = sum(pool.map(read, range(threads)))
            operations = sum(pool.map(multiply, range(threads)))
    except (MemoryError, RuntimeError) as error:  # RuntimeError: a thread cannot be started, or the barrier is broken
        raise HostError(f"too little memory or too many threads to measure with {threads} threads") from error
    return Speed(threads, read_speed, operations, min(1.0, float(np.mean(busy))))


def _share(begin: threading.Barrier, busy: list[float], work: Callable[[], float]) -> float:
    """The result of `work`, which all threads start at once. Appends this thread's share of CPU time to `busy`."""
    begin.wait()
    wall, cpu = time.perf_counter(), time.thread_time()
    result = work()
    busy.append((time.thread_time() - cpu) / (time.perf_counter() - wall))
    return result
