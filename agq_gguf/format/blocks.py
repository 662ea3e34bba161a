"""Packs, unpacks and checks AGQ4 matrices, in numpy.

This is the reference for ``cpp/format/blocks.h``; ``docs/format.md`` specifies both. All functions are pure functions
of arrays, and only numpy is needed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import FormatError
from agq_gguf.format.pruning_record import (
    DIRECTION,
    RECORD,
    SCORES,
    Pruning,
    check_pruning,
    decode_pruning,
    pruning_bytes,
)

TYPE_ID = 38  # a retired number in ggml's type table
TYPE_NAME = "agq4"
VERSION = 1  # of the format; the byte in the attribute stream

PANEL_ROWS = 16
TILE_COLUMNS = 128
GROUP_COLUMNS = 64
TILE_BYTES = 1088
BLOCK_BYTES = TILE_BYTES // PANEL_ROWS  # one row of a tile: ggml's block
MAX_EXPONENT = 15
MAX_SCALE = 65024.0  # the largest binary16 whose lowest four bits are zero


# Which activations share a scale; files store the index. "rotated": the 64 channels of a group, after `rotate`.
ACTIVATION_SCALES = ("token", "group", "rotated")

_MAGIC = 0xA4
_FLAG_CHANNEL_ORDER = 1
_FLAG_PRUNING = 2
_HEADER = struct.Struct("<BBBBfII")
_SCALES = slice(0, 32)
_SCALE_LOW = slice(32, 48)
_ATTRIBUTES = slice(48, 64)
_CODES = slice(64, TILE_BYTES)


def _no_channels() -> NDArray[np.uint16]:
    return np.empty(0, np.uint16)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a whole matrix: the content of its attribute stream."""

    codebook: NDArray[np.uint8]  # [16], 0..127, ascending; u stands for u - 64
    exponents: NDArray[np.uint8]  # [K / 64], 0..15
    listed: NDArray[np.uint16] = field(default_factory=_no_channels)  # channels that come first; empty: no reordering
    tensor_scale: float = 1.0  # rounded to binary32
    activation_bits: int = 8  # 8 or 4
    activation_scale: str = "token"  # one of ACTIVATION_SCALES
    pruning: Pruning | None = None

    @property
    def per_group(self) -> bool:
        """Whether every group of a token has its own scale."""
        return self.activation_scale != "token"

    @property
    def rotated(self) -> bool:
        """Whether groups are stored rotated."""
        return self.activation_scale == "rotated"


@dataclass(frozen=True)
class Matrix:
    """One M x K matrix as AGQ4 stores it; columns are in stored order."""

    codes: NDArray[np.uint8]  # [M, K], 0..15
    scales: NDArray[np.float32]  # [M, K / 64], values of `round_scale`
    parameters: Parameters


