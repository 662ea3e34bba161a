"""Would a program of llama.cpp load the plugin, and how? Found out from its file and those of its libraries (Linux).

How it is decided:

- The dynamic linker lists the program's libraries (as ldd does; no code of the program runs), and the dynamic symbols
  of all these files say who defines and who calls which function.
- GGML_BACKEND_PATH is read by ``ggml_backend_load_all``. It works if the program calls that when it starts: because no
  backend is linked in (``ggml_backend_cpu_reg`` is not used by the library that keeps the backends), or because the
  part of it that starts llama.cpp calls it, too. llama.cpp's argument parser calls it, but for a few options only, so
  that does not count.
- LD_PRELOAD works if ``llama_backend_init`` is called through the dynamic linker: the plugin's function of that name is
  then called in its place.
- Whether the program's ggml accepts the plugin is tried: ``--list-devices`` with GGML_BACKEND_PATH must list the device
  AGQ. Together with ``--version`` this is all that is executed, and only if the file holds llama.cpp.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agq_gguf.errors import InputError
from agq_gguf.inspection.elf import Elf, is_elf, read_elf

_LOADER = re.compile(r"(ld-linux[\w.-]*|ld64)\.so\.\d+|ld-musl[\w.-]*\.so\.1")  # glibc's and musl's
_REFUSED = re.compile("cannot be preloaded|error while loading shared libraries")  # glibc's words
_SECONDS = 30
_LOAD_ALL, _INIT, _LINKED_IN = "ggml_backend_load_all", "llama_backend_init", "ggml_backend_cpu_reg"
_NEEDED_BY_PRELOAD = {_INIT, "ggml_backend_load", "ggml_backend_reg_by_name"}
_PARSER = b"LLAMA_ARG_OVERRIDE_TENSOR"  # in llama.cpp's argument parser


@dataclass(frozen=True)
class Way:
    """A way to have the program load the plugin."""

    works: bool
    reason: str


@dataclass(frozen=True)
class Program:
    """What was found out about a program."""

    path: str
    version: str | None  # what it says of itself
    ggml_version: str | None  # from the name of the library; None: unknown
    ggml_library: str | None
    missing_libraries: list[str]
    accepts_plugin: bool | None  # whether its ggml took the plugin; None: it could not be tried
    acceptance: str  # why, or what it said
    backend_path: Way  # GGML_BACKEND_PATH
    preload: Way  # LD_PRELOAD


@dataclass(frozen=True)
class _Files:
    """The program and the libraries that the dynamic linker loads with it."""

    program: Elf
    libraries: list[Elf]
    missing: list[str]

    @property
    def all(self) -> list[Elf]:
        return [self.program, *self.libraries]

    def definer(self, name: str) -> Elf | None:
        return next((file for file in self.all if name in file.defined), None)

    def callers(self, name: str) -> list[Elf]:
        return [file for file in self.all if name in file.undefined]


def examine(name: str | os.PathLike[str], plugin: Path) -> Program:
    """What it takes to have a program load the plugin.

    `name` is a path, or the name of a program on PATH. Raises InputError if it is no program of Linux.
    """
    path = _find(os.fspath(name))
    if sys.platform != "linux":
        raise InputError(f"{path}: programs can be examined on Linux only")
    files, own = _files(path), read_elf(plugin)
    obstacle = _obstacle(files, own)
    version, ggml = None, files.definer("ggml_version")
    accepts, acceptance = None, obstacle or "not tried"
    backend_path = preload = Way(False, obstacle)
    if not obstacle:
        version = _version(path)
        accepts, acceptance = _try_plugin(path, plugin)
        backend_path, preload = _by_variable(files), _by_preload(files, plugin)
        if accepts is False:
            backend_path = preload = Way(False, f"its ggml refuses the plugin: {acceptance}")
    file = Path(ggml.path).resolve() if ggml else None
    numbers = re.search(r"\.so\.(\d+\.\d+\.\d+)$", file.name) if file else None
    return Program(
        path=str(path),
        version=version,
        ggml_version=numbers[1] if numbers else None,
        ggml_library=str(file) if file else None,
        missing_libraries=files.missing,
        accepts_plugin=accepts,
        acceptance=acceptance,
        backend_path=backend_path,
        preload=preload,
    )


def _find(name: str) -> Path:
    found = shutil.which(name) or (name if Path(name).is_file() else None)
    if found is None:
        raise InputError(f"{name}: no such program; give its path, or its name if it is on PATH")
    return Path(found)


def _files(path: Path) -> _Files:
    if not is_elf(path):
        with path.open("rb") as file:
            first = file.readline(200).decode("utf-8", "replace").strip()
        kind = f"a script ({first})" if first.startswith("#!") else "not a program of Linux"
        raise InputError(f"{path}: {kind}; name the program that it starts")
    program = read_elf(path)
    found, missing = _libraries(program)
    return _Files(program, [read_elf(library) for library in found], missing)


def _libraries(program: Elf) -> tuple[list[Path], list[str]]:
    """Files of the libraries that the dynamic linker loads, and the names of those that it does not find."""
    loader = Path(program.interpreter or "")
    if program.interpreter is None or not _LOADER.fullmatch(loader.name) or not loader.is_file():
        return [], list(program.needed)
    if "musl" in loader.name:  # which has no such variable
        listed = _run([str(loader), "--list", str(program.path)])
    else:
        listed = _run([str(loader), str(program.path)], LD_TRACE_LOADED_OBJECTS="1")
    found, missing = [], []
    for line in listed.stdout.splitlines():
        name, arrow, target = line.strip().partition(" => ")
        target = re.sub(r" \(0x[0-9a-f]+\)$", "", target if arrow else name)
        if target == "not found":
            missing.append(name)
        elif Path(target).is_absolute() and is_elf(Path(target)):
            found.append(Path(target))
    return found, missing


def _obstacle(files: _Files, plugin: Elf) -> str:
    """Why no way can work, '' if nothing is in the way."""
    program = files.program
    if program.machine != plugin.machine:
        return "it is for another processor than the plugin"
    if files.missing:
        return f"it cannot start: {', '.join(files.missing)} not found"
    if files.definer("ggml_backend_load") is None:
        if any(file.contains(b"GGML_BACKEND_PATH") for file in files.all):
            return (
                "llama.cpp is linked in statically and offers none of its functions, so the plugin finds none of them"
            )
        return (
            "neither it nor the libraries that it is linked with hold llama.cpp; "
            "if it loads llama.cpp later, as Python does, agq_gguf.register() is the way"
        )
    libc = [name for name in plugin.needed if name.startswith("libc.")]
    if not all(any(name in file.needed for file in files.all) for name in libc):
        return f"it uses another C library than the plugin, which needs {', '.join(libc)}"
    return ""


def _by_variable(files: _Files) -> Way:
    keeper = files.definer(f"{_LOAD_ALL}_from_path")
    if keeper is None:
        return Way(False, "its ggml is too old to look for backends")
    if _LINKED_IN not in keeper.undefined | keeper.defined:
        return Way(True, "its backends are separate files, which it looks for when it starts")
    callers = [file for file in files.callers(_LOAD_ALL) if _INIT not in file.defined]
    starters = [file for file in callers if _INIT in file.undefined and not file.contains(_PARSER)]
    if starters:
        return Way(True, f"{starters[0].path.name} looks for all backends when it starts")
    if any(file.contains(_PARSER) for file in callers):
        return Way(False, "its backends are linked in, and it looks for others only if you also set "
                   "LLAMA_ARG_OVERRIDE_TENSOR='^$=CPU'")  # fmt: skip
    return Way(False, "its backends are linked in, and it never looks for others")


def _by_preload(files: _Files, plugin: Path) -> Way:
    path = files.program.path
    if path.stat().st_mode & 0o6000 or _has_capabilities(path):
        return Way(False, "it runs with the rights of its owner, and then Linux ignores the variable")
    lacking = [name for name in sorted(_NEEDED_BY_PRELOAD) if files.definer(name) is None]
    if lacking:
        return Way(False, f"no library of it offers {lacking[0]}")
    callers = files.callers(_INIT)
    if not callers:
        return Way(False, f"it does not call {_INIT} through the dynamic linker")
    if re.search(r"[\s:]", str(plugin)):
        return Way(False, f"the path {plugin} holds a space or a colon, where LD_PRELOAD ends a name; copy the file")
    shown = _run([str(path), "--version"], LD_PRELOAD=str(plugin))
    refused = [line for line in shown.stderr.splitlines() if _REFUSED.search(line)]
    if refused:
        return Way(False, refused[0])
    return Way(True, f"{callers[0].path.name} calls {_INIT} through the dynamic linker")


def _has_capabilities(path: Path) -> bool:
    try:
        return "security.capability" in os.listxattr(path)
    except OSError:
        return False


def _version(path: Path) -> str | None:
    shown = _run([str(path), "--version"])
    lines = (shown.stdout + shown.stderr).splitlines()
    return next((line.strip() for line in lines if line.startswith("version")), None)


def _try_plugin(path: Path, plugin: Path) -> tuple[bool | None, str]:
    """Whether the program's ggml takes the plugin, and what it said."""
    shown = _run([str(path), "--list-devices"], GGML_BACKEND_PATH=str(plugin))
    lines = [line.strip() for line in (shown.stdout + "\n" + shown.stderr).splitlines()]
    device = next((line for line in lines if line.startswith("AGQ: ")), None)
    if device:
        return True, device
    complaint = next((line for line in lines if re.search(r"\bagq: ", line)), None)
    if complaint:
        return False, re.sub(r"^.*?\bagq: ", "", complaint)
    if any("Available devices" in line for line in lines):
        return False, "it lists its devices, and the plugin's is not among them"
    return None, "it does not list its devices (--list-devices), so this could not be tried"


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without our own variables; one that takes too long or cannot start has said nothing."""
    hidden = ("LD_PRELOAD", "GGML_BACKEND_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    try:
        return run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS,
            stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return subprocess.CompletedProcess(command, 1, "", "")
