"""Error feedback into ggml's types of 5 and 6 bits, then coordinate descent (`column_feedback` does it for AGQ4).

Blocks of columns are rounded one after another, those with most energy first. ggml chooses the scales of a block, with
earlier errors added to its weights; then the columns of the block are rounded with feedback on the grid that these
scales make. Stock kernels multiply with the result as with any matrix of the type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats
from agq_gguf.errors import InputError
from agq_gguf.format import stock_grids
from agq_gguf.matrix import kernels, row_feedback, stock_types
from agq_gguf.matrix.factor import inverse_factor, reordered
from agq_gguf.matrix.kernels import GridBlock
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.parallel import in_parallel, rows_at_a_time
from agq_gguf.matrix.quantize import ERROR_ROWS

_FLOOR = 1e-4  # least importance of a channel, as a share of the mean
_MORE_DAMPING = 10  # times the damping, where a first attempt to factor the Hessian fails

# Scales are F16 numbers. If one is too large for that, `quantize` says so, and numpy need not.
_infinities_are_told = np.errstate(invalid="ignore", over="ignore")


@dataclass(frozen=True)
class _Known:
    """What error feedback needs to know of an input of K channels."""

    hessian: torch.Tensor  # [K, K], that of the statistics itself
    added: float  # belongs to its diagonal: damping
    order: torch.Tensor  # [K] int64, the columns in the order of rounding; blocks stay together
    upper: torch.Tensor  # U of the damped Hessian in that order, as in `column_feedback`

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """H x [K, M], with damping."""
        return torch.addmm(x, self.hessian, x, beta=self.added)


@dataclass(frozen=True)
class PreparedStock:
    """What the weights of one type with one input share."""

    type_name: str
    importance: NDArray[np.float32] | None = None  # [K], cost of a squared error; None: all columns cost the same
    known: _Known | None = None
    sweeps: int = 0  # rounds of coordinate descent
    note: str = ""  # a fallback that was used, and why


@dataclass(frozen=True)
class QuantizedStock:
    """A matrix in one of ggml's types and its error."""

    type_name: str
    packed: NDArray[np.uint8]  # the bytes of the file, [M, bytes per row]
    error: float  # as in `QuantizedMatrix`
    note: str = ""

    def restored(self) -> NDArray[np.float32]:
        """The weights [M, K]."""
        return stock_types.restored(self.packed, self.type_name)


def prepare(stats: InputStats | None, type_name: str, options: MatrixOptions) -> PreparedStock:
    """Computes what all weights of this type with one input share; needs memory for one matrix [K, K] more."""
    if stats is None:
        return PreparedStock(type_name)
    if not stats.mean_square.any():
        return PreparedStock(type_name, note="its input is always zero in the calibration text")
    importance = np.maximum(stats.mean_square, _FLOOR * stats.mean_square.mean(dtype=np.float64)).astype(np.float32)
    if stats.hessian is None or not options.error_feedback:
        return PreparedStock(type_name, importance)
    hessian = torch.from_numpy(stats.hessian)
    energy = hessian.diagonal().reshape(-1, stock_grids.block_columns(type_name))
    blocks = energy.sum(1).argsort(descending=True, stable=True)
    inside = energy.argsort(dim=1, descending=True, stable=True)
    order = (blocks[:, None] * energy.shape[1] + inside[blocks]).reshape(-1)
    for more in (1, _MORE_DAMPING):
        added = more * options.damping * float(energy.mean())
        upper = _factor(hessian, order, added)
        if upper is not None:
            return PreparedStock(type_name, importance, _Known(hessian, added, order, upper), options.sweeps)
    note = "error feedback failed (the Hessian has no Cholesky factor)"
    return PreparedStock(type_name, importance, note=note)


def _factor(hessian: torch.Tensor, order: torch.Tensor, added: float) -> torch.Tensor | None:
    damped = reordered(hessian, order)
    damped.diagonal().add_(added)
    return inverse_factor(damped)


