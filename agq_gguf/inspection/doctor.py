"""Looks at everything that decides whether AGQ4 runs here, and how fast: what a bug report should contain."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from agq_gguf import native
from agq_gguf._version import __version__
from agq_gguf.errors import HostError
from agq_gguf.inspection.program import Program, examine
from agq_gguf.runtime import plugin
from agq_gguf.runtime.cpus import AvailableCpus, available_cpus
from agq_gguf.runtime.host import Host, loaded_host, open_host
from agq_gguf.runtime.machine import Kernel, Processor, Speed, kernels, measure_speed, processor

_PACKAGES = ("llama-cpp-python", "xllamacpp", "gguf", "numpy", "torch")
_OURS = ("GGML_BACKEND_PATH", "LD_PRELOAD", "LLAMA_CPP_LIB_PATH")  # and all that begin with AGQ_, but for the key
_SECRET = "AGQ_API_KEY"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_BUSY = 0.9  # a smaller share of the CPUs than this means that others use them, too


@dataclass(frozen=True)
class HostFacts:
    """The llama.cpp that the plugin was loaded into, or was to be loaded into."""

    name: str
    library: str | None  # file that holds ggml; None: unknown
    ggml_version: str
    api_version: int | None  # GGML_BACKEND_API_VERSION of its CPU backend; None: it has no CPU backend


@dataclass(frozen=True)
class Proof:
    """One proof of the host's ABI."""

    name: str
    passed: bool
    found: str
    microseconds: float


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found out. What could not be found out is None, and the field `..._problem` says why."""

    versions: dict[str, str]  # of this package, Python, the system and packages; only what is installed
    processor: Processor
    cpus: AvailableCpus
    threads: int  # that the speed was measured with
    environment: dict[str, str]  # variables that change what the plugin does
    plugin: str | None  # path
    plugin_problem: str | None
    kernels: list[Kernel]
    host: HostFacts | None
    host_problem: str | None
    proofs: list[Proof]
    registered: bool
    registration_problem: str | None
    speed: Speed | None  # None: not measured
    slow: list[str]  # what makes it slow here, one sentence each
    program: Program | None  # None: none was named


def diagnose(
    *,
    library: str | os.PathLike[str] | None = None,
    program: str | os.PathLike[str] | None = None,
    threads: int = 0,
    seconds: float = 2.0,
) -> Diagnosis:
    """Examines the machine, the host and the plugin, and loads the plugin into the host.

    `library` is the libllama or libggml to use in place of llama-cpp-python's. `program` is one of llama.cpp's
    programs. The speed is measured with `threads` threads (0: all that this process may use) for `seconds`; 0: not at
    all. Raises InputError if the program cannot be examined.
    """
    cpus = available_cpus()
    threads = threads or cpus.threads
    path, plugin_problem, found_kernels, speed = None, None, [], None
    try:
        path, found_kernels = str(native.backend_path()), kernels()
        speed = measure_speed(threads, seconds) if seconds > 0 else None
    except HostError as error:
        plugin_problem = str(error)
    host, host_problem = _find_host(library)
    proofs, registration_problem = _register(host, library) if host and path else ([], None)
    return Diagnosis(
        versions=_versions(),
        processor=processor(),
        cpus=cpus,
        threads=threads,
        environment=_environment(),
        plugin=path,
        plugin_problem=plugin_problem,
        kernels=found_kernels,
        host=_facts(host) if host else None,
        host_problem=host_problem,
        proofs=proofs,
        registered=bool(host and host.has_plugin),
        registration_problem=registration_problem,
        speed=speed,
        slow=_slow(cpus, found_kernels, threads, speed),
        program=examine(program, Path(path)) if program is not None and path else None,
    )


def _versions() -> dict[str, str]:
    found = {
        "agq-gguf": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "C library": " ".join(platform.libc_ver()).strip(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def _environment() -> dict[str, str]:
    return {
        name: "(not shown)" if name == _SECRET else value
        for name, value in sorted(os.environ.items())
        if name in _OURS or name.startswith("AGQ_")
    }


def _find_host(library: str | os.PathLike[str] | None) -> tuple[Host | None, str | None]:
    try:
        if library is not None:
            return open_host(library), None
        if find_spec("llama_cpp") is None and find_spec("xllamacpp") is not None:
            import_module("xllamacpp")
        return loaded_host(), None
    except (HostError, ImportError, OSError) as error:
        return None, str(error)


def _facts(host: Host) -> HostFacts:
    registry = host.library.ggml_backend_reg_by_name(b"CPU")
    # The version is the first member of struct ggml_backend_reg, and is there so that others can read it.
    api_version = ctypes.c_int.from_address(registry).value if registry else None
    return HostFacts(host.name, _file_of(host.library.ggml_version), host.ggml_version, api_version)


class _DlInfo(ctypes.Structure):
    """What dladdr(3) fills in."""

    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol", ctypes.c_void_p),
    )


def _file_of(function: object) -> str | None:
    """The library that holds a function."""
    if sys.platform == "win32":
        return None
    info = _DlInfo()
    address = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(info)) or not info.file_name:
        return None
    return os.fsdecode(info.file_name)


def _register(host: Host, library: str | os.PathLike[str] | None) -> tuple[list[Proof], str | None]:
    """The proofs that were made, and why the plugin could not be loaded."""
    problem = None
    with native.plugin_library() as opened:  # or the proofs would be gone with a plugin that refuses
        if not host.has_plugin:
            try:
                plugin.register(library)
            except HostError as error:
                problem = str(error)
        return _proofs(opened), problem


def _proofs(library: ctypes.CDLL) -> list[Proof]:
    name, found = ctypes.c_char_p(), ctypes.c_char_p()
    passed, time = ctypes.c_int32(), ctypes.c_double()
    proofs: list[Proof] = []
    while library.agq_abi_proof(
        len(proofs), ctypes.byref(name), ctypes.byref(found), ctypes.byref(passed), ctypes.byref(time)
    ):
        texts = [(text.value or b"").decode("utf-8", "replace") for text in (name, found)]
        proofs.append(Proof(texts[0], bool(passed.value), texts[1], time.value))
    return proofs


def _has_huge_pages() -> bool:
    """Whether Linux puts memory into huge pages for programs that ask for them, as the plugin does for weights."""
    try:
        return "[never]" not in _HUGE_PAGES.read_text(encoding="ascii")
    except OSError:
        return False


def _slow(cpus: AvailableCpus, found: list[Kernel], threads: int, speed: Speed | None) -> list[str]:
    """What makes models slow here, or would with wrong settings."""
    reasons = []
    chosen = next((kernel.name for kernel in found if kernel.chosen), None)
    best = next((kernel.name for kernel in found if kernel.supported), None)
    if found and chosen is None:
        reasons.append(f"AGQ_FORCE_ISA is {os.environ.get('AGQ_FORCE_ISA')!r}, which cannot run here")
    elif chosen != best:
        reasons.append(f"AGQ_FORCE_ISA makes products run with the kernel {chosen}; unset it to use {best}")
    if best is not None and best != found[0].name:
        reasons.append(f"this CPU or its operating system cannot run the fastest kernel, {found[0].name}")
    if threads > cpus.threads:
        reasons.append(
            f"{threads} threads, but this process may use {cpus.threads} CPUs; the threads wait for each other"
        )
    if cpus.quota is not None and int(cpus.quota.cpus) < cpus.allowed:
        reasons.append(
            f"a quota of {cpus.quota.cpus:g} CPUs ({cpus.quota.file}), though {cpus.allowed} are visible; programs "
            f"that start a thread for each visible CPU are slow, so give them {cpus.threads} threads"
        )
    if cpus.cores is not None and cpus.cores < min(threads, cpus.allowed):
        reasons.append(f"{cpus.allowed} CPUs are threads of {cpus.cores} cores; try {cpus.cores} threads")
    if sys.platform == "linux" and not _has_huge_pages():
        reasons.append(f"the system gives no huge pages, in which weights are read faster ({_HUGE_PAGES})")
    elif os.environ.get("AGQ_HUGE_PAGES") == "off":
        reasons.append("AGQ_HUGE_PAGES is off; weights are read faster from huge pages")
    if speed is not None and threads <= cpus.threads and speed.cpu_share < _BUSY:
        reasons.append(
            f"other work uses the CPUs: the threads ran {speed.cpu_share:.0%} of the time; the speeds above are too low"
        )
    return reasons
