"""Long runs and hard times for the plugin: shared models, abort, no memory, fork, reload, growth, and a soak.

Everything that could kill or bloat a process runs in one of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from llama_runs import LONG_TEXT, all_logits, relative, run_python
from test_plugin import ALL_AGQ4

import agq_gguf
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.model import Batch, Model

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and Linux's limits")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    agq_gguf.register()
    with quiet_log():
        yield


@pytest.fixture(scope="module")
def dense(models: Path) -> Path:
    source = tiny_models.write_llama(models / "reliable-f32.gguf", dtype="f32", n_ff=384)
    quantize(source, models / "reliable-agq4.gguf", options=ALL_AGQ4)
    return models / "reliable-agq4.gguf"


@pytest.fixture(scope="module")
def wide(models: Path) -> Path:
    """A model whose FFN needs much scratch for long prompts."""
    source = tiny_models.write_llama(models / "wide-f16.gguf", n_ff=8192, context=2048)
    quantize(source, models / "wide-agq4.gguf", options=ALL_AGQ4)
    return models / "wide-agq4.gguf"


def test_contexts_in_threads_share_one_model(dense: Path) -> None:
    """Eight contexts on one loaded model, all at once, each with its own prompts and batch sizes."""
    with quiet_log(), Model(dense) as model:
        prompts = [np.random.default_rng(i).integers(3, 400, 40 + 9 * i) for i in range(8)]

        def run(i: int) -> np.ndarray:
            with model.context(256, threads=1, n_ubatch=16 + 8 * i) as context:
                found = []
                for _ in range(4):
                    context.clear()
                    batch = Batch(prompts[i])
                    context.decode(batch)
                    found.append(context.logits(batch).copy())
                    step = Batch([7], first_position=len(prompts[i]))
                    context.decode(step)
                    found.append(context.logits(step).copy())
                return np.concatenate(found)

        alone = [run(i) for i in range(8)]
        together: list[np.ndarray | None] = [None] * 8
        threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, run(i))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(alone, together, strict=True):
            assert other is not None
            np.testing.assert_array_equal(one, other)


def test_abort_in_the_middle_of_a_long_prompt(dense: Path) -> None:
    """The callback ends a prompt between two of its parts, or inside one; then the same context gives what it gave."""
    import llama_cpp
    from llama_runs import open_llama

    llama = open_llama(dense, logits_all=True, n_ubatch=32)
    tokens = llama.tokenize(LONG_TEXT)
    llama.eval(tokens)
    calls, limit = 0, 1 << 60

    @llama_cpp.ggml_abort_callback  # type: ignore[untyped-decorator]
    def abort(_data: object) -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    llama_cpp.llama_set_abort_callback(llama.ctx, abort, None)
    llama.reset()
    llama.eval(tokens)
    # Of the second run: 16-bit values share a scale with those of cells that are in use no more, zeros at first.
    wanted = np.array(llama.scores[: len(tokens)])
    total = calls
    assert total > 100
    for part in (0.1, 0.5, 0.9):
        calls, limit = 0, int(part * total)
        llama.reset()
        with pytest.raises(RuntimeError):
            llama.eval(tokens)
        assert limit < calls < limit + 5
        limit = 1 << 60
        llama.reset()
        llama.eval(tokens)
        assert relative(np.array(llama.scores[: len(tokens)]), wanted) < 1e-6
    llama.close()


NO_MEMORY = """
import re, resource, sys
from pathlib import Path
import numpy as np
from agq_gguf.errors import HostError
from agq_gguf.runtime.model import Batch, Model

def size():
    return int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

prompt = np.random.default_rng(0).integers(3, 400, 1500)
with Model(sys.argv[1]) as model, model.context(2048, n_ubatch=2048, threads=1) as context:
    short, long = Batch(prompt[:8]), Batch(prompt)
    context.decode(short)
    before = context.logits(short).copy()
    resource.setrlimit(resource.RLIMIT_AS, (size() + (3 << 20), resource.RLIM_INFINITY))
    for attempt in range(3):
        context.clear()
        try:
            context.decode(long)
            print("no failure")
        except HostError as e:
            print("refused:", e)
        context.clear()
        context.decode(short)
        assert np.array_equal(context.logits(short), before)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    context.clear()
    context.decode(long)
    found = context.logits(long).copy()
    with model.context(2048, n_ubatch=2048, threads=1) as fresh:
        fresh.decode(long)
        assert np.array_equal(found, fresh.logits(long))
print("usable")
"""


@linux
def test_no_memory_for_scratch_is_an_error_and_the_context_stays_usable(wide: Path) -> None:
    # Large blocks straight from the system, so that the limit counts them.
    result = run_python(NO_MEMORY, wide, env={"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and lines[-1] == "usable", result.stdout
    assert all(line.startswith("refused: ") and "cannot run this model" in line for line in lines[:3]), lines
    assert "not enough memory for so many tokens at a time; use a smaller n_ubatch" in lines[0]


FORKED = """
import os, sys
import numpy as np
from agq_gguf.runtime.model import Batch, Model

