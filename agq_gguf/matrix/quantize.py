"""Makes an AGQ4 matrix from float weights and input statistics. Pure: arrays in, arrays out.

There are two steps. `prepare_input` computes what all weights with the same input share: channel order, refinement
exponents, error weights, and the factor for error feedback. `quantize_matrix` then quantizes one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats
from agq_gguf.errors import InputError
from agq_gguf.format import blocks
from agq_gguf.format.blocks import GROUP_COLUMNS, Matrix, Parameters, channel_order
from agq_gguf.matrix import codebook as cb
from agq_gguf.matrix import column_feedback, row_feedback, two_refine
from agq_gguf.matrix.column_feedback import Correlations
from agq_gguf.matrix.factor import reorder_in_place
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.parallel import in_parallel, rows_at_a_time
from agq_gguf.matrix.simulate import rotate_in_place, rotated
from agq_gguf.matrix.two_refine import Refinement

_FLOOR = 1e-4  # minimum importance of a channel, so that channels that are zero in the calibration text are stored well
# Scales have full precision from 2^-14 up to 2^16. This leaves room for rows that are a million times smaller than the
# largest, and for error feedback, which may make weights larger.
_LARGEST = 4096.0
_SMALLEST_ALPHA = 2.0**-126  # smaller binary32 numbers lose precision, or count as 0 on some machines
ERROR_ROWS = 256  # rows on which the reported error is measured
_ROWS_AT_A_TIME = 1024

_Rounded = tuple[torch.Tensor, torch.Tensor]  # codes [M, K] uint8 and scales [M, K / 64]


@dataclass(frozen=True)
class PreparedInput:
    """Everything that the weights with one input share; columns in stored order."""

    refinement: Refinement
    importance: torch.Tensor  # [K] float32, cost of a squared error in each column
    correlations: Correlations | None = None  # for error feedback, of the stored form x' of x
    note: str = ""  # a fallback that was used, and why


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in AGQ4 and its error."""

    matrix: Matrix
    error: float  # squared output error over squared output on the calibration data (on white noise without any)
    note: str = ""

    @property
    def packed(self) -> NDArray[np.uint8]:
        """The bytes of the file."""
        return blocks.pack(self.matrix)


def prepare_input(
    stats: InputStats | None, columns: int, capacity: int, options: MatrixOptions, *, consume: bool = False
) -> PreparedInput:
    """Computes what all weights with one input share.

    `capacity` is how many channels the smallest of these weights can list in its channel order. Without statistics all
    channels get the same weight. With `consume` the Hessian of `stats` is overwritten, which saves a copy: the result
    then holds two matrices [K, K] in all, that one included.
    """
    refinement = two_refine.none(columns)
    if stats is None:
        return PreparedInput(refinement, torch.ones(columns))
    if stats.sample is not None:
        refinement = two_refine.choose(
            stats.sample, capacity, options.activation_bits, options.activation_scale, options.refine
        )
    order = channel_order(refinement.listed, columns)
    shrink = np.ldexp(np.float32(1), -refinement.exponents.astype(np.int32)).repeat(GROUP_COLUMNS)
    square = stats.mean_square[order] * shrink**2
    mean = float(square.mean(dtype=np.float64))
    if not mean > 0:
        return PreparedInput(refinement, torch.ones(columns), note="its input is always zero in the calibration text")
    importance = torch.from_numpy(square / np.float32(mean)).clamp_min(_FLOOR)
    if stats.hessian is not None and options.error_feedback:
        hessian = torch.from_numpy(stats.hessian if consume else stats.hessian.copy())
        if refinement.listed.size:
            reorder_in_place(hessian, torch.from_numpy(order.astype(np.int64)))
        hessian *= torch.from_numpy(shrink) / mean
        hessian *= torch.from_numpy(shrink)[:, None]
        if options.rotated:
            rotate_in_place(hessian)
    elif options.rotated:
        # Rotation turns uncorrelated channels of different energy into correlated channels of equal energy in a group.
        hessian = rotated(rotated(importance.reshape(-1, GROUP_COLUMNS).diag_embed()).mT).contiguous()
    else:
        return PreparedInput(refinement, importance)
    # The runtime multiplies with rounded activations; rounding adds noise to the diagonal of the Hessian.
    noise = torch.from_numpy(refinement.noise / mean).float().repeat_interleave(GROUP_COLUMNS)
    known = column_feedback.correlations(hessian, options.damping, noise)
    if known is None:
        note = "falling back to a search for scales: error feedback failed (the Hessian has no Cholesky factor)"
        return PreparedInput(refinement, importance, note=note)
    return PreparedInput(refinement, known.importance, known)


