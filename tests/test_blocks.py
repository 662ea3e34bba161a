from __future__ import annotations

import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden import make_agq4
from hypothesis import given, settings
from hypothesis import strategies as st

from agq_gguf.errors import FormatError
from agq_gguf.format import blocks, pruning_record, reference
from agq_gguf.format.blocks import Matrix, Parameters
from agq_gguf.format.pruning_record import Pruning

GOLDEN = Path(__file__).parent / "golden"


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    shapes = st.tuples(st.integers(4, 70), st.integers(1, 9).map(lambda groups: 64 * groups))
    rows, columns = draw(shapes.filter(lambda shape: blocks.listable(*shape) > 0))  # smaller ones have no room
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_listed = draw(st.integers(0, min(blocks.listable(rows, columns), columns)))
    scales = rng.standard_normal((rows, columns // 64)) * 2.0 ** rng.integers(-22, 15, (rows, columns // 64))
    return Matrix(
        rng.integers(0, 16, (rows, columns), dtype=np.uint8),
        blocks.round_scale(scales.astype(np.float32)),
        Parameters(
            codebook=np.sort(rng.integers(0, 128, 16, dtype=np.uint8)),
            exponents=rng.integers(0, 16, columns // 64, dtype=np.uint8),
            listed=rng.permutation(columns)[:n_listed].astype(np.uint16),
            tensor_scale=float(np.float32(draw(st.floats(1e-20, 1e20)))),
            activation_bits=draw(st.sampled_from([4, 8])),
            activation_scale=draw(st.sampled_from(blocks.ACTIVATION_SCALES)),
            pruning=draw(st.none() | prunings(pruning_record.SCORES[:3])),
        ),
    )


@st.composite
def prunings(draw: st.DrawFn, scores: tuple[str, ...]) -> Pruning:
    score = draw(st.sampled_from(scores))
    numbers = draw(st.floats(0, 1e10, width=32)), draw(st.integers(0, 255)), draw(st.integers(0, 15))
    codes = st.lists(st.integers(-128, 127), min_size=1, max_size=200).map(tuple)
    directions = st.builds(pruning_record.Direction, st.floats(0, 1e5, width=32), codes)
    number = st.integers(0, 65535)
    heads = st.builds(
        pruning_record.Heads,
        st.lists(st.tuples(number, number), min_size=1, max_size=16).map(tuple),
        st.none() | st.integers(0, 63),
    )
    direction = draw(directions) if score == "learned" else None
    return Pruning(score, *numbers, draw(st.booleans()), direction, draw(heads) if score == "heads" else None)


def assert_equal(a: Matrix, b: Matrix) -> None:
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.scales, b.scales)
    for name in ("codebook", "exponents", "listed"):
        np.testing.assert_array_equal(getattr(a.parameters, name), getattr(b.parameters, name))
    plain = [replace(m.parameters, codebook=None, exponents=None, listed=None) for m in (a, b)]  # type: ignore[arg-type]
    assert plain[0] == plain[1]


@settings(max_examples=50, deadline=None)
@given(matrices())
def test_unpack_inverts_pack(matrix: Matrix) -> None:
    data = blocks.pack(matrix)
    assert data.shape == (matrix.codes.shape[0], matrix.codes.shape[1] // 64 * 34)
    assert_equal(blocks.unpack(data), matrix)
    parameters = blocks.read_parameters(data)
    np.testing.assert_array_equal(parameters.listed, matrix.parameters.listed)


@pytest.mark.parametrize("shape", make_agq4.SHAPES)
@pytest.mark.parametrize("kind", ["", "_rotated"])
def test_golden_bytes(shape: tuple[int, int], kind: str) -> None:
    rows, columns = shape
    matrix = make_agq4.rotated(*shape) if kind else make_agq4.matrix(*shape)
    name = f"agq4_{rows}x{columns}{kind}"
    stored = np.fromfile(GOLDEN / f"{name}.bin", np.uint8)
    np.testing.assert_array_equal(blocks.pack(matrix).ravel(), stored)
    assert_equal(blocks.unpack(stored.reshape(rows, -1)), matrix)
    weights = np.fromfile(GOLDEN / f"{name}_weights.f32", "<f4").reshape(4, columns)
    np.testing.assert_array_equal(reference.dequantize(matrix)[:4], weights)
    raw = (GOLDEN / f"{name}_xq.i8").read_bytes()
    xq, s = reference.quantize_activations(make_agq4.activations(columns), matrix.parameters)
    assert xq.tobytes() + s.tobytes() == raw


def test_every_byte_is_where_the_format_says() -> None:
    """Reads single values with the formulas of docs/format.md, none of the code under test."""
    matrix = make_agq4.matrix()
    raw = blocks.pack(matrix).tobytes()
    tiles = 2
    for row, column in [(0, 0), (5, 3), (5, 4), (15, 127), (16, 128), (31, 255), (20, 70), (9, 135)]:
        panel, r, g, k = row // 16, row % 16, column // 128, column % 128
        tile = (panel * tiles + g) * 1088
        byte = raw[tile + 64 + k // 8 * 64 + 4 * r + k % 4]
        assert (byte >> 4 if k % 8 >= 4 else byte & 15) == matrix.codes[row, column]
        half = k // 64
        low = raw[tile + 32 + r]
        bits = raw[tile + 16 * half + r] << 8 | (low >> 4 if half else low & 15) << 4
        assert struct.unpack("<e", struct.pack("<H", bits))[0] == matrix.scales[row, column // 64]
    stream = b"".join(raw[t * 1088 + 48 : t * 1088 + 64] for t in range(4))
    assert stream[:4] == bytes([0xA4, 1, 0x18, 1])
    assert struct.unpack_from("<f", stream, 4)[0] == np.float32(0.0123)
    crc, length = struct.unpack_from("<II", stream, 8)
    assert length == 16 + 4 + 2 + 2 * 3 and crc == zlib.crc32(stream[16 : 16 + length])
    assert stream[16:36] == matrix.parameters.codebook.tobytes() + matrix.parameters.exponents.tobytes()
    assert struct.unpack_from("<4H", stream, 36) == (3, 200, 3, 77)
    assert not any(stream[44:])


def attribute_places(rows: int, columns: int) -> list[int]:
    """Where the attribute stream is, byte by byte, by docs/format.md."""
    groups = columns // 64
    places: list[int] = []
    for first in range(0, rows, 16):
        panel, r = first * groups * 34, min(16, rows - first)
        for t in range(groups // 2):
            places += range(panel + 68 * r * t + 3 * r, panel + 68 * r * t + 4 * r)
        if groups % 2:
            half = panel + 68 * r * (groups // 2)
            places += range(half + r + (r + 1) // 2, half + 2 * r)
    return places


# All that is odd about these: half tiles only, last panels of every kind, one row in the last panel.
ODD_SHAPES = [(80, 64), (64, 192), (33, 192), (31, 576), (49, 960), (257, 128), (15, 2880), (7, 960), (97, 64)]


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_odd_shapes_are_stored_as_the_format_says(shape: tuple[int, int]) -> None:
    rows, columns = shape
    groups, rng = columns // 64, np.random.default_rng(rows)
    matrix = Matrix(
        rng.integers(0, 16, shape, dtype=np.uint8),
        blocks.round_scale(rng.standard_normal((rows, groups)).astype(np.float32)),
        Parameters(np.arange(8, 120, 7, dtype=np.uint8), rng.integers(0, 16, groups, dtype=np.uint8)),
    )
    data = blocks.pack(matrix)
    assert data.shape == (rows, groups * 34)
    assert_equal(blocks.unpack(data), matrix)
    raw = data.tobytes()
    for row, column in zip(rng.integers(0, rows, 300), rng.integers(0, columns, 300), strict=True):
        first, g = row // 16 * 16, column // 64
        r, i, k = min(16, rows - first), row - first, column % 64
        panel = first * groups * 34
        if g == groups - 1 and groups % 2:
            start = panel + 34 * r * (groups - 1)
            high, low, codes = start + i, raw[start + r + i // 2] >> 4 * (i % 2) & 15, start + 2 * r
        else:
            start, half = panel + 68 * r * (g // 2), g % 2
            high, low = start + half * r + i, raw[start + 2 * r + i] >> 4 * half & 15
            codes = start + (4 + 32 * half) * r
        assert struct.unpack("<e", struct.pack("<H", raw[high] << 8 | low << 4))[0] == matrix.scales[row, g]
        assert raw[codes + k // 8 * 4 * r + 4 * i + k % 4] >> 4 * (k % 8 // 4) & 15 == matrix.codes[row, column]
    places = attribute_places(rows, columns)
    assert len(places) == blocks.stream_bytes(rows, columns)
    stream = bytes(raw[place] for place in places)
    crc, length = struct.unpack_from("<II", stream, 8)
    assert stream[:2] == b"\xa4\1" and length == 16 + groups and crc == zlib.crc32(stream[16 : 16 + length])
    assert stream[16 : 16 + length] == matrix.parameters.codebook.tobytes() + matrix.parameters.exponents.tobytes()
    changed = blocks.with_pruning(data, None if len(places) < 40 + groups else make_agq4.PRUNING)
    outside = np.ones(data.size, bool)
    outside[places] = False
    np.testing.assert_array_equal(changed.ravel()[outside], data.ravel()[outside])


def test_rows_above_do_not_depend_on_the_last_panel() -> None:
    """A matrix of full panels with more rows behind them: the same bytes but for the attributes."""
    narrow = make_agq4.matrix(23, 320)
    wide = replace(narrow, codes=np.resize(narrow.codes, (32, 320)), scales=np.resize(narrow.scales, (32, 5)))
    outside = np.ones(16 * 170, bool)
    outside[attribute_places(16, 320)] = False
    found, wanted = (blocks.pack(m)[:16].ravel()[outside] for m in (narrow, wide))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((1, 576), "its attribute stream has 4 bytes, 41 are needed"),
        ((7, 576), "its attribute stream has 31 bytes, 41 are needed"),
        ((64, 64), "its attribute stream has 32 bytes, 33 are needed"),
        ((16, 320), None),
        ((16, 192), "its attribute stream has 24 bytes, 35 are needed"),
        ((17, 576), None),
        ((0, 576), "rows must be at least 1, got 0"),
        ((32, 96), "columns must be a multiple of 64, got 96"),
        ((32, 0), "columns must be a multiple of 64, got 0"),
    ],
)
def test_shapes_without_room(shape: tuple[int, int], problem: str | None) -> None:
    assert blocks.shape_problem(*shape) == problem


def attribute_stream(data: np.ndarray) -> bytes:
    return data.reshape(-1, 1088)[:, 48:64].tobytes()


def test_pruning_record_is_where_the_format_says() -> None:
    plain = blocks.pack(make_agq4.matrix())
    data = blocks.with_pruning(plain, make_agq4.PRUNING)
    np.testing.assert_array_equal(data.ravel(), np.fromfile(GOLDEN / "agq4_32x256_pruned.bin", np.uint8))
    stream, before = attribute_stream(data), attribute_stream(plain)
    assert stream[3] == 1 | 2 and struct.unpack_from("<I", stream, 12)[0] == 28 + 8
    assert stream[16:44] == before[16:44]
    assert stream[44:52] == bytes([2, 200, 3, 0]) + struct.pack("<f", 0.375)
    assert not any(stream[52:])
    assert blocks.unpack(data).parameters.pruning == make_agq4.PRUNING == blocks.read_parameters(data).pruning


@settings(max_examples=50, deadline=None)
@given(matrices(), st.none() | prunings(pruning_record.SCORES[:3]))
def test_setting_a_record_changes_nothing_else(matrix: Matrix, pruning: Pruning | None) -> None:
    data = blocks.pack(matrix)
    before = data.copy()
    changed = blocks.with_pruning(data, pruning)
    np.testing.assert_array_equal(data, before)
    assert_equal(blocks.unpack(changed), replace(matrix, parameters=replace(matrix.parameters, pruning=pruning)))
    outside = np.ones(data.size, bool)
    outside[attribute_places(*matrix.codes.shape)] = False
    np.testing.assert_array_equal(changed.ravel()[outside], data.ravel()[outside])
    np.testing.assert_array_equal(blocks.with_pruning(changed, matrix.parameters.pruning), data)


@settings(max_examples=50, deadline=None)
@given(prunings(pruning_record.SCORES))
def test_long_records(pruning: Pruning) -> None:
    """A matrix with a channel order and room for both."""
    rows = 320
    few = make_agq4.matrix()
    matrix = replace(few, codes=np.resize(few.codes, (rows, 256)), scales=np.resize(few.scales, (rows, 4)))
    packed = blocks.with_pruning(blocks.pack(matrix), pruning)
    assert blocks.unpack(packed).parameters.pruning == pruning
    stream = attribute_stream(packed)
    assert struct.unpack_from("<I", stream, 12)[0] == 28 + len(pruning.to_bytes())
    if pruning.direction:
        codes = np.array(pruning.direction.codes, np.int8)
        assert stream[52:60] == struct.pack("<fHH", pruning.direction.factor, len(codes), 0)
        assert stream[60 : 60 + len(codes)] == codes.tobytes() and not any(stream[60 + len(codes) :])
    if pruning.heads:
        n, tail = len(pruning.heads.heads), 255 if pruning.heads.tail is None else pruning.heads.tail
        assert stream[52:56] == bytes([n, tail, 0, 0])
        assert list(struct.iter_unpack("<HH", stream[56 : 56 + 4 * n])) == list(pruning.heads.heads)
        assert not any(stream[56 + 4 * n :])
    np.testing.assert_array_equal(blocks.with_pruning(packed, None), blocks.pack(matrix))


def test_nearest_direction() -> None:
    wanted = np.array([0.5, -1.27, 0.004, 0.0])
    direction = pruning_record.Direction.of(wanted)
    assert direction.codes == (50, -127, 0, 0)
    np.testing.assert_allclose(direction.values(), [0.5, -1.27, 0, 0], rtol=1e-6)
    assert pruning_record.Direction.of(np.zeros(3)).codes == (0, 0, 0)


@pytest.mark.parametrize(
    ("at", "byte", "message"),
    [
        (44, 2, "bytes for 256 columns"),
        (58, 1, "must have 3 channels and then zero, got 3 and 1"),
        (56, 4, "must have 4 channels and then zero, got 3 and 0"),
        (56, 2, "bytes for 256 columns"),
        (56, 0, "bytes for 256 columns"),
        (55, 0x7F, "factor of the pruning direction must be finite and >= 0, got inf"),
    ],
)
def test_damaged_directions_are_refused(at: int, byte: int, message: str) -> None:
    changes = {at: byte} | ({54: 0x80} if byte == 0x7F else {})
    refuse_changed(Pruning("learned", 0.5, direction=pruning_record.Direction(1.0, (1, -2, 3))), changes, message)


@pytest.mark.parametrize(
    ("at", "byte", "message"),
    [
        (44, 3, "pruning direction must have 0 channels and then zero, got 0 and 4"),
        (52, 0, "heads of the pruning record are not valid (0 heads, tail 5)"),
        (52, 1, "bytes for 256 columns"),
        (52, 3, "heads of the pruning record are not valid (3 heads, tail 5)"),
        (53, 64, "heads of the pruning record are not valid (2 heads, tail 64)"),
        (54, 1, "heads of the pruning record are not valid (2 heads, tail 5)"),
        (55, 1, "heads of the pruning record are not valid (2 heads, tail 5)"),
    ],
)
def test_damaged_heads_are_refused(at: int, byte: int, message: str) -> None:
    refuse_changed(Pruning("heads", 0.5, heads=pruning_record.Heads(((0, 4), (3, 1)), 5)), {at: byte}, message)


def refuse_changed(record: Pruning, changes: dict[int, int], message: str) -> None:
    """A record with other bytes and a checksum that is right."""
    matrix = make_agq4.matrix()
    wide = replace(matrix, codes=np.resize(matrix.codes, (64, 256)), scales=np.resize(matrix.scales, (64, 4)))
    tiles = blocks.with_pruning(blocks.pack(wide), record).reshape(-1, 1088)
    stream = bytearray(attribute_stream(tiles))
    for at, byte in changes.items():
        stream[at] = byte
    stream[8:12] = struct.pack("<I", zlib.crc32(stream[16 : 16 + struct.unpack_from("<I", stream, 12)[0]]))
    tiles[:, 48:64] = np.frombuffer(stream, np.uint8).reshape(-1, 16)
    with pytest.raises(FormatError, match=re.escape(message)):
        blocks.read_parameters(tiles.reshape(64, -1))


@pytest.mark.parametrize("reuse", [False, True])
def test_record_says_whether_states_are_used_again(reuse: bool) -> None:
    record = replace(make_agq4.PRUNING, reuse=reuse)
    packed = blocks.with_pruning(blocks.pack(make_agq4.matrix()), record)
    assert blocks.unpack(packed).parameters.pruning == record


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (Pruning("newest", 0.5), "pruning score is 'newest'"),
        (Pruning("first", -0.5), "pruning threshold must be finite and >= 0, got -0.5"),
        (Pruning("first", float("nan")), "pruning threshold must be finite and >= 0, got nan"),
        (Pruning("first", 1e39), "pruning threshold must be finite and >= 0, got inf"),
        (Pruning("first", 1, keep=256), "keep the last 0 to 255 tokens, got 256"),
        (Pruning("first", 1, reach=16), "pruning reach must be 0 to 15, got 16"),
        (Pruning("learned", 1), "'learned' needs a direction"),
        (Pruning("recent", 1, direction=pruning_record.Direction(1, (1,))), "'recent' has no direction"),
        (
            Pruning("learned", 1, direction=pruning_record.Direction(-1, (1,))),
            "factor of the pruning direction must be finite and >= 0, got -1",
        ),
        (Pruning("learned", 1, direction=pruning_record.Direction(1, ())), "must have 1 to 65535 channels, got 0"),
        (Pruning("learned", 1, direction=pruning_record.Direction(1, (128,))), "must be -128 to 127"),
        (Pruning("heads", 1), "'heads' needs heads"),
        (Pruning("recent", 1, heads=pruning_record.Heads(((1, 2),))), "'recent' has no heads"),
        (Pruning("heads", 1, heads=pruning_record.Heads(())), "look at 1 to 16 heads, got 0"),
        (Pruning("heads", 1, heads=pruning_record.Heads(((0, 1),) * 17)), "look at 1 to 16 heads, got 17"),
        (Pruning("heads", 1, heads=pruning_record.Heads(((0, 65536),))), "must be 0 to 65535, got 0.65536"),
        (Pruning("heads", 1, heads=pruning_record.Heads(((0, 1),), 64)), "must be 0 to 63 tokens, got 64"),
    ],
)
def test_bad_records_are_not_written(pruning: Pruning, message: str) -> None:
    matrix = make_agq4.matrix()
    data = blocks.pack(matrix)
    with pytest.raises(FormatError, match=message):
        blocks.with_pruning(data, pruning)
    with pytest.raises(FormatError, match=message):
        blocks.pack(replace(matrix, parameters=replace(matrix.parameters, pruning=pruning)))


def test_no_room_for_a_record_and_damaged_matrices() -> None:
    matrix = make_agq4.matrix()
    full = replace(matrix.parameters, listed=np.arange(blocks.listable(32, 256) + 1, dtype=np.uint16))
    with pytest.raises(FormatError, match="room for 64 bytes of parameters, but they need 66"):
        blocks.with_pruning(blocks.pack(replace(matrix, parameters=full)), make_agq4.PRUNING)
    with pytest.raises(FormatError, match="checksum"):
        blocks.with_pruning(corrupt({20: b"\x25"}, seal=False), make_agq4.PRUNING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({44: b"\x03"}, "ends before its direction"),
        ({44: b"\x04"}, "ends before its heads"),
        ({44: b"\x05"}, "unknown pruning record (score 5"),
        ({46: b"\x10"}, "pruning reach must be 0 to 15, got 16"),
        ({47: b"\x02"}, "flags 2"),
        ({48: struct.pack("<f", -1.0)}, "threshold must be finite and >= 0, got -1"),
        ({48: struct.pack("<f", float("nan"))}, "threshold must be finite and >= 0, got nan"),
        ({48: struct.pack("<f", float("inf"))}, "threshold must be finite and >= 0, got inf"),
        ({3: b"\x01"}, "flags 0x01, got 36"),
        ({3: b"\x02"}, "pruning direction"),
        ({12: struct.pack("<I", 28)}, "pruning record needs 8 bytes, got 0"),
        ({12: struct.pack("<I", 20), 3: b"\x02"}, "pruning record needs 8 bytes, got 0"),
        ({52: b"\x01"}, "after the parameters must be zero"),
    ],
)
def test_bad_records_are_refused(change: dict[int, bytes], message: str) -> None:
    pruned = blocks.with_pruning(blocks.pack(make_agq4.matrix()), make_agq4.PRUNING)
    blocks.unpack(corrupt({}, data=pruned))
    for read in (blocks.unpack, blocks.read_parameters):
        with pytest.raises(FormatError, match=re.escape(message)):
            read(corrupt(change, data=pruned))


def corrupt(change: dict[int, bytes], seal: bool = True, data: np.ndarray | None = None) -> np.ndarray:
    """The golden matrix with bytes of its attribute stream replaced and, with `seal`, a checksum that fits them."""
    data = (blocks.pack(make_agq4.matrix()) if data is None else data).reshape(4, 1088).copy()
    stream = bytearray(data[:, 48:64].tobytes())
    for at, new in change.items():
        stream[at : at + len(new)] = new
    if seal:
        length = min(struct.unpack_from("<I", stream, 12)[0], len(stream) - 16)
        stream[8:12] = struct.pack("<I", zlib.crc32(bytes(stream[16 : 16 + length])))
    data[:, 48:64] = np.frombuffer(bytes(stream), np.uint8).reshape(4, 16)
    return data.reshape(32, -1)


@pytest.mark.parametrize(
    ("change", "seal", "message"),
    [
        ({0: b"\xa5"}, True, "must begin with 0xA4, got 0xA5"),
        ({1: b"\x02"}, True, "version must be 1, got 2"),
        ({2: b"\x15"}, True, "activation bits must be 4 or 8, got 5"),
        ({2: b"\x38"}, True, "unknown attributes"),
        ({3: b"\x05"}, True, "unknown attributes"),
        ({3: b"\x00"}, True, "flags 0x00"),
        ({4: struct.pack("<f", 0.0)}, True, "tensor scale must be finite and > 0, got 0"),
        ({4: struct.pack("<f", -1.0)}, True, "tensor scale must be finite and > 0, got -1"),
        ({4: struct.pack("<f", float("nan"))}, True, "tensor scale must be finite and > 0, got nan"),
        ({4: struct.pack("<f", float("inf"))}, True, "tensor scale must be finite and > 0, got inf"),
        ({8: b"\0\0\0\0"}, False, "checksum"),
        ({20: b"\x25"}, False, "checksum"),
        ({12: struct.pack("<I", 27)}, True, "channel order must list 3 channels, got 2"),
        ({12: struct.pack("<I", 20)}, True, "flags 0x01, got 20"),
        ({12: struct.pack("<I", 0)}, True, "flags 0x01, got 0"),
        ({12: struct.pack("<I", 2**32 - 1)}, True, "at most 48 bytes in this matrix, got 4294967295"),
        ({16: b"\xff"}, True, "codebook"),
        ({31: b"\x80"}, True, "codebook"),
        ({17: b"\x7f"}, True, "codebook"),
        ({33: b"\x10"}, True, "exponent must be 0 to 15, got 16"),
        ({36: struct.pack("<H", 0)}, True, "at least 1 channel, got 0"),
        ({36: struct.pack("<H", 4)}, True, "must list 4 channels, got 3"),
        ({38: struct.pack("<H", 256)}, True, "beyond the 256 columns"),
        ({38: struct.pack("<H", 3)}, True, "twice"),
        ({63: b"\x01"}, True, "after the parameters must be zero"),
    ],
)  # fmt: skip
def test_each_clause_is_refused(change: dict[int, bytes], seal: bool, message: str) -> None:
    blocks.unpack(corrupt({}))  # the untouched matrix is fine
    data = corrupt(change, seal)
    for read in (blocks.unpack, blocks.read_parameters):
        with pytest.raises(FormatError, match=re.escape(message)):
            read(data)


def test_infinite_scale_is_refused() -> None:
    data = blocks.pack(make_agq4.matrix()).copy()
    data[0, 0] = 0x7C
    with pytest.raises(FormatError, match="a scale is infinite"):
        blocks.unpack(data)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4 * 1088 - 1), st.integers(0, 255)), max_size=4))
def test_damage_is_an_error_of_ours_or_harmless(changes: list[tuple[int, int]]) -> None:
    data = blocks.pack(make_agq4.matrix()).reshape(-1).copy()
    for at, value in changes:
        data[at] = value
    try:
        matrix = blocks.unpack(data.reshape(32, -1))
    except FormatError:
        return
    assert not np.isnan(reference.dequantize(matrix)).any()
    np.testing.assert_array_equal(blocks.pack(matrix).reshape(-1), data)


def test_packer_refuses_what_the_reader_would() -> None:
    good = make_agq4.matrix()
    parameters = good.parameters
    small = Matrix(good.codes[:16, :128], good.scales[:16, :2], replace(parameters, exponents=np.zeros(2, np.uint8)))
    for bad in (
        replace(good, codes=good.codes + np.uint8(1)),
        replace(good, scales=good.scales + np.float32(1e-3)),
        replace(good, scales=np.full_like(good.scales, np.inf)),
        replace(good, codes=good.codes[:8], scales=good.scales[:8]),
        replace(good, parameters=replace(parameters, tensor_scale=1e-60)),
        replace(good, parameters=replace(parameters, tensor_scale=1e60)),
        replace(good, parameters=replace(parameters, exponents=np.zeros(3, np.uint8))),
        replace(good, parameters=replace(parameters, listed=np.arange(14, dtype=np.uint16))),
        small,
    ):
        with pytest.raises(FormatError), np.errstate(invalid="ignore"):
            blocks.pack(bad)


@given(st.floats(-70000, 70000, width=32))
def test_round_scale_is_the_nearest_storable(value: float) -> None:
    bits = np.arange(0x000, 0x7C0, dtype=np.uint16) << 4
    storable = bits.view(np.float16).astype(np.float64)
    found = float(blocks.round_scale(np.array([value], np.float32))[0])
    assert abs(found) in storable
    assert abs(abs(value) - abs(found)) == np.abs(storable - abs(value)).min()


def rotated_by_definition(x: np.ndarray) -> np.ndarray:
    """One group [64] of binary32 numbers, by halves: those of both, then their sums and differences."""
    if len(x) == 1:
        return x * np.float32(0.125)
    first, second = (rotated_by_definition(half) for half in np.split(x, 2))
    return np.concatenate([first + second, first - second])


def test_rotation_is_the_hadamard_matrix() -> None:
    x = np.random.default_rng(1).standard_normal((3, 5, 128)).astype(np.float32)
    found = reference.rotate(x)
    assert found.dtype == np.float32
    for group in np.ndindex(3, 5, 2):
        here = (*group[:2], slice(64 * group[2], 64 * group[2] + 64))
        np.testing.assert_array_equal(found[here], rotated_by_definition(x[here]))
    hadamard = np.ones((1, 1))
    for _ in range(6):
        hadamard = np.kron(np.array([[1, 1], [1, -1]]), hadamard)
    np.testing.assert_allclose(found[2, 1, 64:], hadamard @ x[2, 1, 64:] / 8, atol=1e-5)
    np.testing.assert_allclose(reference.rotate(found), x, atol=1e-5)


def test_rotated_weights() -> None:
    plain, matrix = make_agq4.matrix(), make_agq4.rotated()
    one = [replace(m, parameters=replace(m.parameters, tensor_scale=1.0)) for m in (plain, matrix)]
    order = blocks.channel_order(plain.parameters.listed, 256)
    stored, found = (reference.dequantize(m)[:, order] for m in one)
    for row, group in ((0, 0), (17, 3), (31, 2)):
        here = slice(64 * group, 64 * group + 64)
        np.testing.assert_array_equal(found[row, here], rotated_by_definition(stored[row, here]))
    scaled = reference.dequantize(matrix)[:, order]
    np.testing.assert_array_equal(scaled, found * np.float32(matrix.parameters.tensor_scale))


def test_dequantize_follows_the_formula() -> None:
    matrix = make_agq4.matrix()
    p = matrix.parameters
    order = [200, 3, 77] + [k for k in range(256) if k not in (200, 3, 77)]
    weights = reference.dequantize(matrix)
    for m, k in [(0, 0), (3, 2), (17, 130), (31, 255)]:
        value = float(matrix.scales[m, k // 64]) * 2.0 ** -int(p.exponents[k // 64])
        value *= int(p.codebook[matrix.codes[m, k]]) - 64
        assert weights[m, order[k]] == np.float32(value * float(np.float32(p.tensor_scale)))


@settings(max_examples=30, deadline=None)
@given(matrices(), st.integers(0, 2**32 - 1))
def test_activations_and_product_follow_the_formulas(matrix: Matrix, seed: int) -> None:
    """Element by element in binary32, as docs/format.md has it."""
    p = matrix.parameters
    columns = matrix.codes.shape[1]
    x = np.random.default_rng(seed).standard_normal((2, columns)).astype(np.float32)
    x[0, 0] *= 1000
    xq, s = reference.quantize_activations(x, p)
    order = blocks.channel_order(p.listed, columns)
    b = np.float32(127 if p.activation_bits == 8 else 7)
    refined = x[:, order] * np.exp2(-p.exponents.astype(np.float32)).repeat(64)
    if p.rotated:
        refined = np.stack(
            [np.concatenate([rotated_by_definition(g) for g in np.split(row, columns // 64)]) for row in refined]
        )
    for t in range(2):
        for g in range(columns // 64):
            here = slice(64 * g, 64 * g + 64)
            amax = np.abs(refined[t, here] if p.per_group else refined[t]).max()
            assert s[t, g if p.per_group else 0] == amax / b
            expected = np.clip(np.rint(refined[t, here] * (b / amax)), -b, b)
            np.testing.assert_array_equal(xq[t, here], expected.astype(np.int8))
    y = reference.matmul_reference(x, matrix)
    restored = np.empty_like(x)
    growth = np.exp2(p.exponents.astype(np.float32)).repeat(64)
    restored[:, order] = xq * np.repeat(s, columns // s.shape[1], axis=1) * growth
    # Rotated or not, a product is that of what is stored.
    stored = reference.dequantize(replace(matrix, parameters=replace(p, activation_scale="token")))
    exact = restored.astype(np.float64) @ stored.astype(np.float64).T
    scale = np.abs(restored.astype(np.float64)) @ np.abs(stored).astype(np.float64).T
    assert (np.abs(y - exact) <= 1e-5 * scale + 1e-37).all()


def test_a_huge_tensor_scale_overflows_quietly() -> None:
    huge = replace(make_agq4.matrix(), parameters=replace(make_agq4.matrix().parameters, tensor_scale=3e38))
    assert np.isinf(reference.dequantize(huge)).any()
    assert np.isinf(reference.matmul_reference(make_agq4.activations(), huge)).any()


def test_rotation_that_overflows_is_not_a_number() -> None:
    x = np.full((2, 256), 3e38, np.float32)
    x[1] = 1
    xq, s = reference.quantize_activations(x, make_agq4.rotated().parameters)
    assert np.isnan(s[0]).all() and not xq[0].any() and np.isfinite(s[1]).all()


def test_bad_and_tiny_activations() -> None:
    p = replace(make_agq4.matrix().parameters, activation_scale="token")
    x = np.ones((4, 256), np.float32)
    x[0, 7], x[1, 9], x[2] = np.nan, np.inf, 2.0**-101
    xq, s = reference.quantize_activations(x, p)
    assert np.isnan(s[:2]).all() and not xq[:3].any() and s[2] == 0 and s[3] > 0
    y = reference.matmul_reference(x, replace(make_agq4.matrix(), parameters=p))
    assert np.isnan(y[:2]).all() and not y[2].any() and np.isfinite(y[3]).all()
