"""Builds the C++ tests and runs them: every kernel against the scalar one, attention against its definition."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import agq_gguf

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = (
    "kernels_test", "attention_test", "paper_attention_test", "q8_test", "rows_test", "rounding_test", "mixed_test",
)  # fmt: skip
PARTS = (
    "thread_choice_test", "fetch_tuner_test", "token_store_test", "flat_map_test", "steps_test",
    *(["huge_pages_test"] if sys.platform == "linux" else []),
)  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the built test programs; warnings are errors. With ccache only the first time takes a minute.

    The installed plugin was compiled when it was installed; test_arm.py compiles all of its files with such warnings.
    """
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not installed; pip install '.[test]' brings it"
    folder = tmp_path_factory.mktemp("build")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DAGQ_BUILD_TESTS=ON", "-DAGQ_WERROR=ON"]
    if shutil.which("ccache"):
        configure.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    for command in (configure, [cmake, "--build", str(folder), "-j", "2", "--target", *PROGRAMS, *PARTS, "abi_fuzz"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def run(program: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=300
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_cpp_program(name: str, build: Path) -> None:
    result = run(build / name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "seed" in result.stdout
    assert "scalar" in result.stdout


@pytest.mark.parametrize("name", PARTS)
def test_part(name: str, build: Path) -> None:
    """Choices at run time, what pruning remembers, and memory: parts of the plugin that need no model."""
    result = run(build / name)
    assert result.returncode == 0, result.stdout + result.stderr


def test_hosts_that_would_be_misread_are_refused(build: Path) -> None:
    """Fake hosts, each with one struct, number or order that differs (tests/abi); AddressSanitizer watches."""
    result = run(build / "abi_fuzz")
    assert result.returncode == 0, result.stdout + result.stderr
    counts = dict(re.findall(r"(\w+) (\d+)", result.stdout.splitlines()[-1]))
    assert counts["wrong"] == "0"
    assert int(counts["harmful"]) > 200 and int(counts["refused"]) >= int(counts["harmful"])
    assert int(counts["accepted"]) > 10  # what differs where it does not matter


@pytest.mark.needs("objdump")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the prefetches are those of x86")
def test_streams_of_weights_are_prefetched(build: Path) -> None:
    """A compiler may take a function that only prefetches for one without effect, and generation is a third slower."""
    code = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(build / "kernels_test")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pattern = r"^[0-9a-f]+ <([^\n]*stream_(?:panel|wide)<[^\n]*)>:\n(.*?)^$"
    functions = re.findall(pattern, code, re.MULTILINE | re.DOTALL)
    counts = {name: body.count("prefetch") for name, body in functions}
    assert len(counts) == 48  # 1 to 24 tokens, with one scale for a token and one for each group
    # A group of 64 columns has 8 chunks, each on a line of its own, and every line is fetched into two caches.
    assert min(counts.values()) >= 2 * 8, counts


@pytest.mark.needs("nm")
def test_the_plugin_exports_its_entry_points_only() -> None:
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", str(agq_gguf.backend_path())], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in lines.splitlines()}
    assert names == {
        "ggml_backend_init",
        "llama_backend_init",
        "agq_abi_proof",
        "agq_descend",
        "agq_descend_on_grid",
        "agq_feed_back",
        "agq_feed_back_on_grid",
        "agq_free_memory",
        "agq_kernel",
        "agq_product_speed",
        "agq_read_speed",
        "agq_search_scales",
        "agq_last_error",
        "agq_last_bits",
        "agq_last_head_weights",
        "agq_last_importance",
        "agq_last_pruned",
        "agq_profile",
        "agq_profile_report",
        "agq_set_option",
        "agq_subtract_product",
    }
