"""Cross-builds for 64-bit Arm and runs the result under qemu-user: kernels, attention, the plugin inside stock ggml.

Needs g++-aarch64-linux-gnu and qemu-user; the plugin test also llama.cpp's sources (AGQ_GGML_SOURCES, see docs/arm.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from agq_gguf.format import blocks, reference

ROOT = Path(__file__).resolve().parent.parent
TOOLCHAIN = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
COMPILER, EMULATOR, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
KERNELS = ["neon_i8mm", "neon_dotprod", "neon"]

pytestmark = [pytest.mark.slow, pytest.mark.needs(COMPILER, EMULATOR)]


def build(source: Path, folder: Path, targets: list[str], *options: str) -> Path:
    """Configures with the toolchain file and builds some targets."""
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not installed; pip install '.[test]' brings it"
    arguments = ["-G", "Ninja", f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", *options]
    configure = [cmake, "-S", str(source), "-B", str(folder), *arguments]
    for command in (configure, [cmake, "--build", str(folder), "-j", "2", "--target", *targets]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def emulate(cpu: str, *command: str | Path, isa: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a program on an emulated CPU, with one kernel forced unless `isa` is empty."""
    words = [EMULATOR, "-L", SYSROOT, "-cpu", cpu, *map(str, command)]
    env = {**os.environ, "AGQ_FORCE_ISA": isa}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=600)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of our programs and the plugin for aarch64; warnings are errors."""
    targets = [
        "kernels_test",
        "attention_test",
        "paper_attention_test",
        "rounding_test",
        "mixed_test",
        "product_graph",
        "ggml-agq",
        "attributes_replay",
        "second_device",
    ]
    folder = tmp_path_factory.mktemp("arm")
    return build(ROOT, folder, targets, "-DAGQ_BUILD_TESTS=ON", "-DAGQ_WERROR=ON")


@pytest.mark.parametrize(
    ("cpu", "best"), [("cortex-a72", "neon"), ("neoverse-n1", "neon_dotprod"), ("max", "neon_i8mm")]
)
def test_kernels_equal_the_scalar_one(cpu: str, best: str, programs: Path) -> None:
    result = emulate(cpu, programs / "kernels_test", "--rounds", "40")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"active kernel: {best}" in result.stdout
    assert "all 40 rounds agree" in result.stdout


@pytest.mark.parametrize("isa", [*KERNELS, "scalar"])
def test_a_kernel_can_be_forced(isa: str, programs: Path) -> None:
    result = emulate("max", programs / "kernels_test", "--rounds", "1", isa=isa)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"active kernel: {isa}\n" in result.stdout


@pytest.mark.parametrize("isa", ["neon_dotprod", "neon_i8mm"])
def test_a_kernel_that_the_cpu_lacks_is_refused(isa: str, programs: Path) -> None:
    result = emulate("cortex-a72", programs / "kernels_test", "--rounds", "1", isa=isa)
    assert result.returncode == 1
    assert f"AGQ_FORCE_ISA is '{isa}', which is not supported by this CPU" in result.stdout


def test_attention(programs: Path) -> None:
    result = emulate("max", programs / "attention_test")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "neon_i8mm" in result.stdout


def test_attention_of_the_paper(programs: Path) -> None:
    result = emulate("max", programs / "paper_attention_test")
    assert result.returncode == 0, result.stdout + result.stderr


def test_rounding_is_that_of_other_processors(programs: Path) -> None:
    result = emulate("max", programs / "rounding_test")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checksum" in result.stdout


def test_rows_of_mixed_bits(programs: Path) -> None:
    result = emulate("max", programs / "mixed_test")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "neon_i8mm neon_dotprod neon scalar" in result.stdout


@pytest.fixture(scope="module")
def ggml(ggml_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of stock ggml's libraries for aarch64, built from the sources in AGQ_GGML_SOURCES; takes minutes."""
    options = ["-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF", "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    options += [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
    options.append("-DGGML_CPU_ARM_ARCH=armv8-a")
    folder = build(ggml_sources, tmp_path_factory.mktemp("ggml"), ["ggml"], *options)
    return next(folder.rglob("libggml-cpu.so")).parent


def test_the_plugin_runs_a_product_inside_stock_ggml(programs: Path, ggml: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows, columns, tokens = 48, 512, 37
    matrix = blocks.Matrix(
        rng.integers(0, 16, (rows, columns)).astype(np.uint8),
        blocks.round_scale(rng.normal(size=(rows, columns // 64)).astype(np.float32)),
        blocks.Parameters(
            codebook=np.sort(rng.integers(0, 128, 16)).astype(np.uint8),
            exponents=rng.integers(0, 3, columns // 64).astype(np.uint8),
            tensor_scale=0.01,
        ),
    )
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    (tmp_path / "weights").write_bytes(blocks.pack(matrix).tobytes())
    (tmp_path / "activations").write_bytes(x.tobytes())
    want = reference.matmul_reference(x, matrix) + 1
    libraries = next(path.parent for path in ggml.rglob("libggml-base.so")), next(ggml.rglob("libggml.so")).parent
    assert libraries[0] == libraries[1] == ggml
    for isa in [*KERNELS, "scalar"]:
        output = tmp_path / isa
        shape = [str(rows), str(columns), str(tokens)]
        files = [tmp_path / "weights", tmp_path / "activations", output]
        plugin = programs / "libggml-agq.so"
        result = emulate("max", programs / "product_graph", ggml, plugin, *shape, *files, isa=isa)
        assert result.returncode == 0, result.stdout + result.stderr
        got = np.frombuffer(output.read_bytes(), np.float32).reshape(tokens, rows)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    result = emulate("cortex-a72", programs / "product_graph", ggml, plugin, *shape, *files, isa="neon_i8mm")
    assert result.returncode != 0
    assert "not supported by this CPU" in result.stderr
