"""Work between matrix products that is done where their input is quantized: the same results, and fewer nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models

import agq_gguf
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.model import Batch, Model
from agq_gguf.runtime.profile import profiled

WRITERS: dict[str, Callable[..., Path]] = {
    "llama": tiny_models.write_llama,
    "experts": lambda path, **o: tiny_models.write_llama(path, n_expert=4, n_expert_used=2, **o),
    "gpt2": tiny_models.write_gpt2,
    "bloom": tiny_models.write_bloom,
    "falcon": tiny_models.write_falcon,
}
TOKENS = np.random.default_rng(5).integers(3, 250, 24).astype(np.int32)

# Reads the tokens of the first file with each model that follows, and writes the logits beside the model.
LOGITS_OF = """
import sys, numpy
from agq_gguf.runtime.model import Batch, Model
suffix, tokens, *paths = sys.argv[1:]
tokens = numpy.load(tokens)
for path in paths:
    with Model(path) as model, model.context(64, threads=2, n_ubatch=16) as context:
        batch = Batch(tokens, first_logits=0)
        context.decode(batch)
        logits = [context.logits(batch).copy()]
        for i in range(3):  # one token at a time
            step = Batch(tokens[i : i + 1], first_position=len(tokens) + i)
            context.decode(step)
            logits.append(context.logits(step).copy())
    numpy.save(path + suffix, numpy.concatenate(logits))
"""


@pytest.fixture(scope="module")
def model_of(models: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        path = models / f"fusion-{name}-agq4.gguf"
        if not path.exists():
            source = WRITERS[name](models / f"fusion-{name}-f32.gguf", dtype="f32")
            quantize(source, path, options=QuantizeOptions(output_type="agq4", threads=1))
        return path

    return make


def nodes_of(path: Path, tokens: np.ndarray) -> dict[str, int]:
    agq_gguf.register()
    with Model(path) as model, model.context(64, threads=1) as context, profiled() as times:
        context.decode(Batch(tokens))
    return {time.kind: time.nodes for time in times}


@pytest.fixture(scope="module")
def logits(model_of: Callable[[str], Path], models: Path) -> Callable[[str, str], np.ndarray]:
    """(AGQ_FUSE, model) -> logits; a process reads the variable once, so there is one for each value."""
    np.save(models / "fusion-tokens.npy", TOKENS)
    for fuse in ("1", "0"):
        command: list[str | Path] = [sys.executable, "-c", LOGITS_OF, f"-{fuse}.npy", models / "fusion-tokens.npy"]
        subprocess.run(
            [*command, *map(model_of, WRITERS)], check=True, timeout=300, env={**os.environ, "AGQ_FUSE": fuse}
        )
    return lambda fuse, name: np.load(f"{model_of(name)}-{fuse}.npy")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_fusion_changes_no_result(name: str, logits: Callable[[str, str], np.ndarray]) -> None:
    fused, plain = logits("1", name), logits("0", name)
    assert fused.shape == plain.shape == (len(TOKENS) + 3, plain.shape[1])
    # SiLU is computed with another exponential function, which moves an activation to the next int8 step now and then.
    tolerance = 5e-3 if name in ("llama", "experts") else 1e-6
    assert np.linalg.norm(fused - plain) / np.linalg.norm(plain) < tolerance


def test_a_llama_layer_has_few_nodes(model_of: Callable[[str], Path]) -> None:
    for tokens in (TOKENS, TOKENS[:1]):
        nodes = nodes_of(model_of("llama"), tokens)
        layers = nodes["MUL_MAT ffn_down"]
        assert layers == 2
        # The first norm has no residual addition in front of it, the last addition belongs to the output's norm.
        assert nodes["RMS_NORM+MUL+quantize"] == 1
        assert nodes["ADD+RMS_NORM+MUL+quantize"] == 2 * layers
        assert nodes["GLU+quantize"] == layers
        assert nodes["quantize"] == layers  # output of the attention
        assert not {"ADD", "MUL", "RMS_NORM", "GLU"} & set(nodes)


def test_layer_norms_with_bias(model_of: Callable[[str], Path]) -> None:
    nodes = nodes_of(model_of("gpt2"), TOKENS)
    assert nodes["ADD+NORM+MUL+ADD+quantize"] == 5
    # Falcon computes attention and FFN from one norm.
    assert nodes_of(model_of("falcon"), TOKENS)["ADD+NORM+MUL+ADD+quantize"] >= 1


def test_a_router_still_finds_the_norm(model_of: Callable[[str], Path]) -> None:
    """The norm in front of experts is read by the router, which is not quantized, before it is by experts."""
    nodes = nodes_of(model_of("experts"), TOKENS)
    assert nodes["MUL_MAT ffn_gate_inp"] == 2
    # In one of two layers the host lays its memory out so that rows would overwrite each other; it computes that norm.
    assert nodes["ADD+RMS_NORM+MUL"] >= 1, nodes
    assert not {"MUL", "RMS_NORM"} & set(nodes_of(model_of("experts"), TOKENS[:1]))


def test_products_of_one_input_share_a_node(model_of: Callable[[str], Path]) -> None:
    """Queries or values with keys, gate with up, also those of experts. The results are compared above."""
    nodes = nodes_of(model_of("llama"), TOKENS)
    layers = nodes["MUL_MAT ffn_down"]
    assert nodes["MUL_MAT ffn_gate+ffn_up"] == layers
    assert sum(count for kind, count in nodes.items() if "attn_k" in kind) == layers
    experts = nodes_of(model_of("experts"), TOKENS)
    assert sum(count for kind, count in experts.items() if kind.startswith("MUL_MAT_ID") and "+" in kind) == 2