def round_scale(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest storable scales: binary16 with the lowest four bits zero, ties to even, clamped to finite values."""
    exact = np.asarray(values, np.float64)
    _, exponent = np.frexp(exact)
    step = np.ldexp(1.0, np.maximum(exponent - 1, -14) - 6)  # 6 bits of mantissa; subnormals share the last step
    return np.clip(np.rint(exact / step) * step, -MAX_SCALE, MAX_SCALE).astype(np.float32)


def parameters_bytes(columns: int, n_listed: int, pruning: int = 0) -> int:
    """Bytes that a matrix with K = `columns` needs in its attribute stream; its pruning record has `pruning` bytes."""
    order = 2 + 2 * n_listed if n_listed else 0
    return _HEADER.size + 16 + columns // GROUP_COLUMNS + order + pruning


def stream_bytes(rows: int, columns: int) -> int:
    """Size in bytes of the attribute stream of a matrix."""
    return rows * columns // TILE_COLUMNS


def listable(rows: int, columns: int) -> int:
    """How many channels the channel order of such a matrix can list if a pruning record must still fit."""
    return max(0, (stream_bytes(rows, columns) - parameters_bytes(columns, 0, pruning_bytes()) - 2) // 2)


def shape_problem(rows: int, columns: int) -> str | None:
    """Why AGQ4 does not support a matrix of this shape; None if it does."""
    if columns % TILE_COLUMNS or columns == 0:
        return f"columns must be a multiple of {TILE_COLUMNS}, got {columns}"
    if rows % PANEL_ROWS or rows == 0:
        return f"rows must be a multiple of {PANEL_ROWS}, got {rows}"
    if stream_bytes(rows, columns) < parameters_bytes(columns, 0):
        return f"{rows} x {columns} is too small to store its parameters"
    return None


def _check_shape(rows: int, columns: int) -> None:
    problem = shape_problem(rows, columns)
    if problem:
        raise FormatError(f"AGQ4 does not support this matrix: {problem}")


def _check_parameters(parameters: Parameters, columns: int) -> None:
    """Checks every rule of the format about values, for packing and for reading."""
    codebook, exponents, listed = parameters.codebook, parameters.exponents, parameters.listed
    with np.errstate(over="ignore"):
        scale = np.float32(parameters.tensor_scale)
    if not (np.isfinite(scale) and scale > 0):
        raise FormatError(f"the tensor scale must be finite and > 0, got {scale}")
    if parameters.activation_bits not in (4, 8):
        raise FormatError(f"activation bits must be 4 or 8, got {parameters.activation_bits}")
    if parameters.activation_scale not in ACTIVATION_SCALES:
        known = ", ".join(ACTIVATION_SCALES)
        raise FormatError(f"activation scale must be one of {known}, got {parameters.activation_scale!r}")
    if codebook.shape != (16,) or codebook.max() > 127 or np.any(np.diff(codebook.astype(np.int16)) < 0):
        raise FormatError(f"the codebook must be 16 ascending values 0..127, got {codebook.tolist()}")
    if exponents.shape != (columns // GROUP_COLUMNS,):
        raise FormatError(
            f"{columns} columns need {columns // GROUP_COLUMNS} exponents (one per {GROUP_COLUMNS}), "
            f"got {exponents.size}"
        )
    if exponents.max() > MAX_EXPONENT:
        raise FormatError(f"a refinement exponent must be 0 to {MAX_EXPONENT}, got {exponents.max()}")
    if listed.size > columns or (listed.size and listed.max() >= columns):
        raise FormatError(f"the channel order lists a channel beyond the {columns} columns")
    if np.unique(listed).size != listed.size:
        raise FormatError("the channel order lists a channel twice")
    if parameters.pruning is not None:
        check_pruning(parameters.pruning)


def _encode_parameters(parameters: Parameters, capacity: int) -> NDArray[np.uint8]:
    """The attribute stream of `capacity` bytes."""
    body = parameters.codebook.tobytes() + parameters.exponents.tobytes()
    flags = 0
    if parameters.listed.size:
        flags |= _FLAG_CHANNEL_ORDER
        body += struct.pack("<H", parameters.listed.size) + parameters.listed.astype("<u2").tobytes()
    if parameters.pruning is not None:
        flags |= _FLAG_PRUNING
        p = parameters.pruning
        body += RECORD.pack(SCORES.index(p.score), p.keep, p.reach, p.reuse, p.threshold)
        if p.direction is not None:
            body += DIRECTION.pack(p.direction.factor, len(p.direction.codes), 0)
            body += np.array(p.direction.codes, np.int8).tobytes()
    activation = parameters.activation_bits | ACTIVATION_SCALES.index(parameters.activation_scale) << 4
    header = _HEADER.pack(
        _MAGIC, VERSION, activation, flags, np.float32(parameters.tensor_scale), zlib.crc32(body), len(body)
    )
    if len(header) + len(body) > capacity:
        raise FormatError(
            f"the matrix has room for {capacity} bytes of parameters, but they need {len(header) + len(body)}"
        )
    return np.frombuffer((header + body).ljust(capacity, b"\0"), np.uint8)


def _decode_parameters(stream: NDArray[np.uint8], columns: int) -> Parameters:
    raw = stream.tobytes()
    magic, version, activation, flags, tensor_scale, crc, length = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise FormatError(
            f"the attributes must begin with 0x{_MAGIC:02X}, got 0x{magic:02X}: the file is damaged or not AGQ4"
        )
    if version != VERSION:
        raise FormatError(f"AGQ4 version must be {VERSION}, got {version}; update agq-gguf")
    if flags & ~(_FLAG_CHANNEL_ORDER | _FLAG_PRUNING) or activation >> 4 >= len(ACTIVATION_SCALES):
        raise FormatError(f"unknown attributes (activation 0x{activation:02X}, flags 0x{flags:02X}); update agq-gguf")
    if length > len(raw) - _HEADER.size:
        raise FormatError(
            f"the parameters must have at most {len(raw) - _HEADER.size} bytes in this matrix, got {length}: "
            "the file is damaged"
        )
    body = raw[_HEADER.size : _HEADER.size + length]
    if zlib.crc32(body) != crc:
        raise FormatError("the checksum of the parameters does not match: the file is damaged")
    n_groups = columns // GROUP_COLUMNS
    listed, record = _no_channels(), body[16 + n_groups :]
    if flags & _FLAG_CHANNEL_ORDER and len(record) >= 2:
        announced = struct.unpack_from("<H", record)[0]
        listed = np.frombuffer(record[2 : 2 + 2 * announced], "<u2", len(record[2 : 2 + 2 * announced]) // 2)
        if announced == 0:
            raise FormatError("the channel order must list at least 1 channel, got 0")
        if listed.size != announced:
            raise FormatError(f"the channel order must list {announced} channels, got {listed.size}")
        listed, record = listed.astype(np.uint16), record[2 + 2 * announced :]
    pruning = decode_pruning(record) if flags & _FLAG_PRUNING else None
    present = (_FLAG_CHANNEL_ORDER if listed.size else 0) | (_FLAG_PRUNING if pruning else 0)
    needed = parameters_bytes(columns, listed.size, pruning.n_bytes if pruning else 0) - _HEADER.size
    if flags != present or length != needed:
        raise FormatError(
            f"the parameters must have {needed} bytes for {columns} columns and flags 0x{flags:02X}, got {length}"
        )
    if any(raw[_HEADER.size + length :]):
        raise FormatError("the bytes after the parameters must be zero: the file is damaged")
    parameters = Parameters(
        codebook=np.frombuffer(body[:16], np.uint8),
        exponents=np.frombuffer(body[16 : 16 + n_groups], np.uint8),
        listed=listed,
        tensor_scale=tensor_scale,
        activation_bits=activation & 15,
        activation_scale=ACTIVATION_SCALES[activation >> 4],
        pruning=pruning,
    )
    _check_parameters(parameters, columns)
    return parameters


def pack(matrix: Matrix) -> NDArray[np.uint8]:
    """Bytes of a matrix as a GGUF file holds them: uint8 [M, K / 128 * 68].

    Raises FormatError when the matrix breaks a rule of the format.
    """
    rows, columns = matrix.codes.shape
    _check_shape(rows, columns)
    _check_parameters(matrix.parameters, columns)
    panels, tiles = rows // PANEL_ROWS, columns // TILE_COLUMNS
    if matrix.codes.max() > 15:
        raise FormatError(f"codes must be 0 to 15, got {matrix.codes.max()}")
    if matrix.scales.shape != (rows, 2 * tiles) or not np.array_equal(matrix.scales, round_scale(matrix.scales)):
        raise FormatError(f"the scales must be [{rows}, {2 * tiles}] and rounded with round_scale")

    out = np.empty((panels, tiles, TILE_BYTES), np.uint8)
    bits = matrix.scales.astype(np.float16).view(np.uint16).reshape(panels, PANEL_ROWS, tiles, 2)
    bits = bits.transpose(0, 2, 3, 1)  # panel, tile, half, row
    out[..., _SCALES] = (bits >> 8).astype(np.uint8).reshape(panels, tiles, 32)
    nibbles = (bits >> 4 & 15).astype(np.uint8)
    out[..., _SCALE_LOW] = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    stream = _encode_parameters(matrix.parameters, stream_bytes(rows, columns))
    out[..., _ATTRIBUTES] = stream.reshape(panels, tiles, 16)
    codes = matrix.codes.reshape(panels, PANEL_ROWS, tiles, 16, 2, 4)  # panel, row, tile, chunk, nibble, j
    chunks = codes[..., 0, :] | codes[..., 1, :] << 4
    out[..., _CODES] = chunks.transpose(0, 2, 3, 1, 4).reshape(panels, tiles, 1024)
    return out.reshape(rows, tiles * BLOCK_BYTES)


def _tiles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """GGUF rows [M, K / 128 * 68] as tiles [M / 16, K / 128, 1088]."""
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % BLOCK_BYTES:
        raise FormatError(
            f"AGQ4 data must be uint8 rows of a multiple of {BLOCK_BYTES} bytes, got {data.dtype} {data.shape}"
        )
    rows, tiles = data.shape[0], data.shape[1] // BLOCK_BYTES
    _check_shape(rows, tiles * TILE_COLUMNS)
    return np.ascontiguousarray(data).reshape(rows // PANEL_ROWS, tiles, TILE_BYTES)


def read_parameters(data: NDArray[np.uint8]) -> Parameters:
    """Reads and checks the parameters of a packed matrix (uint8 [M, K / 128 * 68]); fast. Raises FormatError."""
    tiles = _tiles(data)
    return _decode_parameters(tiles[..., _ATTRIBUTES], tiles.shape[1] * TILE_COLUMNS)


def with_pruning(data: NDArray[np.uint8], pruning: Pruning | None) -> NDArray[np.uint8]:
    """A copy of a packed matrix (uint8 [M, K / 128 * 68]) with `pruning` as its pruning record; None removes it.

    Only attribute bytes differ. Raises FormatError if the matrix is damaged, the record breaks a rule of the format, or
    the matrix has no room for it (a channel order may use all of it).
    """
    tiles = _tiles(data).copy()
    columns = tiles.shape[1] * TILE_COLUMNS
    parameters = replace(_decode_parameters(tiles[..., _ATTRIBUTES], columns), pruning=pruning)
    _check_parameters(parameters, columns)
    stream = _encode_parameters(parameters, stream_bytes(data.shape[0], columns))
    tiles[..., _ATTRIBUTES] = stream.reshape(*tiles.shape[:2], 16)
    return tiles.reshape(data.shape)


def unpack(data: NDArray[np.uint8]) -> Matrix:
    """Inverse of `pack`. Raises FormatError if the data breaks a rule of the format."""
    tiles = _tiles(data)
    panels, n_tiles = tiles.shape[:2]
    rows, columns = panels * PANEL_ROWS, n_tiles * TILE_COLUMNS
    parameters = _decode_parameters(tiles[..., _ATTRIBUTES], columns)
    high = tiles[..., _SCALES].reshape(panels, n_tiles, 2, PANEL_ROWS).astype(np.uint16)
    low = tiles[..., _SCALE_LOW].astype(np.uint16)
    bits = high << 8 | np.stack([low & 15, low >> 4], axis=2) << 4
    scales = bits.view(np.float16).astype(np.float32).transpose(0, 3, 1, 2).reshape(rows, 2 * n_tiles)
    if not np.all(np.isfinite(scales)):
        raise FormatError("a scale is infinite or not a number: the file is damaged")
    chunks = tiles[..., _CODES].reshape(panels, n_tiles, 16, PANEL_ROWS, 4)
    codes = np.stack([chunks & 15, chunks >> 4], axis=4)  # panel, tile, chunk, row, nibble, j
    codes = codes.transpose(0, 3, 1, 2, 4, 5).reshape(rows, columns)
    return Matrix(codes, scales, parameters)


def channel_order(listed: Sequence[int] | NDArray[np.uint16], columns: int) -> NDArray[np.int64]:
    """`order[k]` is the input channel of stored column k: first the listed channels, then the others, ascending."""
    first = np.asarray(listed, np.int64)
    others = np.ones(columns, bool)
    others[first] = False
    return np.concatenate([first, np.flatnonzero(others)])