def quantize_matrix(
    weight: NDArray[np.float32],
    prepared: PreparedInput,
    options: MatrixOptions,
    name: str = "the matrix",
    gram: torch.Tensor | None = None,
) -> QuantizedMatrix:
    """Quantizes one matrix [M, K] f32 (columns in input-channel order).

    `gram` is E[g g^T] [M, M] for the gradient g with respect to the output, if known. Raises InputError if the weights
    hold a NaN or an infinity.
    """
    if not np.isfinite(weight).all():
        raise InputError(f"tensor {name} holds a NaN or an infinity; the model is damaged, download it again")
    stored, tensor_scale = _stored_weights(weight, prepared.refinement, options.rotated)
    codebook = cb.learn(stored, prepared.importance) if options.learn_codebook else cb.fixed()
    if gram is not None and prepared.correlations is not None:
        codes, scales = row_feedback.quantize(stored, prepared.correlations, gram, codebook, options.sweeps)
    else:
        parts = in_parallel(
            lambda part: _round(part, prepared, codebook, options), stored.split(rows_at_a_time(len(stored)))
        )
        codes, scales = (torch.cat(found) for found in zip(*parts, strict=True))
    parameters = Parameters(
        codebook=(codebook.values + 64).numpy().astype(np.uint8),
        exponents=prepared.refinement.exponents,
        listed=prepared.refinement.listed,
        tensor_scale=tensor_scale,
        activation_bits=options.activation_bits,
        activation_scale=options.activation_scale,
    )
    step = -(-len(stored) // ERROR_ROWS)
    restored = codebook.values[codes[::step].int()] * scales[::step].repeat_interleave(GROUP_COLUMNS, 1)
    error = _relative_error(stored[::step], restored, prepared)
    return QuantizedMatrix(Matrix(codes.numpy(), scales.numpy(), parameters), error, prepared.note)


def _round(stored: torch.Tensor, prepared: PreparedInput, codebook: cb.Codebook, options: MatrixOptions) -> _Rounded:
    """Rounds some rows, which do not depend on each other."""
    if prepared.correlations is not None:
        return column_feedback.quantize(stored, prepared.correlations, codebook, options.sweeps)
    scales = cb.search_scales(stored, prepared.importance, codebook)
    codes = codebook.encode(stored * cb.reciprocal(scales).repeat_interleave(GROUP_COLUMNS, 1))
    return codes.to(torch.uint8), scales


def _stored_weights(weight: NDArray[np.float32], refinement: Refinement, rotate: bool) -> tuple[torch.Tensor, float]:
    """W * 2^e / alpha in stored order, which D * code approximates; alpha makes the largest D about `_LARGEST`."""
    columns = weight.shape[1]
    growth = np.ldexp(np.float32(1), refinement.exponents.astype(np.int32)).repeat(GROUP_COLUMNS)
    stored = torch.from_numpy(np.take(weight, channel_order(refinement.listed, columns), axis=1))
    stored *= torch.from_numpy(growth)
    if rotate:
        for rows in stored.split(_ROWS_AT_A_TIME):
            rows.copy_(rotated(rows))
    alpha = tensor_scale_for(max(float(rows.abs().max()) for rows in stored.split(_ROWS_AT_A_TIME)))
    return stored.div_(alpha), alpha


def tensor_scale_for(largest: float) -> float:
    """The tensor scale alpha for a matrix whose largest weight has this size."""
    return max(float(np.float32(largest / (64 * _LARGEST))), _SMALLEST_ALPHA)


def _relative_error(stored: torch.Tensor, restored: torch.Tensor, prepared: PreparedInput) -> float:
    """tr(E H E^T) / tr(W H W^T); H is diagonal if no Hessian is known."""

    def energy(w: torch.Tensor) -> float:
        known = prepared.correlations
        product = (
            w * prepared.importance if known is None else column_feedback.times(known.hessian, w.T).T - w * known.added
        )
        return float((product * w).sum(dtype=torch.float64))

    total = energy(stored)
    return energy(stored - restored) / total if total > 0 else 0.0
