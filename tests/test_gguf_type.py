from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from golden import make_agq4

from agq_gguf.errors import FormatError, HostError
from agq_gguf.format import blocks, reference
from agq_gguf.integrations import gguf_package


def test_extends_once_and_again() -> None:
    assert gguf_package.extend() and gguf_package.extend()
    kind = gguf.GGMLQuantizationType(38)
    assert kind is gguf.GGMLQuantizationType.AGQ4 is gguf.GGMLQuantizationType["AGQ4"]  # type: ignore[attr-defined]
    assert kind == 38 and kind.name == "AGQ4" and repr(kind) == "<GGMLQuantizationType.AGQ4: 38>"
    assert [t for t in gguf.GGMLQuantizationType if t.name == "AGQ4"] == [kind]
    assert gguf.GGML_QUANT_SIZES[kind] == (64, 34)
    assert gguf.quants.quant_shape_to_byte_shape((16, 256), kind) == (16, 136)
    assert gguf.quants.quant_shape_from_byte_shape((16, 136), kind) == (16, 256)
    assert gguf.quants.quant_shape_to_byte_shape((7, 576), kind) == (7, 306)


def test_reads_through_gguf(tmp_path: Path) -> None:
    gguf_package.extend()
    kind = gguf.GGMLQuantizationType(38)
    matrix = make_agq4.matrix()
    data = blocks.pack(matrix)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.add_tensor("experts", np.stack([data, data]), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one, many = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert one.tensor_type.name == "AGQ4" and list(one.shape) == [256, 32]
    expected = reference.dequantize(matrix)
    np.testing.assert_array_equal(gguf.quants.dequantize(one.data, one.tensor_type), expected)
    np.testing.assert_array_equal(gguf.quants.dequantize(many.data, many.tensor_type), np.stack([expected, expected]))
    with pytest.raises(FormatError, match="whole matrix"):
        gguf.quants.dequantize(one.data[0], one.tensor_type)


def test_quantizes_through_gguf() -> None:
    gguf_package.extend()
    kind = gguf.GGMLQuantizationType(38)
    weights = np.random.default_rng(0).standard_normal((2, 48, 128)).astype(np.float32)
    data = gguf.quants.quantize(weights, kind)
    assert data.shape == (2, 48, 68)
    error = gguf.quants.dequantize(data, kind) - weights
    assert 0.001 < (error**2).mean() < 0.008
    with pytest.raises(FormatError, match="AGQ4 does not support a tensor of shape"):
        gguf.quants.quantize(weights[..., :100], kind)


def test_refuses_a_taken_number(monkeypatch: pytest.MonkeyPatch) -> None:
    types = gguf.GGMLQuantizationType
    monkeypatch.setitem(types._value2member_map_, 38, types.Q8_0)
    with pytest.raises(HostError, match="38, which is AGQ4's, for Q8_0"):
        gguf_package.extend()
