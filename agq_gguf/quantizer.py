"""From float weights and input statistics to an AGQ4 matrix. Pure: arrays in, arrays out.

Two steps. `prepare_input` decides what belongs to the input and is shared by all weights that multiply it: channel order,
refinement exponents, error weights, the factor for error feedback. `quantize_matrix` then does one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf import codebook as cb
from agq_gguf.blocks import GROUP_COLUMNS, Matrix, Parameters, channel_order
from agq_gguf.errors import InputError
from agq_gguf.stats import InputStats


@dataclass(frozen=True)
class MatrixOptions:
    """How one matrix is quantized; the defaults are what measured best."""

    activation_bits: int = 8
    per_group: bool = False
    refine: bool = True  # exponents and channel order
    learn_codebook: bool = True
    error_feedback: bool = True
    damping: float = 0.01


@dataclass(frozen=True)
class PreparedInput:
    """What holds for every weight that multiplies one input; columns in stored order."""

    listed: NDArray[np.uint16]
    exponents: NDArray[np.uint8]  # [K / 64]
    importance: torch.Tensor  # [K] float32, E[x'^2] of the refined input x' = x * 2^-e
    note: str = ""  # what was done with less than wanted, and why


@dataclass(frozen=True)
class QuantizedMatrix:
    matrix: Matrix
    error: float  # squared output error over squared output on the calibration data (or on white noise without any)
    note: str = ""


def prepare_input(stats: InputStats | None, columns: int, capacity: int, options: MatrixOptions) -> PreparedInput:
    """Chooses what all weights of one input share.

    `capacity` is how many channels the smallest of these weights can list. Without statistics all channels count alike.
    """
    listed, exponents = np.empty(0, np.uint16), np.zeros(columns // GROUP_COLUMNS, np.uint8)
    square = np.ones(columns, np.float32) if stats is None else stats.mean_square
    order = channel_order(listed, columns)
    refined = np.ldexp(square[order], -2 * np.repeat(exponents.astype(np.int32), GROUP_COLUMNS))
    return PreparedInput(listed, exponents, torch.from_numpy(_usable(refined)))


def _usable(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scaled to mean 1, with a floor: a channel that was silent in the calibration text still has to be stored sensibly."""
    mean = float(importance.mean(dtype=np.float64))
    if not mean > 0:
        return np.ones_like(importance)
    return np.maximum(importance / np.float32(mean), np.float32(1e-4)).astype(np.float32)


def quantize_matrix(
    weight: NDArray[np.float32], prepared: PreparedInput, options: MatrixOptions, name: str = "the matrix"
) -> QuantizedMatrix:
    """Quantizes one matrix [M, K] f32 (columns in input-channel order).

    Raises InputError when the weights hold a NaN or an infinity.
    """
    if not np.isfinite(weight).all():
        raise InputError(f"tensor {name} holds a NaN or an infinity; the model is damaged")
    rows, columns = weight.shape
    stored, tensor_scale = _stored_weights(weight, prepared)
    h = prepared.importance.reshape(1, -1, GROUP_COLUMNS).expand(rows, -1, -1).reshape(-1, GROUP_COLUMNS)
    groups = stored.reshape(-1, GROUP_COLUMNS)
    codebook = cb.learn(groups, h) if options.learn_codebook else cb.fixed()
    scales = cb.search_scales(groups, h, codebook)
    codes = cb.encode(groups, scales, codebook)
    difference = groups - scales[:, None] * codebook[codes]
    total = float((groups.square() * h).sum(dtype=torch.float64))
    error = float((difference.square() * h).sum(dtype=torch.float64)) / total if total else 0.0
    parameters = Parameters(
        codebook=(codebook + 64).numpy().astype(np.uint8),
        exponents=prepared.exponents,
        listed=prepared.listed,
        tensor_scale=tensor_scale,
        activation_bits=options.activation_bits,
        per_group=options.per_group,
    )
    matrix = Matrix(
        codes.reshape(rows, columns).numpy().astype(np.uint8), scales.reshape(rows, -1).numpy(), parameters
    )
    return QuantizedMatrix(matrix, error, prepared.note)


def _stored_weights(weight: NDArray[np.float32], prepared: PreparedInput) -> tuple[torch.Tensor, float]:
    """Weights W' = W * 2^e / alpha in stored order, so that W' = D * code, and alpha, which makes the largest D about 1."""
    columns = weight.shape[1]
    growth = np.ldexp(np.float32(1), prepared.exponents.astype(np.int32)).repeat(GROUP_COLUMNS)
    stored = torch.from_numpy(weight[:, channel_order(prepared.listed, columns)] * growth)
    largest = float(stored.abs().max())
    alpha = float(np.float32(largest / 64)) or 1.0  # also when the division underflows
    return stored / alpha, alpha
