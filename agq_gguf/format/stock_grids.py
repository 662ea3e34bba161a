"""ggml's types of 5 and 6 bits as grids: a weight is step * code + offset, with a step and an offset for a few columns.

The scales of a block stay as ggml chose them; codes can be replaced. Layouts are those of ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

TYPE_NAMES = ("q5_0", "q5_1", "q5_K", "q6_K")
_BLOCK = {"q5_0": (32, 22), "q5_1": (32, 24), "q5_K": (256, 176), "q6_K": (256, 210)}  # columns, bytes


@dataclass(frozen=True)
class Grid:
    """What codes stand for. Codes are 0 to `most`; `width` columns share a step and an offset."""

    step: Floats  # [M, K / width]
    offset: Floats  # [M, K / width]
    width: int
    most: int


def block_columns(type_name: str) -> int:
    """How many columns a block of the type has."""
    return _BLOCK[type_name][0]


def grid(data: Bytes, type_name: str) -> Grid:
    """The grid of rows in a type, uint8 [M, bytes per row]."""
    blocks = _blocks(data, type_name)
    if type_name == "q5_0":
        step = _half(blocks, 0)
        return Grid(_flat(step), _flat(-16 * step), 32, 31)
    if type_name == "q5_1":
        return Grid(_flat(_half(blocks, 0)), _flat(_half(blocks, 2)), 32, 31)
    if type_name == "q5_K":
        scales, minima = _six_bits(blocks[..., 4:16])
        return Grid(_flat(_half(blocks, 0) * scales), _flat(-_half(blocks, 2) * minima), 32, 31)
    step = _half(blocks, 208) * blocks[..., 192:208].view(np.int8).astype(np.float32)
    return Grid(_flat(step), _flat(-32 * step), 16, 63)


def with_codes(data: Bytes, type_name: str, codes: Bytes) -> Bytes:
    """The rows with other codes [M, K], and the same scales."""
    made = _blocks(data, type_name).copy()
    columns = block_columns(type_name)
    q = codes.reshape(*made.shape[:2], columns)
    if type_name in ("q5_0", "q5_1"):
        begin = 2 if type_name == "q5_0" else 4
        made[..., begin : begin + 4] = np.packbits(q >> 4, axis=-1, bitorder="little")
        made[..., begin + 4 :] = (q[..., :16] & 15) | (q[..., 16:] & 15) << 4
    elif type_name == "q5_K":
        parts = q.reshape(*q.shape[:2], 8, 32)  # bit i of the high bits belongs to part i
        made[..., 16:48] = np.packbits(parts >> 4, axis=2, bitorder="little")[..., 0, :]
        made[..., 48:176] = ((parts[..., ::2, :] & 15) | (parts[..., 1::2, :] & 15) << 4).reshape(*q.shape[:2], 128)
    else:
        halves = q.reshape(*q.shape[:2], 2, 4, 32)
        low = (halves[..., :2, :] & 15) | (halves[..., 2:, :] & 15) << 4
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        made[..., :128] = low.reshape(*q.shape[:2], 128)
        made[..., 128:192] = np.bitwise_or.reduce(halves >> 4 << shifts, axis=-2).reshape(*q.shape[:2], 64)
    return made.reshape(data.shape)


def _blocks(data: Bytes, type_name: str) -> Bytes:
    """Bytes by block, [M, blocks, bytes per block]."""
    return np.ascontiguousarray(data).reshape(len(data), -1, _BLOCK[type_name][1])


def _half(blocks: Bytes, at: int) -> Floats:
    """A binary16 number of each block, [M, blocks, 1] as float32."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _flat(values: Floats) -> Floats:
    return np.ascontiguousarray(values.reshape(len(values), -1), np.float32)


def _six_bits(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight scales and eight minima of 6 bits in 12 bytes [.., 12]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | first >> 6 << 4], -1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)
    return scales.astype(np.float32), minima.astype(np.float32)
