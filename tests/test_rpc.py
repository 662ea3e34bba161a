"""A model over two processes with llama.cpp's own RPC, the plugin in each: the same logits as in one process.

llama-cpp-python ships no RPC. `AGQ_GGML_SOURCES` names the sources of the llama.cpp inside the installed release
(vendor/llama.cpp of its source archive): its server and its loadable backend are compiled from there, unchanged.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import needed
import numpy as np
import pytest
import tiny_models
from command_line import environment
from test_plugin import ALL_AGQ4

import agq_gguf
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.library import ggml_version

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="builds programs for Linux"),
    pytest.mark.needs("g++"),
]


@pytest.fixture(scope="module")
def programs(ggml_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ggml-rpc-server and, where it looks for it, libggml-rpc.so."""
    import llama_cpp

    numbers = re.findall(
        r"GGML_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", (ggml_sources / "ggml/CMakeLists.txt").read_text()
    )
    if ".".join(numbers) != ggml_version():
        needed.missing(f"the sources are ggml {'.'.join(numbers)}, installed is {ggml_version()}")
    folder = tmp_path_factory.mktemp("rpc")
    libraries = Path(llama_cpp.__file__).parent / "lib"
    command = ["g++", "-O1", "-std=c++17", f"-I{ggml_sources / 'ggml/include'}", f"-I{ggml_sources / 'ggml/src'}"]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", f"-Wl,-rpath-link,{libraries}"]
    loadable = ["-fPIC", "-shared", "-DGGML_BACKEND_DL", "-DGGML_BACKEND_BUILD", "-DGGML_BACKEND_SHARED"]
    backend = ggml_sources / "ggml/src/ggml-rpc"
    rpc = [p for p in (backend / "ggml-rpc.cpp", backend / "transport.cpp") if p.exists()]
    server = next(p for p in sorted((ggml_sources / "tools/rpc").glob("*.cpp")))
    for arguments in (
        [*loadable, *map(str, rpc), "-o", str(folder / "libggml-rpc.so"), *link, "-lggml-base"],
        [str(server), "-o", str(folder / "ggml-rpc-server"), *link, "-lggml", "-lggml-base"],
    ):
        built = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def model(models: Path) -> Path:
    source = tiny_models.write_llama(models / "rpc-f32.gguf", dtype="f32", n_layer=4, n_ff=384)
    quantize(source, models / "rpc-agq4.gguf", options=ALL_AGQ4)
    return models / "rpc-agq4.gguf"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(programs: Path, plugin: bool) -> tuple[subprocess.Popen[str], str, Path]:
    """A server that answers, its address, and the file with what it says."""
    port = free_port()
    log = programs / f"server-{port}.log"
    device, variables = ("AGQ", {"GGML_BACKEND_PATH": str(agq_gguf.backend_path())}) if plugin else ("CPU", {})
    with log.open("w") as out:
        child = subprocess.Popen(
            [programs / "ggml-rpc-server", "-d", device, "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
            stdout=out, stderr=out, text=True, env=environment(GGML_RPC_DEBUG="1", **variables),
        )  # fmt: skip
    for _ in range(600):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return child, f"127.0.0.1:{port}", log
        assert child.poll() is None, log.read_text()
        time.sleep(0.1)
    child.kill()
    raise AssertionError(log.read_text())


@pytest.fixture
def servers(programs: Path) -> Iterator[list[tuple[subprocess.Popen[str], str, Path]]]:
    found = [start(programs, True), start(programs, True)]
    yield found
    for child, _, _ in found:
        child.kill()
        child.wait()


def client(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "rpc_client.py"), str(out), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, env=environment(),
    )  # fmt: skip


def test_two_servers_give_the_logits_of_one_process(
    programs: Path, model: Path, tmp_path: Path, servers: list[tuple[subprocess.Popen[str], str, Path]]
) -> None:
    alone = client(tmp_path / "alone.npy", model)
    assert alone.returncode == 0, alone.stderr
    endpoints = [endpoint for _, endpoint, _ in servers]
    for attempt in range(3):  # the servers serve one after the other
        spread = client(tmp_path / "spread.npy", model, programs / "libggml-rpc.so", *endpoints)
        assert spread.returncode == 0, spread.stderr
        np.testing.assert_array_equal(np.load(tmp_path / "spread.npy"), np.load(tmp_path / "alone.npy"), str(attempt))
    for child, _, log in servers:
        assert child.poll() is None
        # Each had a part of the work: graphs of many nodes.
        assert max(map(int, re.findall(r"graph_compute\].* n_nodes: (\d+)", log.read_text()))) > 20


def test_a_server_without_the_plugin_refuses(programs: Path, model: Path, tmp_path: Path) -> None:
    child, endpoint, log = start(programs, False)
    try:
        spread = client(tmp_path / "out.npy", model, programs / "libggml-rpc.so", endpoint)
        assert spread.returncode != 0 and not (tmp_path / "out.npy").exists()
        assert "invalid tensor type received" in log.read_text()
    finally:
        child.kill()
        child.wait()