def quantize(
    weight: NDArray[np.float32], prepared: PreparedStock, name: str = "the matrix", gram: torch.Tensor | None = None
) -> QuantizedStock:
    """Rounds a matrix [M, K] f32; `gram` is E[g g^T] [M, M] for the gradient g with respect to the output, if known.

    Raises InputError if it holds a NaN or an infinity.
    """
    if not np.isfinite(weight).all():
        raise InputError(f"tensor {name} holds a NaN or an infinity; the model is damaged, download it again")
    made = None if gram is None or prepared.known is None else _between_rows(weight, prepared, gram)
    if made is None:
        parts = torch.from_numpy(weight).split(rows_at_a_time(len(weight)))
        made = np.concatenate(in_parallel(lambda part: _round(part.numpy(), prepared), parts))
    some = slice(None, None, -(-len(weight) // ERROR_ROWS))
    error = _relative_error(weight[some], made[some], prepared)
    if not np.isfinite(error):
        raise InputError(
            f"tensor {name} has values that the type {prepared.type_name} cannot hold; "
            "leave this type out of --target-types, or give the tensor another one"
        )
    return QuantizedStock(prepared.type_name, made, error, prepared.note)


def _between_rows(weight: NDArray[np.float32], prepared: PreparedStock, gram: torch.Tensor) -> NDArray[np.uint8] | None:
    """The bytes of a matrix with feedback between rows, too; None if no later layer depends on it."""
    made: dict[int, NDArray[np.uint8]] = {}

    def round_rows(numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        data = _round(rows.numpy(), prepared)
        made.update(zip(numbers.tolist(), data, strict=True))
        return torch.from_numpy(stock_types.restored(data, prepared.type_name))

    if not row_feedback.in_panels(torch.from_numpy(weight), gram, round_rows):
        return None
    return np.stack([made[row] for row in range(len(weight))])


@_infinities_are_told
def _relative_error(weight: NDArray[np.float32], made: NDArray[np.uint8], prepared: PreparedStock) -> float:
    """tr(E H E^T) / tr(W H W^T); with the diagonal of H, or 1, if that is all that is known."""
    restored = stock_types.restored(made, prepared.type_name)

    def energy(rows: NDArray[np.float32]) -> float:
        if prepared.known is not None:
            product: NDArray[np.float32] = (prepared.known.hessian @ torch.from_numpy(rows).T).T.numpy()
            return float((product * rows).sum(dtype=np.float64))
        costs = 1 if prepared.importance is None else prepared.importance
        return float((np.square(rows, dtype=np.float64) * costs).sum())

    total = energy(weight)
    return energy(weight - restored) / total if total > 0 else 0.0


@_infinities_are_told
def _round(weight: NDArray[np.float32], prepared: PreparedStock) -> NDArray[np.uint8]:
    """Some rows [n, K] in the type, uint8 [n, bytes per row]."""
    if prepared.known is None:
        return stock_types.quantize(weight, prepared.type_name, prepared.importance)
    weights = torch.from_numpy(weight).T
    blocks = _feed_back(weights, prepared.known, prepared.type_name)
    _descend(weights, prepared.known, blocks, prepared.sweeps)
    return np.concatenate([block.packed(prepared.type_name) for block in blocks], axis=1)


# Below, matrices are transposed, [K, n], so that one column of the weights is one contiguous row.


@dataclass(frozen=True)
class _Block:
    """A block of columns [width, n] of some rows."""

    data: NDArray[np.uint8]  # bytes with the scales
    grid: GridBlock
    codes: torch.Tensor  # [width, n] uint8

    def packed(self, type_name: str) -> NDArray[np.uint8]:
        return stock_grids.with_codes(self.data, type_name, self.codes.T.contiguous().numpy())


def _feed_back(weights: torch.Tensor, known: _Known, type_name: str) -> list[_Block]:
    """The blocks in the order of the columns, each with scales for its weights and earlier errors."""
    order, upper = known.order, known.upper
    width = stock_grids.block_columns(type_name)
    costs, rest = upper.diagonal().square().reciprocal(), weights[order]
    found: dict[int, _Block] = {}
    for begin in range(0, len(rest), width):
        here, later = slice(begin, begin + width), slice(begin + width, None)
        number, places = int(order[begin]) // width, order[here] % width
        in_place, importance = torch.empty_like(rest[here]), torch.empty(width)
        in_place[places], importance[places] = rest[here], costs[here]
        data = stock_types.quantize(in_place.T.contiguous().numpy(), type_name, importance.numpy())
        grid = _grid(data, type_name)
        in_order = GridBlock(grid.steps[places], grid.offsets[places], grid.most)
        codes, errors = kernels.feed_back_on_grid(in_order, upper[here, here].contiguous(), rest[here])
        found[number] = _Block(data, grid, torch.empty_like(codes))
        found[number].codes[places] = codes
        rest[later].addmm_(upper[here, later].T, errors, alpha=-1)
    return [found[number] for number in sorted(found)]


def _descend(weights: torch.Tensor, known: _Known, blocks: list[_Block], sweeps: int) -> None:
    """Visits all columns again, now that all others are known (`column_feedback`); scales stay as they are."""
    width = len(blocks[0].codes)
    restored = torch.cat([block.grid.values(block.codes) for block in blocks])
    slope = known.times(weights - restored)
    for _ in range(sweeps):
        for number, block in enumerate(blocks):
            here = slice(number * width, (number + 1) * width)
            inside = known.hessian[here, here].clone()
            inside.diagonal().add_(known.added)
            change = kernels.descend_on_grid(block.grid, inside, slope[here], block.codes)
            slope.addmm_(known.hessian[:, here], change, alpha=-1)
            slope[here].add_(change, alpha=-known.added)


def _grid(data: NDArray[np.uint8], type_name: str) -> GridBlock:
    """The grid of a block of columns, for each column."""
    grid = stock_grids.grid(data, type_name)
    steps, offsets = (
        torch.from_numpy(part).T.repeat_interleave(grid.width, 0).contiguous() for part in (grid.step, grid.offset)
    )
    return GridBlock(steps, offsets, grid.most)
