"""ThreadSanitizer over the plugin in the stock host: contexts that share a model, and the threads of each.

The host is not instrumented, so only the plugin's own memory accesses are watched, and what orders them: POSIX locks
and threads, and in place of the host's OpenMP a small one (`tests/tsan/openmp_shim.c`) that is made of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import needed
import pytest
import tiny_models
from command_line import environment
from test_plugin import ALL_AGQ4

from agq_gguf.quantization.pipeline import quantize

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="ThreadSanitizer and LD_PRELOAD"),
    pytest.mark.needs("gcc", "setarch"),
]
# Each of these puts a race where memory of a thread's own or an atomic flag is now; both must be seen in a report.
RACES = [
    ("cpp/nodes/product.cpp", "p.memory->of(ith)", "p.memory->of(0)", "agq::product_node"),
    (
        "cpp/backend/backend.cpp",
        "std::atomic<bool> agq4_seen{false};",
        "struct agq4_seen_flag { bool v = 0; void store(bool x, int) { v = x; } bool load(int) const { return v; } }"
        " agq4_seen;",
        "device_supports_op",
    ),
]


def build(source: Path, folder: Path) -> Path:
    """The plugin with ThreadSanitizer; in a folder that was built before, only what changed is compiled again."""
    # The flags of the build type come last, so -O1 has to be among them.
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DCMAKE_CXX_FLAGS=-fsanitize=thread -g"]
    for command in (
        ["cmake", "-S", str(source), "-B", str(folder), "-G", "Ninja", *flags],
        ["cmake", "--build", str(folder), "--target", "ggml-agq", "-j", "2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("libggml-agq.*"))


def run(plugin: Path, model: Path, shim: Path, threads: int) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    library = Path(found.stdout.strip()).resolve()
    if not library.is_absolute() or not library.exists():
        needed.missing("gcc has no ThreadSanitizer here")
    options = f"exitcode=66 report_signal_unsafe=0 suppressions={HERE / 'tsan' / 'suppressions.txt'}"
    return subprocess.run(
        ["setarch", "-R", sys.executable, str(HERE / "tsan" / "threads.py"), str(plugin), str(model), str(threads)],
        env=environment(LD_PRELOAD=f"{library} {shim}", TSAN_OPTIONS=options),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shim") / "openmp.so"
    source = HERE / "tsan" / "openmp_shim.c"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-pthread", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def model(models: Path) -> Path:
    source = tiny_models.write_llama(models / "tsan.gguf", n_ff=384, n_expert=4, n_expert_used=2)
    quantize(source, models / "tsan-agq4.gguf", options=ALL_AGQ4)
    return models / "tsan-agq4.gguf"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the sources that may be changed, and the build of it."""
    folder = tmp_path_factory.mktemp("tsan")
    for part in ("cpp", "cmake"):
        shutil.copytree(HERE.parent / part, folder / "source" / part)
    shutil.copy(HERE.parent / "CMakeLists.txt", folder / "source")
    return folder


@pytest.fixture(scope="module")
def plugin(tree: Path) -> Path:
    return Path(shutil.copy(build(tree / "source", tree / "build"), tree))


@pytest.mark.parametrize("threads", [1, 3])
def test_no_races(threads: int, plugin: Path, model: Path, shim: Path) -> None:
    result = run(plugin, model, shim, threads)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel")
    assert result.stdout == "done\n" and result.returncode == 0, result.stderr[:4000]


@pytest.mark.usefixtures("plugin")  # built before its sources change
def test_races_would_be_seen(tree: Path, model: Path, shim: Path) -> None:
    for path, old, new, _ in RACES:
        text = (tree / "source" / path).read_text(encoding="utf-8")
        assert old in text
        (tree / "source" / path).write_text(text.replace(old, new), encoding="utf-8")
    result = run(build(tree / "source", tree / "build"), model, shim, 3)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel")
    assert result.returncode == 66 and "WARNING: ThreadSanitizer: data race" in result.stderr, result.stderr[:4000]
    for *_, seen in RACES:
        assert seen in result.stderr
