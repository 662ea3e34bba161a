from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from command_line import environment

import agq_gguf
from agq_gguf.calibration.stats import InputStats, WeightStats
from agq_gguf.errors import FormatError, InputError
from agq_gguf.format import blocks, reference
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.packing import stats_of_activations

QUICK = MatrixOptions(learn_codebook=False)


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)


@pytest.fixture(scope="module")
def activations() -> np.ndarray:
    """Correlated, with a few channels far larger than the others."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2000, 32)) @ rng.standard_normal((32, 256)) + 0.3 * rng.standard_normal((2000, 256))
    x[:, rng.choice(256, 4, replace=False)] *= 30
    return x.astype(np.float32)


def output_error(packed: np.ndarray, weights: np.ndarray, x: np.ndarray) -> float:
    found = reference.matmul_reference(x, blocks.unpack(packed))
    return float(np.linalg.norm(found - x @ weights.T) / np.linalg.norm(x @ weights.T))


def test_more_knowledge_gives_less_error(weights: np.ndarray, activations: np.ndarray) -> None:
    """Measured on activations that were not shown."""
    shown, held_out = activations[:1800], activations[1800:]
    unknown, squares, sample = (
        output_error(agq_gguf.pack_agq4(weights, stats, QUICK), weights, held_out)
        for stats in (None, np.mean(shown**2, 0), shown)
    )
    assert sample < 0.8 * squares < 0.8 * unknown < 0.2


def test_goes_into_a_file_of_gguf(weights: np.ndarray, tmp_path: Path) -> None:
    experts = np.stack([weights, -weights])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, values in (("one", weights), ("many", experts)):
        packed = agq_gguf.pack_agq4(values, options=QUICK)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.AGQ4)  # type: ignore[attr-defined]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one, many = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert list(one.shape) == [256, 64] and list(many.shape) == [256, 64, 2]
    found = gguf.quants.dequantize(many.data, many.tensor_type)
    np.testing.assert_array_equal(found[0], gguf.quants.dequantize(one.data, one.tensor_type))
    assert np.linalg.norm(found - experts) < 0.1 * np.linalg.norm(experts)


def test_experts_have_their_own_statistics(weights: np.ndarray, activations: np.ndarray) -> None:
    other = stats_of_activations(np.roll(activations, 100, axis=1))
    mine = stats_of_activations(activations)
    packed = agq_gguf.pack_agq4(np.stack([weights, weights]), WeightStats(mine, (mine, other)), QUICK)
    np.testing.assert_array_equal(packed[0], agq_gguf.pack_agq4(weights, mine, QUICK))
    np.testing.assert_array_equal(packed[1], agq_gguf.pack_agq4(weights, other, QUICK))
    assert not np.array_equal(packed[0], packed[1])


@pytest.mark.parametrize("shape", [(23, 320), (49, 192), (33, 576), (257, 64)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    """With and without correlations; rows of full panels do not depend on the rows behind them.

    With correlations but for the rounding of large sums, which depends on the number of rows.
    """
    rng = np.random.default_rng(3)
    values, x = (rng.standard_normal((n, shape[1])).astype(np.float32) for n in (shape[0], 500))
    values[0, 0] = 8  # the largest sets the tensor scale
    whole = shape[0] // 16 * 16
    plain = MatrixOptions(learn_codebook=False, activation_scale="group")
    for stats in (None, x):
        packed = agq_gguf.pack_agq4(values, stats, plain)
        assert packed.shape == (shape[0], shape[1] // 64 * 34)
        assert output_error(packed, values, x) < 0.12
        if blocks.shape_problem(whole, shape[1]) is None:
            found, wanted = (blocks.unpack(p) for p in (packed, agq_gguf.pack_agq4(values[:whole], stats, plain)))
            assert not found.parameters.listed.size and not wanted.parameters.listed.size
            different = (found.codes[:whole] != wanted.codes).mean(), (found.scales[:whole] != wanted.scales).mean()
            assert max(different) <= (0.02 if stats is not None else 0)


def test_refuses(weights: np.ndarray) -> None:
    for bad in (weights[:, :200], weights[:2], weights[0], np.zeros((0, 64, 256), np.float32)):
        with pytest.raises(FormatError, match="AGQ4 does not support a tensor of shape"):
            agq_gguf.pack_agq4(bad)
    with pytest.raises(InputError, match="the weights have 256 columns, but the statistics have 128 channels"):
        agq_gguf.pack_agq4(weights, np.ones(128, np.float32))
    with pytest.raises(InputError, match="the weights have 1 experts, but the statistics have 2"):
        one = InputStats(1, np.ones(256, np.float32))
        agq_gguf.pack_agq4(weights, WeightStats(one, (one, one)))
    for squares in (np.full(256, np.nan), -np.ones(256), np.ones((2, 2, 256))):
        with pytest.raises(InputError, match="mean squares"):
            agq_gguf.pack_agq4(weights, squares)
    with pytest.raises(InputError, match="activations must be finite"):
        agq_gguf.pack_agq4(weights, np.full((4, 256), np.inf))


def test_public_names_are_lazy() -> None:
    code = (
        "import sys, agq_gguf\n"
        "heavy = {'torch', 'llama_cpp'} & set(sys.modules)\nassert not heavy, heavy\n"
        "from agq_gguf.inspection.verify import verify\n"
        "for name in agq_gguf.__all__:\n    assert getattr(agq_gguf, name) is not None\n"
        "assert callable(agq_gguf.quantize) and callable(agq_gguf.pack_agq4) and agq_gguf.verify is verify\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment()
    )
    assert result.returncode == 0, result.stderr


def test_type_checkers_believe_the_annotations() -> None:
    """Without this file they take everything from here for Any."""
    assert (Path(agq_gguf.__file__).parent / "py.typed").is_file()
