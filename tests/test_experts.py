"""Mixtures of experts: nodes of ours in place of the host's give its results, and hide nothing that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from architectures import experts
from low_level import QUICK, tokens

import agq_gguf
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.model import Batch, Model
from agq_gguf.runtime.profile import profiled

WRITERS: dict[str, Callable[[Path], Path]] = {
    "mixtral": experts.write_mixtral,
    "qwen2moe": experts.write_qwen2moe,
    "qwen3moe": experts.write_qwen3moe,
    "deepseek2": experts.write_deepseek2,
    "deepseek2-groups": lambda path: experts.write_deepseek2(path, groups=2),
    "glm4moe": lambda path: experts.write_glm4moe(path, further=False),
    "gpt-oss": experts.write_gpt_oss,
    "llama4": experts.write_llama4,  # one expert, weighed before it; nothing of ours fits
    "grovemoe": experts.write_grovemoe,
}
CHOICE = "ARGSORT+GET_ROWS"
SHARES = f"{CHOICE}+SUM_ROWS+CLAMP+DIV"
NORM = "ADD+RMS_NORM+MUL"
# Kinds of nodes for one token, by layer with experts.
KINDS = {
    "mixtral": {SHARES: 1, "MUL+ADD": 1, "GLU+quantize": 1},
    "qwen3moe": {SHARES: 1, "MUL+ADD": 1, "GLU+quantize": 1},
    "qwen2moe": {CHOICE: 1, "MUL+ADD": 1, "GLU+quantize": 2},  # with the shared expert
    "deepseek2": {SHARES: 1, "MUL+ADD": 1},
    "gpt-oss": {CHOICE: 1, "ADD_ID+MUL+ADD": 1, "ADD_ID+ADD_ID+GLU+quantize": 1},
}
LAYERS = {"deepseek2": 1}  # with experts, where that is not 2
LORA = ("mixtral", "qwen3moe", "gpt-oss")
Runs = Callable[[str, str], dict[str, np.ndarray]]


def write_lora(path: Path, model: Path, architecture: str) -> None:
    """An adapter for the experts of the first layer."""
    rng, rank = np.random.default_rng(3), 4
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    with open_gguf(model) as reader:
        for name in ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"):
            experts, rows, columns = reader.tensors[name].shape
            a = rng.standard_normal((experts, rank, columns)) / np.sqrt(columns)
            writer.add_tensor(f"{name}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{name}.lora_b", (rng.standard_normal((experts, rows, rank)) / 4).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def path_of(folder: Path) -> Callable[[str], Path]:
    for name, write in WRITERS.items():
        path = folder / f"{name}.gguf"
        quantize(write(folder / f"{name}-f32.gguf"), path, options=QUICK)
        if name in LORA:
            architecture = {"mixtral": "llama", "gpt-oss": "gpt-oss"}.get(name, name)
            write_lora(folder / f"{name}.gguf.lora", path, architecture)
    return lambda name: folder / f"{name}.gguf"


@pytest.fixture(scope="module")
def runs(path_of: Callable[[str], Path]) -> Runs:
    """(AGQ_FUSE, model) -> what expert_runs.py has found."""
    here = Path(__file__).parent
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for fuse in ("1", "0"):
        search = os.pathsep.join([str(here), str(here.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        subprocess.run(
            [sys.executable, str(here / "expert_runs.py"), f"-{fuse}.npz", *(str(path_of(name)) for name in WRITERS)],
            check=True, timeout=500, env={**os.environ, "AGQ_FUSE": fuse, "PYTHONPATH": search},
        )  # fmt: skip
        for name in WRITERS:
            with np.load(f"{path_of(name)}-{fuse}.npz") as file:
                found[fuse, name] = dict(file)
    return lambda fuse, name: found[fuse, name]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and np.isfinite(b).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# SiLU is computed with another exponential function, which moves an activation to the next int8 step now and then.
CLOSE = 5e-3
CLOSE_TOKEN = 2e-2  # of a single token, which one such step can move by 1%, as another instruction set does


@pytest.mark.parametrize("name", WRITERS)
def test_results_are_those_of_the_host(name: str, runs: Runs) -> None:
    fused, plain = runs("1", name), runs("0", name)
    assert fused.keys() == plain.keys()
    for what in ("plain", "steered", *(["adapted"] if name in LORA else [])):
        assert relative(fused[what], plain[what]) < CLOSE, what
        if what != "plain":  # the adapter does something
            assert relative(fused[what], fused["plain"]) > 0.05, what


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_asked_for_is_seen(name: str, runs: Runs) -> None:
    """A program that asks for a tensor gets the host's, and its question changes no result."""
    fused, plain = runs("1", name), runs("0", name)
    asked = [key for key in fused if key.startswith(("tensor/", "logits/"))]
    assert sum(key.startswith("tensor/ffn_moe_") for key in asked) >= 6
    for key in asked:
        if key.startswith("tensor/ffn_moe_topk"):
            np.testing.assert_array_equal(fused[key], plain[key], key)
        else:
            assert relative(fused[key], plain[key]) < CLOSE_TOKEN, key
    lengths = {1: slice(0, 1), 40: slice(43, 44)}  # the last token of the text of this length, in texts()
    for key in asked:
        if key.startswith("logits/"):
            n = int(key.rpartition("/")[2])
            assert relative(fused[key], fused["plain"][lengths[n]]) < CLOSE_TOKEN, key


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "qwen2moe", "gpt-oss"])
def test_weighing_and_adding_is_exact(name: str, n: int, runs: Runs) -> None:
    """The outputs of experts, weighed and added: the bits of a multiplication and additions in order."""
    found = {
        key.split("/")[1]: value
        for key, value in runs("1", name).items()
        if key.startswith("terms/") and key.endswith(f"/{n}")
    }
    layers = sorted(key for key in found if key.startswith("ffn_moe_out-"))
    assert layers
    for layer in (key.rpartition("-")[2] for key in layers):

        def first(*names: str, layer: str = layer) -> np.ndarray:
            return next(found[f"{x}-{layer}"] for x in names if f"{x}-{layer}" in found)[0]

        outputs = first("ffn_moe_down_biased", "ffn_moe_down")
        weights = first("ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights")
        weights = weights.reshape(outputs.shape[0], outputs.shape[1], 1)
        wanted = outputs[:, 0] * weights[:, 0]
        for i in range(1, outputs.shape[1]):
            wanted = wanted + outputs[:, i] * weights[:, i]
        np.testing.assert_array_equal(found[f"ffn_moe_out-{layer}"][0, 0, : len(wanted)], wanted)


@pytest.mark.parametrize("name", KINDS)
def test_few_nodes(name: str, path_of: Callable[[str], Path]) -> None:
    agq_gguf.register()
    with Model(path_of(name)) as model:
        for n in (1, 40):
            with model.context(64, threads=1) as context, profiled() as times:
                context.decode(Batch(np.array(tokens(n), np.int32), first_logits=0))
            nodes = {time.kind: time.nodes for time in times}
            layers = LAYERS.get(name, 2)
            # One token is quantized where the norm is computed; the rows of several are sorted by expert first.
            assert (nodes.get(NORM, 0) == 0) == (n == 1), nodes
            if n == 1:  # the host's memory for several tokens may be laid out so that some patterns do not fit
                assert {kind: nodes.get(kind, 0) / layers for kind in KINDS[name]} == KINDS[name], nodes
                assert not {"ARGSORT", "SUM_ROWS", "ADD_ID"} & set(nodes), nodes
