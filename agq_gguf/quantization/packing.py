"""AGQ4 for scripts that write their own GGUF files: turns weights into bytes for `gguf.GGUFWriter.add_tensor`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agq_gguf.calibration.sampling import spread
from agq_gguf.calibration.stats import InputStats, WeightStats
from agq_gguf.errors import FormatError, InputError
from agq_gguf.format import blocks
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import prepare_input, quantize_matrix

_SAMPLE_ROWS = 256
Stats = WeightStats | InputStats | NDArray[Any]


def stats_of_activations(x: ArrayLike) -> InputStats:
    """Statistics of the input x [tokens, K] of a weight, for `pack_agq4`; uses 4 K^2 bytes.

    A few thousand rows are best; 256 of them, spread evenly, are kept as a sample. Raises InputError if x is not
    two-dimensional or holds a NaN or an infinity.
    """
    values = np.asarray(x, np.float32)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise InputError(f"activations must be finite and of shape [tokens, K], got shape {values.shape}")
    hessian = (values.T @ values) / np.float32(len(values))
    sample = values[spread(_SAMPLE_ROWS, len(values))]
    return InputStats(len(values), hessian.diagonal().copy(), np.abs(values).max(0), sample, hessian)


def pack_agq4(
    weights: ArrayLike, stats: Stats | None = None, options: MatrixOptions | None = None
) -> NDArray[np.uint8]:
    """Quantizes a matrix [M, K], or experts [E, M, K], to AGQ4: uint8 [M, K / 64 * 34], or [E, M, K / 64 * 34].

    K must be a multiple of 64. `stats` describes the input of the matrix: a sample of activations
    [tokens, K] (best), mean squares [K] as in an imatrix, or a result of `stats_of_activations` or `load_imatrix`; with
    None all channels get the same weight. Write the result with::

        writer.add_tensor(name, pack_agq4(weights, x), raw_dtype=gguf.GGMLQuantizationType.AGQ4)

    Raises FormatError for a shape that AGQ4 does not support, InputError for weights or statistics that cannot be used.
    """
    values = np.asarray(weights, np.float32)
    problem = blocks.shape_problem(*values.shape[-2:]) if values.ndim in (2, 3) else "expected [M, K] or [E, M, K]"
    if problem or values.size == 0:
        raise FormatError(f"AGQ4 does not support a tensor of shape {values.shape}: {problem or 'it is empty'}")
    rows, columns = values.shape[-2:]
    known = _weight_stats(stats)
    if known is not None and known.whole.columns != columns:
        raise InputError(f"the weights have {columns} columns, but the statistics have {known.whole.columns} channels")
    matrices = values.reshape(-1, rows, columns)
    if known is not None and known.experts and len(known.experts) != len(matrices):
        raise InputError(f"the weights have {len(matrices)} experts, but the statistics have {len(known.experts)}")
    options = options or MatrixOptions()
    packed = []
    for i, matrix in enumerate(matrices):
        if i == 0 or (known is not None and known.experts):
            prepared = prepare_input(known.of(i) if known else None, columns, blocks.listable(rows, columns), options)
        packed.append(blocks.pack(quantize_matrix(matrix, prepared, options).matrix))
    return np.stack(packed).reshape(*values.shape[:-1], -1)


def _weight_stats(stats: Stats | None) -> WeightStats | None:
    if stats is None or isinstance(stats, WeightStats):
        return stats
    if isinstance(stats, InputStats):
        return WeightStats(stats)
    if stats.ndim == 2:
        return WeightStats(stats_of_activations(stats))
    if stats.ndim != 1 or not np.isfinite(stats).all() or (stats < 0).any():
        raise InputError(f"mean squares must be finite, >= 0 and of shape [K], got shape {stats.shape}")
    return WeightStats(InputStats(0, np.asarray(stats, np.float32)))
