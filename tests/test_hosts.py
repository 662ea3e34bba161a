"""The host check (tests/hosts) in hosts that pip brings: the installed llama-cpp-python, and the newest xllamacpp."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import needed
import pytest

import agq_gguf

sys.path.insert(0, str(Path(__file__).parent / "hosts"))
from check import HostModels, HostUnderTest, check_host

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host_models(tmp_path_factory: pytest.TempPathFactory) -> HostModels:
    return HostModels.make(tmp_path_factory.mktemp("host-models"))


def passes(library: Path, models: HostModels, work: Path) -> None:
    found = check_host(HostUnderTest([sys.executable], library, agq_gguf.backend_path(), work), models)
    assert not found.failed, f"ggml {found.ggml}: " + "\n".join(found.failed)
    assert len(found.passed) >= 15


def test_the_installed_llama_cpp_python(host_models: HostModels, tmp_path: Path) -> None:
    import llama_cpp

    passes(Path(llama_cpp.__file__).parent / "lib" / "libllama.so", host_models, tmp_path)


def test_the_newest_xllamacpp(host_models: HostModels, tmp_path: Path) -> None:
    """A binding in one shared object, with a newer ggml than llama-cpp-python's."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(
        [*command, "--target", str(tmp_path / "host"), "xllamacpp"], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        needed.missing(f"pip cannot install xllamacpp: {result.stderr.strip().splitlines()[-1:]}")
    [library] = (tmp_path / "host" / "xllamacpp").glob("xllamacpp*.so")
    passes(library, host_models, tmp_path)
