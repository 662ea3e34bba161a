"""Models that run on two devices: the plugin is given parts of graphs (tests/devices/second_device.cpp)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from llama_runs import run_python
from low_level import QUICK

from agq_gguf.quantization.pipeline import quantize

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="builds a shared library with c++")

# For each setting the logits behind a prompt and behind tokens that follow, and what was logged by the plugin.
PROGRAM = """
import ctypes, json, sys
import agq_gguf, llama_cpp.llama_cpp as api
import low_level
from agq_gguf.runtime import host
device, path, settings = sys.argv[1:]
if device != "none":
    assert host.llama_cpp_python().library.ggml_backend_load(device.encode())
results = []
with low_level.LowModel(path) as first:  # registers the plugin, and listens to the log
    for layers, offload, flash, prune in json.loads(settings):
        low_level.log.clear()
        p = api.llama_model_default_params()
        p.n_gpu_layers = layers
        model = api.llama_model_load_from_file(path.encode(), p)
        c = api.llama_context_default_params()
        c.n_ctx, c.n_batch, c.n_ubatch, c.n_threads, c.n_threads_batch = 512, 512, 512, 1, 1
        c.offload_kqv, c.flash_attn_type = offload, flash
        with agq_gguf.options(prune=prune):
            context = api.llama_init_from_model(model, c)
        ids, found = list(range(3, 123)), []
        for step in range(12):
            raw = (ctypes.c_int32 * len(ids))(*ids)
            assert api.llama_decode(context, api.llama_batch_get_one(raw, len(ids))) == 0
            found.append(api.llama_get_logits_ith(context, -1)[: first.n_vocab])
            ids = [11 + 7 * step]
        results.append([found, [line for line in low_level.log if line.startswith("agq")]])
        api.llama_free(context)
        api.llama_model_free(model)
print(json.dumps(results))
"""

Setting = tuple[
    int, bool, int, str
]  # layers on the second device, whether their cache is there, flash attention, pruning


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "second.so"
    sources = ["tests/devices/second_device.cpp", "cpp/host/host.cpp", "cpp/host/loaded_library.cpp"]
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Icpp", *sources, "-ldl", "-o", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request: pytest.FixtureRequest, models: Path) -> Path:
    options: dict[str, Any] = {"n_expert": 4, "n_expert_used": 2} if request.param == "experts" else {}
    source = tiny_models.write_llama(models / f"devices-{request.param}.gguf", dtype="f32", n_ff=384, **options)
    quantize(source, models / f"devices-{request.param}-agq4.gguf", options=QUICK)
    return models / f"devices-{request.param}-agq4.gguf"


def run(model: Path, device: Path | str, settings: list[Setting]) -> list[tuple[np.ndarray, list[str]]]:
    """Logits [step, vocabulary] and warnings, by setting."""
    result = run_python(PROGRAM, device, model, json.dumps(settings))
    assert result.returncode == 0, result.stderr
    return [(np.array(logits), warnings) for logits, warnings in json.loads(result.stdout)]


# With flash attention off, on and as llama.cpp chooses; all layers and their cache on the second device, or not all.
WHOLE: list[Setting] = [
    (layers, offload, flash, "off")
    for flash in (0, 1, -1)
    for layers, offload in ((99, True), (99, False), (1, True), (0, True))
]


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """The host's kernels and ours differ in the last bits, and rounding to 8 bits makes 1% of that."""
    assert (np.linalg.norm(found - wanted, axis=-1) < 0.03 * np.linalg.norm(wanted, axis=-1)).all()


def test_the_logits_are_those_of_one_device(model: Path, device: Path) -> None:
    """And where a cache is on the second device, pruning says so."""
    alone = run(model, "none", WHOLE)
    assert not any(warnings for _, warnings in alone)
    *found, (logits, warnings) = run(model, device, [*WHOLE, (99, True, 0, "0:0.5")])
    for (ours, told), (wanted, _) in zip(found, alone, strict=True):
        assert_close(ours, wanted)
        assert not told
    assert_close(logits, alone[WHOLE.index((0, True, 0, "off"))][0])
    assert len(warnings) == 1
    assert "token pruning is off: attention and its K/V cache are on another device" in warnings[0]
