from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from agq_gguf.errors import InputError
from agq_gguf.format import blocks, pruning_record
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize


def damaged(source: Path, target: Path, tensor: str, offset: int, value: int) -> Path:
    """A copy with one byte of a tensor's data changed."""
    with open_gguf(source) as reader:
        at = reader.tensors[tensor].offset + offset
    data = bytearray(source.read_bytes())
    assert data[at] != value
    data[at] = value
    target.write_bytes(data)
    return target


def test_a_stock_model(llama_f16: Path) -> None:
    info = inspect_file(llama_f16)
    assert (info.architecture, info.name) == ("llama", "tiny random llama")
    assert info.file_bytes == llama_f16.stat().st_size
    assert info.parameters == sum(t.elements for t in info.types.values())
    assert info.tensor_bytes == sum(t.bytes for t in info.tensors)
    assert list(info.types) == ["f16", "f32"]
    assert info.types["f16"].bits_per_weight == 16
    assert 16 < info.bits_per_weight < 16.1
    assert info.hyperparameters["block_count"] == 2
    assert (info.metadata, info.problems) == ({}, [])
    embedding = next(t for t in info.tensors if t.name == "token_embd.weight")
    assert (embedding.type, embedding.shape, embedding.bytes, embedding.agq) == ("f16", [512, 128], 131072, None)


def test_our_model(llama_agq: Path) -> None:
    info = inspect_file(llama_agq)
    assert info.types["agq4"].bits_per_weight == 4.25
    assert info.metadata["version"] == blocks.VERSION
    assert info.metadata["activation_bits"] == 8
    assert "words.txt" in info.metadata["calibration"]
    tensor = next(t for t in info.tensors if t.name == "blk.0.ffn_down.weight")
    assert tensor.agq is not None
    with open_gguf(llama_agq) as reader:
        raw = bytes(reader.raw(tensor.name))
    found = blocks.read_parameters(_rows(raw, 128))
    assert tensor.agq.codebook == [int(u) - 64 for u in found.codebook]
    assert tensor.agq.exponent_max == found.exponents.max()
    assert tensor.agq.exponents_nonzero == (found.exponents > 0).mean()
    assert tensor.agq.listed_channels == len(found.listed)
    assert (tensor.agq.matrices, tensor.agq.activation_bits, tensor.agq.activation_scale) == (1, 8, "rotated")


def test_pruning_record(llama_agq: Path, tmp_path: Path) -> None:
    name, record = "blk.0.attn_output.weight", pruning_record.Pruning("received", 0.25, keep=64)
    with open_gguf(llama_agq) as reader:
        data, at = _rows(bytes(reader.raw(name)), 128), reader.tensors[name].offset
    pruned = blocks.with_pruning(data, record).tobytes()
    raw = llama_agq.read_bytes()
    (tmp_path / "pruned.gguf").write_bytes(raw[:at] + pruned + raw[at + len(pruned) :])
    found = {t.name: t.agq for t in inspect_file(tmp_path / "pruned.gguf").tensors if t.agq}
    assert {n for n, agq in found.items() if agq.pruning} == {name}
    assert found[name].pruning == record


def _rows(raw: bytes, rows: int) -> np.ndarray:
    return np.frombuffer(raw, np.uint8).reshape(rows, -1)


def test_experts(tmp_path: Path) -> None:
    source = tiny_models.write_llama(tmp_path / "moe.gguf", n_layer=1, n_expert=3)
    options = QuantizeOptions(threads=1, matrix=MatrixOptions(activation_scale="group", learn_codebook=False))
    quantize(source, tmp_path / "out.gguf", options=options)
    tensor = next(t for t in inspect_file(tmp_path / "out.gguf").tensors if t.name == "blk.0.ffn_up_exps.weight")
    assert tensor.agq is not None
    assert (tensor.agq.matrices, tensor.agq.activation_scale, tensor.shape) == (3, "group", [3, 256, 128])


@pytest.mark.parametrize(("offset", "value"), [(48, 0xA5), (49, 2), (50, 0x33), (56, 0x00)])
def test_damaged_attributes(llama_agq: Path, tmp_path: Path, offset: int, value: int) -> None:
    path = damaged(llama_agq, tmp_path / "bad.gguf", "blk.1.ffn_up.weight", offset, value)
    info = inspect_file(path)
    assert len(info.problems) == 1
    assert info.problems[0].startswith("blk.1.ffn_up.weight: ")
    tensor = next(t for t in info.tensors if t.problem)
    assert tensor.agq is None


def test_result_is_json(llama_agq: Path, gpt2_f16: Path) -> None:
    for path in (llama_agq, gpt2_f16):
        json.dumps(dataclasses.asdict(inspect_file(path)), allow_nan=False)


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        inspect_file(tmp_path / "none.gguf")
