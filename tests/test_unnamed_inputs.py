"""Older releases of llama.cpp give some inputs of a graph no name. The plugin knows them by what they are for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny_models
from llama_runs import HERE, TEXT, relative
from reference_model import ReferenceModel
from test_plugin import ALL_AGQ4

from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.model import Model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")

# Stands in front of ggml's function of that name, and leaves the inputs that 0.3.30 to 0.3.34 do not name without one.
SHIM = """
#include <cstring>
#include "host/host.h"
extern "C" {
int unnamed = 0;
agq::ggml_tensor *ggml_set_name(agq::ggml_tensor *t, const char *name) {
    for (const char *absent : {"attn_inp_k_idxs", "attn_inp_v_idxs", "inp_pos", "out_ids"}) {
        if (std::strcmp(name, absent) == 0) return ++unnamed, t;
    }
    std::strncpy(t->name, name, sizeof(t->name) - 1);
    return t;
}
}
"""

# A fresh context must not take the cells that it is about to fill for those of tokens that were dropped.
RUN = """
import ctypes, sys, numpy
import agq_gguf
from llama_cpp import Llama
agq_gguf.register()
llama = Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0, logits_all=sys.argv[3] == "all")
tokens = llama.tokenize(sys.argv[4].encode())
llama.eval(tokens)
if sys.argv[3] == "all":
    logits = numpy.array(llama.scores[: len(tokens)])
else:
    logits = numpy.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
numpy.save(sys.argv[2], logits)
pruned = agq_gguf.last_pruned()
everything = ctypes.CDLL(None)
unnamed = ctypes.c_int.in_dll(everything, "unnamed").value if hasattr(everything, "unnamed") else 0
print(sum(layer >= 0 for layer in pruned), hasattr(everything, "unnamed"), unnamed > 0)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert compiler, "a C++ compiler is needed to build the package, and for this test"
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-I{HERE.parent / 'cpp'}", "shim.cpp", "-o", "shim.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "shim.so"


@pytest.fixture(scope="module")
def model(models: Path) -> Path:
    source = tiny_models.write_llama(models / "unnamed-f32.gguf", dtype="f32")
    quantize(source, models / "unnamed-agq4.gguf", options=ALL_AGQ4)
    return models / "unnamed-agq4.gguf"


def names_inputs() -> bool:
    """Whether the installed release gives names to the inputs in question."""
    import llama_cpp

    library = llama_cpp.llama_cpp._lib._name
    return b"attn_inp_k_idxs" in Path(library).read_bytes()


def run(model: Path, out: Path, which: str, text: str, **environment: str) -> tuple[np.ndarray, int]:
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(model), str(out), which, text],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    dropped, preloaded, took = result.stdout.split()
    assert preloaded == str("LD_PRELOAD" in environment)
    assert took == str("LD_PRELOAD" in environment and names_inputs())  # an older release has none to take
    return np.load(out), int(dropped)


def test_a_fresh_context_hides_nothing(model: Path, shim: Path, tmp_path: Path) -> None:
    found, _ = run(model, tmp_path / "found.npy", "all", TEXT.decode(), LD_PRELOAD=str(shim))
    named, _ = run(model, tmp_path / "named.npy", "all", TEXT.decode())
    np.testing.assert_array_equal(found, named)
    with Model(model, vocab_only=True) as opened:
        tokens = opened.tokenize(TEXT.decode())
    assert relative(found, ReferenceModel(model).logits(tokens.tolist())) < 1e-5


def test_pruning_without_names(model: Path, shim: Path, tmp_path: Path) -> None:
    text = " ".join([TEXT.decode()] * 4)
    found, dropped = run(model, tmp_path / "found.npy", "last", text, LD_PRELOAD=str(shim), AGQ_PRUNE="0:0.5;min=8")
    named, as_many = run(model, tmp_path / "named.npy", "last", text, AGQ_PRUNE="0:0.5;min=8")
    assert dropped == as_many > 0
    np.testing.assert_array_equal(found, named)


def test_pruning_with_windows_without_names(shim: Path, tmp_path: Path) -> None:
    """Two caches, so two inputs name cells of keys and two cells of values."""
    path = architectures.write_gemma3(tmp_path / "f32.gguf", layers=4)
    quantize(path, tmp_path / "agq4.gguf", options=ALL_AGQ4)
    text, how = TEXT.decode() * 2, {"AGQ_PRUNE": "1:0.5;min=8"}
    found, dropped = run(tmp_path / "agq4.gguf", tmp_path / "found.npy", "last", text, LD_PRELOAD=str(shim), **how)
    named, as_many = run(tmp_path / "agq4.gguf", tmp_path / "named.npy", "last", text, **how)
    assert dropped == as_many > 0
    np.testing.assert_array_equal(found, named)
