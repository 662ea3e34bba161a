"""Packs, unpacks and checks AGQ4 matrices, in numpy.

This is the reference for ``cpp/format/blocks.h``; ``docs/format.md`` specifies both. All functions are pure functions
of arrays, and only numpy is needed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import FormatError
from agq_gguf.format.pruning_record import (
    Pruning,
    check_pruning,
    decode_pruning,
    pruning_bytes,
)

TYPE_ID = 38  # a retired number in ggml's type table
TYPE_NAME = "agq4"
VERSION = 1  # of the format; the byte in the attribute stream

PANEL_ROWS = 16
GROUP_COLUMNS = 64  # columns that share a scale: ggml's block
BLOCK_BYTES = 34  # of one row in one group
MAX_EXPONENT = 15
MAX_SCALE = 65024.0  # the largest binary16 whose lowest four bits are zero


# Which activations share a scale; files store the index. "rotated": the 64 channels of a group, after `rotate`.
ACTIVATION_SCALES = ("token", "group", "rotated")

_MAGIC = 0xA4
_FLAG_CHANNEL_ORDER = 1
_FLAG_PRUNING = 2
_HEADER = struct.Struct("<BBBBfII")


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
    groups, last = columns // GROUP_COLUMNS, rows % PANEL_ROWS
    full = rows // PANEL_ROWS * groups * (PANEL_ROWS // 2)
    return full + groups // 2 * last + groups % 2 * (last // 2)


def listable(rows: int, columns: int) -> int:
    """How many channels the channel order of such a matrix can list if a pruning record must still fit."""
    return max(0, (stream_bytes(rows, columns) - parameters_bytes(columns, 0, pruning_bytes()) - 2) // 2)


def shape_problem(rows: int, columns: int) -> str | None:
    """Why AGQ4 does not support a matrix of this shape; None if it does."""
    if columns % GROUP_COLUMNS or columns == 0:
        return f"columns must be a multiple of {GROUP_COLUMNS}, got {columns}"
    if rows == 0:
        return "rows must be at least 1, got 0"
    room, needed = stream_bytes(rows, columns), parameters_bytes(columns, 0)
    if room < needed:
        return f"its attribute stream has {room} bytes, {needed} are needed"
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
        body += parameters.pruning.to_bytes()
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
    needed = parameters_bytes(columns, listed.size, len(pruning.to_bytes()) if pruning else 0) - _HEADER.size
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


@dataclass(frozen=True)
class _Section:
    """Some panels with equally many rows, as views into the bytes of a matrix: their tiles and their half tiles."""

    rows: slice
    tiles: NDArray[np.uint8]  # [panels, tiles, 68 * rows of a panel]
    halves: NDArray[np.uint8]  # [panels, 34 * rows of a panel], or [panels, 0] if the number of groups is even

    @property
    def height(self) -> int:
        """Rows of a panel."""
        return (self.rows.stop - self.rows.start) // len(self.tiles)

    @property
    def scales(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Of tiles: high bytes [panels, tiles, 2, rows], low nibbles [panels, tiles, rows]; the same of half tiles."""
        n = self.height
        high, low = self.tiles[..., : 2 * n], self.tiles[..., 2 * n : 3 * n]
        return high.reshape(*high.shape[:2], 2, n), low, self.halves[:, :n], self.halves[:, n : n + (n + 1) // 2]

    @property
    def attributes(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Attribute bytes of tiles [panels, tiles, rows] and of half tiles [panels, rows / 2]."""
        n = self.height
        return self.tiles[..., 3 * n : 4 * n], self.halves[:, n + (n + 1) // 2 : 2 * n]

    @property
    def codes(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Chunks of tiles [panels, tiles, 16 * 4 * rows] and of half tiles [panels, 8 * 4 * rows]."""
        n = self.height
        return self.tiles[..., 4 * n :], self.halves[:, 2 * n :]


def _sections(data: NDArray[np.uint8]) -> Iterator[_Section]:
    """The full panels of a matrix [M, K / 64 * 34], which is contiguous, then its last panel if that has fewer rows."""
    rows, groups = data.shape[0], data.shape[1] // BLOCK_BYTES
    flat, full = data.reshape(-1), rows // PANEL_ROWS * PANEL_ROWS
    for begin, end, height in ((0, full, PANEL_ROWS), (full, rows, rows - full)):
        if begin == end:
            continue
        row_bytes = groups * BLOCK_BYTES
        panels = flat[begin * row_bytes : end * row_bytes].reshape(-1, height * row_bytes)
        in_tiles = groups // 2 * 2 * BLOCK_BYTES * height
        tiles = panels[:, :in_tiles].reshape(len(panels), groups // 2, 2 * BLOCK_BYTES * height)
        yield _Section(slice(begin, end), tiles, panels[:, in_tiles:])


def pack(matrix: Matrix) -> NDArray[np.uint8]:
    """Bytes of a matrix as a GGUF file holds them: uint8 [M, K / 64 * 34].

    Raises FormatError when the matrix breaks a rule of the format.
    """
    rows, columns = matrix.codes.shape
    _check_shape(rows, columns)
    _check_parameters(matrix.parameters, columns)
    groups = columns // GROUP_COLUMNS
    if matrix.codes.max() > 15:
        raise FormatError(f"codes must be 0 to 15, got {matrix.codes.max()}")
    if matrix.scales.shape != (rows, groups) or not np.array_equal(matrix.scales, round_scale(matrix.scales)):
        raise FormatError(f"the scales must be [{rows}, {groups}] and rounded with round_scale")

    stream = _encode_parameters(matrix.parameters, stream_bytes(rows, columns))
    out = np.zeros((rows, groups * BLOCK_BYTES), np.uint8)
    bits = matrix.scales.astype(np.float16).view(np.uint16)
    for section in _sections(out):
        _put_scales(section, bits[section.rows])
        _put_codes(section, matrix.codes[section.rows])
    _put_stream(out, stream)
    return out


def _put_scales(section: _Section, bits: NDArray[np.uint16]) -> None:
    """Writes scales, the bits of binary16 numbers [rows, K / 64]."""
    tile_high, tile_low, half_high, half_low = section.scales
    panels, tiles = section.tiles.shape[:2]
    by_panel = bits.reshape(panels, section.height, -1).transpose(0, 2, 1)  # panel, group, row
    high, low = (by_panel >> 8).astype(np.uint8), (by_panel >> 4 & 15).astype(np.uint8)
    tile_high[:] = high[:, : 2 * tiles].reshape(tile_high.shape)
    tile_low[:] = low[:, 0 : 2 * tiles : 2] | low[:, 1 : 2 * tiles : 2] << 4
    if section.halves.size:
        half_high[:] = high[:, -1]
        half_low[:] = low[:, -1, 0::2]
        half_low[:, : section.height // 2] |= low[:, -1, 1::2] << 4


def _put_codes(section: _Section, codes: NDArray[np.uint8]) -> None:
    """Writes codes [rows, K]."""
    panels, tiles = section.tiles.shape[:2]
    pairs = codes.reshape(panels, section.height, -1, 2, 4)  # panel, row, chunk, nibble, j
    chunks = (pairs[..., 0, :] | pairs[..., 1, :] << 4).transpose(0, 2, 1, 3)  # panel, chunk, row, j
    of_tiles, of_halves = section.codes
    of_tiles[:] = chunks[:, : 16 * tiles].reshape(of_tiles.shape)
    if section.halves.size:
        of_halves[:] = chunks[:, 16 * tiles :].reshape(of_halves.shape)


def _stream(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The attribute stream of a matrix [M, K / 64 * 34]: the attribute bytes in the order of the file."""
    parts = []
    for section in _sections(data):
        tiles, halves = section.attributes
        parts.append(np.concatenate([tiles.reshape(len(tiles), -1), halves], axis=1).reshape(-1))
    return np.concatenate(parts)


def _put_stream(data: NDArray[np.uint8], stream: NDArray[np.uint8]) -> None:
    for section in _sections(data):
        tiles, halves = section.attributes
        of_panel = tiles[0].size + halves.shape[1]
        here, stream = np.split(stream, [len(tiles) * of_panel])
        here = here.reshape(len(tiles), of_panel)
        tiles[:] = here[:, : tiles[0].size].reshape(tiles.shape)
        halves[:] = here[:, tiles[0].size :]


def _checked(data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """GGUF rows [M, K / 64 * 34], contiguous, and K; raises FormatError if there is no such matrix."""
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % BLOCK_BYTES:
        raise FormatError(
            f"AGQ4 data must be uint8 rows of a multiple of {BLOCK_BYTES} bytes, got {data.dtype} {data.shape}"
        )
    columns = data.shape[1] // BLOCK_BYTES * GROUP_COLUMNS
    _check_shape(data.shape[0], columns)
    return np.ascontiguousarray(data), columns


def read_parameters(data: NDArray[np.uint8]) -> Parameters:
    """Reads and checks the parameters of a packed matrix (uint8 [M, K / 64 * 34]); fast. Raises FormatError."""
    rows, columns = _checked(data)
    return _decode_parameters(_stream(rows), columns)


def with_pruning(data: NDArray[np.uint8], pruning: Pruning | None) -> NDArray[np.uint8]:
    """A copy of a packed matrix (uint8 [M, K / 64 * 34]) with `pruning` as its pruning record; None removes it.

    Only attribute bytes differ. Raises FormatError if the matrix is damaged, the record breaks a rule of the format, or
    the matrix has no room for it (a channel order may use all of it).
    """
    rows, columns = _checked(data)
    parameters = replace(_decode_parameters(_stream(rows), columns), pruning=pruning)
    _check_parameters(parameters, columns)
    out = rows.copy()
    _put_stream(out, _encode_parameters(parameters, stream_bytes(data.shape[0], columns)))
    return out


def unpack(data: NDArray[np.uint8]) -> Matrix:
    """Inverse of `pack`. Raises FormatError if the data breaks a rule of the format."""
    contiguous, columns = _checked(data)
    parameters = _decode_parameters(_stream(contiguous), columns)
    rows = len(data)
    bits = np.empty((rows, columns // GROUP_COLUMNS), np.uint16)
    codes = np.empty((rows, columns), np.uint8)
    for section in _sections(contiguous):
        bits[section.rows] = _scale_bits(section)
        codes[section.rows] = _codes(section)
    scales = bits.view(np.float16).astype(np.float32)
    if not np.all(np.isfinite(scales)):
        raise FormatError("a scale is infinite or not a number: the file is damaged")
    return Matrix(codes, scales, parameters)


def _scale_bits(section: _Section) -> NDArray[np.uint16]:
    """Scales as the bits of binary16 numbers [rows, K / 64]."""
    tile_high, tile_low, half_high, half_low = section.scales
    panels = len(section.tiles)
    high = [tile_high.reshape(panels, -1, section.height)]  # panel, group, row
    low = [np.stack([tile_low & 15, tile_low >> 4], axis=2).reshape(high[0].shape)]
    if section.halves.size:
        nibbles = np.stack([half_low & 15, half_low >> 4], axis=2).reshape(panels, 1, -1)
        high.append(half_high[:, None])
        low.append(nibbles[..., : section.height])
    bits = np.concatenate(high, axis=1).astype(np.uint16) << 8 | np.concatenate(low, axis=1) << 4
    return bits.transpose(0, 2, 1).reshape(panels * section.height, -1).astype(np.uint16, copy=False)


def _codes(section: _Section) -> NDArray[np.uint8]:
    """Codes [rows, K]."""
    panels = len(section.tiles)
    of_tiles, of_halves = (part.reshape(panels, -1, section.height, 4) for part in section.codes)
    chunks = np.concatenate([of_tiles, of_halves], axis=1)  # panel, chunk, row, j
    pairs = np.stack([chunks & 15, chunks >> 4], axis=3)  # panel, chunk, row, nibble, j
    return pairs.transpose(0, 2, 1, 3, 4).reshape(panels * section.height, -1)


def channel_order(listed: Sequence[int] | NDArray[np.uint16], columns: int) -> NDArray[np.int64]:
    """`order[k]` is the input channel of stored column k: first the listed channels, then the others, ascending."""
    first = np.asarray(listed, np.int64)
    others = np.ones(columns, bool)
    others[first] = False
    return np.concatenate([first, np.flatnonzero(others)])
