"""The plugin under LD_PRELOAD, for programs that never call ggml_backend_load_all: llama-cli of a default build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from agq_gguf.inspection.program import examine
from agq_gguf.native import backend_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")

# Starts as llama-cli does, and says whether the backend is there.
PROGRAM = """
#include <cstdio>
extern "C" { void llama_backend_init(void); void *ggml_backend_reg_by_name(const char *); }
int main() {
    std::printf("before %d\\n", ggml_backend_reg_by_name("AGQ") != nullptr);
    llama_backend_init();
    llama_backend_init();
    std::printf("after %d\\n", ggml_backend_reg_by_name("AGQ") != nullptr);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program linked with the libraries of the installed llama-cpp-python."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert compiler, "a C++ compiler is needed to build the package, and for this test"
    folder = tmp_path_factory.mktemp("program")
    libraries = Path(llama_cpp.__file__).parent / "lib"
    (folder / "main.cpp").write_text(PROGRAM)
    command = [compiler, "main.cpp", "-o", "main", f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{libraries}"], cwd=folder, check=True)
    return folder / "main"


def run(program: Path, **environment: str) -> list[str]:
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return result.stdout.splitlines()


def test_preloading_registers_the_backend(program: Path) -> None:
    assert run(program, LD_PRELOAD=str(backend_path())) == ["before 0", "after 1"]


def test_a_default_build_ignores_the_variable(program: Path) -> None:
    """The reason for all this; if it fails one day, the documents can be simpler."""
    assert run(program, GGML_BACKEND_PATH=str(backend_path())) == ["before 0", "after 0"]


def test_the_doctor_says_the_same(program: Path) -> None:
    found = examine(program, backend_path())
    assert found.preload.works and not found.backend_path.works
    assert found.ggml_library is not None and "ggml-base" in found.ggml_library


def test_programs_without_llama_do_not_mind() -> None:
    environment = {**os.environ, "LD_PRELOAD": str(backend_path())}
    result = subprocess.run(["echo", "fine"], capture_output=True, text=True, check=True, env=environment)
    assert (result.stdout, result.stderr) == ("fine\n", "")
