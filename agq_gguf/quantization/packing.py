"""AGQ4 for scripts that write their own GGUF files: weights in, bytes for `gguf.GGUFWriter.add_tensor` out."""

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
    """Statistics of activations x [tokens, K] as the weight sees them, for `pack_agq4`; takes 4 K^2 bytes.

    A few thousand rows are wanted; 256 of them, spread evenly, are kept to try choices out. Raises InputError if x is
    not two-dimensional or holds a NaN or an infinity.
    """
    values = np.asarray(x, np.float32)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise InputError(f"activations must be finite and [tokens, K], found shape {values.shape}")
    hessian = (values.T @ values) / np.float32(len(values))
    sample = values[spread(_SAMPLE_ROWS, len(values))]
    return InputStats(len(values), hessian.diagonal().copy(), np.abs(values).max(0), sample, hessian)


def pack_agq4(
    weights: ArrayLike, stats: Stats | None = None, options: MatrixOptions | None = None
) -> NDArray[np.uint8]:
    """Quantizes a matrix [M, K], or experts [E, M, K], to AGQ4: uint8 [M, K / 128 * 68], or [E, M, K / 128 * 68].

    K must be a multiple of 128 and M of 16. `stats` says what the matrix is multiplied with: a sample of activations
    [tokens, K] (best), mean squares [K] as an imatrix has them, or what `stats_of_activations` or `load_imatrix` gave;
    None counts all channels alike. Write the result with::

        writer.add_tensor(name, pack_agq4(weights, x), raw_dtype=gguf.GGMLQuantizationType.AGQ4)

    Raises FormatError for a shape that AGQ4 cannot hold, InputError for weights or statistics that cannot be used.
    """
    values = np.asarray(weights, np.float32)
    problem = blocks.shape_problem(*values.shape[-2:]) if values.ndim in (2, 3) else "wanted [M, K] or [E, M, K]"
    if problem or values.size == 0:
        raise FormatError(f"a tensor of shape {values.shape} cannot be AGQ4: {problem or 'it is empty'}")
    rows, columns = values.shape[-2:]
    known = _weight_stats(stats)
    if known is not None and known.whole.columns != columns:
        raise InputError(f"statistics of {known.whole.columns} channels for weights with {columns} columns")
    matrices = values.reshape(-1, rows, columns)
    if known is not None and known.experts and len(known.experts) != len(matrices):
        raise InputError(f"statistics of {len(known.experts)} experts for {len(matrices)} matrices")
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
        raise InputError(f"mean squares must be finite, >= 0 and [K], found shape {stats.shape}")
    return WeightStats(InputStats(0, np.asarray(stats, np.float32)))