prompt = np.random.default_rng(0).integers(3, 400, 64)
with Model(sys.argv[1]) as model, model.context(256, threads=1) as context:
    batch = Batch(prompt)
    context.decode(batch)
    wanted = context.logits(batch).copy()

    def again(c):
        c.clear()
        c.decode(batch)
        return np.array_equal(c.logits(batch), wanted)

    children = []
    for kind in ("inherited", "new"):
        child = os.fork()
        if child == 0:
            if kind == "inherited":
                good = again(context)
            else:
                with model.context(256, threads=1) as fresh:
                    good = again(fresh)
            os._exit(0 if good else 1)
        children.append(child)
    assert again(context)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert again(context)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_load(dense: Path) -> None:
    """Parent and children go on with one thread each; threads of a pool never survive a fork, in any program."""
    result = run_python(FORKED, dense)
    assert result.stdout == "done\n", result.stderr


RELOADED = """
import ctypes, os, sys
from pathlib import Path
from agq_gguf import backend_path
from agq_gguf.runtime import host, plugin
import llama_runs

llama = host.llama_cpp_python()
ggml = llama.library
ggml.ggml_type_name.restype = ctypes.c_char_p
ggml.ggml_blck_size.restype = ctypes.c_int64
results, before = [], ggml.ggml_type_name(38)
for _ in range(3):
    with plugin.silenced(llama):
        registry = ggml.ggml_backend_load(os.fsencode(backend_path()))
    assert registry and llama.has_plugin and ggml.ggml_type_name(38) == b"agq4"
    results.append(llama_runs.all_logits(Path(sys.argv[1]))[1])
    ggml.ggml_backend_unload(registry)
    assert not llama.has_plugin
    mapped = "libggml-agq" in Path("/proc/self/maps").read_text()
    assert not mapped, "the library is still there"
    assert ggml.ggml_type_name(38) == before and ggml.ggml_blck_size(38) == 0
    llama_runs.all_logits(Path(sys.argv[2]))  # stock models run on
assert all((r == results[0]).all() for r in results)
print("done")
"""


@linux
def test_unload_and_reload(dense: Path, llama_q4: Path) -> None:
    result = run_python(RELOADED, dense, llama_q4)
    assert result.stdout.endswith("done\n"), result.stderr


GROWTH = """
import re, sys
from pathlib import Path
import numpy as np
from agq_gguf.runtime.model import Batch, Model

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

batch, sizes, first = Batch(np.arange(3, 83)), [], None
for i in range(200):
    with Model(sys.argv[1]) as model, model.context(128, threads=1) as context:
        context.decode(batch)
        logits = context.logits(batch).copy()
    first = logits if first is None else first
    assert np.array_equal(logits, first)
    sizes.append(resident())
print(*sizes[49::50])
"""


@linux
def test_200_loads_do_not_grow(dense: Path) -> None:
    result = run_python(GROWTH, dense)
    assert result.returncode == 0, result.stderr
    sizes = [int(size) for size in result.stdout.split()]
    # A leak grows all the time, the heap once in a while.
    growth = min(later - earlier for earlier, later in itertools.pairwise(sizes))
    assert growth < 350, f"{sizes} kB"  # a leak of 7 kB a load would show


def test_plugin_is_quiet_about_models_it_does_not_serve(llama_q4: Path) -> None:
    """Registered or not, a stock model gives the same bits."""
    code = "import sys, llama_runs, numpy; from pathlib import Path\n" + (
        "if len(sys.argv) > 3:\n    import agq_gguf; agq_gguf.register()\n"
        "numpy.save(sys.argv[2], llama_runs.all_logits(Path(sys.argv[1]))[1])\n"
    )
    found = []
    for extra in ([], ["with"]):
        target = llama_q4.with_name(f"stock{len(extra)}.npy")
        result = run_python(code, llama_q4, target, *extra)
        assert result.returncode == 0, result.stderr
        found.append(np.load(target))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_taking_all_is_the_same_to_rounding(llama_f16: Path, tmp_path: Path, flash_attn: bool) -> None:
    """AGQ_TAKE_ALL, which test-backend-ops needs, makes the device run stock models, with the plugin's attention."""
    code = (
        "import sys, llama_runs, numpy; from pathlib import Path\nimport agq_gguf; agq_gguf.register()\n"
        "flash_attn = sys.argv[3] == 'True'\n"
        "found = llama_runs.all_logits(Path(sys.argv[1]), llama_runs.LONG_TEXT, flash_attn=flash_attn)\n"
        "numpy.save(sys.argv[2], found[1])\n"
    )
    found = []
    for value in ("0", "1"):
        target = tmp_path / f"{value}.npy"
        result = run_python(code, llama_f16, target, flash_attn, env={"AGQ_TAKE_ALL": value})
        assert result.returncode == 0, result.stderr
        found.append(np.load(target))
    left_alone, taken = found
    assert not np.array_equal(left_alone, taken)
    assert relative(taken, left_alone) < 2e-3


def test_registering_in_many_threads_at_once_and_using_it(dense: Path) -> None:
    agq_gguf.register()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            agq_gguf.register()
            all_logits(dense, n_threads=1, n_threads_batch=1)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
