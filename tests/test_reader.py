from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import TYPES, Reader, check_source, open_gguf

Change = Callable[[bytearray], bytes | bytearray | None]  # what to do with a file's bytes
Rewritten = Callable[[Change], Reader]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("reader") / "llama.gguf", n_layer=1)


@pytest.fixture
def rewritten(model: Path, tmp_path: Path) -> Rewritten:
    """Opens the model's bytes after a change."""

    def open_changed(change: Change) -> Reader:
        data = bytearray(model.read_bytes())
        changed = change(data)
        path = tmp_path / "changed.gguf"
        path.write_bytes(data if changed is None else changed)
        return open_gguf(path)

    return open_changed


@pytest.mark.parametrize("dtype", ["f16", "f32", "bf16"])
def test_agrees_with_gguf(tmp_path: Path, dtype: str) -> None:
    path = tiny_models.write_llama(tmp_path / "m.gguf", dtype=dtype, n_layer=1)
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        check_source(ours)
        assert ours.architecture == "llama"
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for tensor in theirs.tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(ours.tensors[tensor.name].shape)
            np.testing.assert_array_equal(ours.read(tensor.name), expected)
            assert ours.tensors[tensor.name].offset == tensor.data_offset
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                np.testing.assert_array_equal(ours.get(key), field.contents())


def test_one_expert_at_a_time(tmp_path: Path) -> None:
    path = tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1, n_expert=3)
    with open_gguf(path) as reader:
        whole = reader.read("blk.0.ffn_up_exps.weight")
        assert whole.shape == (3, 256, 128)
        for i in range(3):
            np.testing.assert_array_equal(
                reader.read("blk.0.ffn_up_exps.weight", range(256 * i, 256 * i + 256)), whole[i]
            )


def test_type_table_agrees_with_gguf() -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind == gguf.GGMLQuantizationType.Q8_1:  # 36 bytes in ggml; no file holds it
            continue
        assert TYPES[int(kind)] == (TYPES[int(kind)][0], block, size), kind
        assert TYPES[int(kind)][0].lower() == kind.name.lower()


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.gguf: cannot be opened"):
        open_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(InputError, match="is a folder; give the name of a GGUF file"):
        open_gguf(tmp_path)
    for content, message in [(b"", "too short"), (b"PK" + bytes(100), "not a GGUF file")]:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(InputError, match=message):
            open_gguf(tmp_path / "x")


def first(n: int) -> Change:
    return lambda data: data[:n]


def test_truncated_anywhere(model: Path, rewritten: Rewritten) -> None:
    size = model.stat().st_size
    with open_gguf(model) as reader:
        header = min(t.offset for t in reader.tensors.values())
    for length in [*range(0, 400), *range(400, header, 997), header - 1, header, header + 5, size // 2, size - 1]:
        with pytest.raises(InputError, match=r"truncated|too short"):
            rewritten(first(length))


def test_damaged_header_fields(rewritten: Rewritten) -> None:
    def put(at: int, form: str, value: int) -> Change:
        return lambda data: struct.pack_into(form, data, at, value)

    def put_behind(text: bytes, skip: int, form: str, value: int) -> Change:
        """`skip` counts from the end of a name: in metadata 0 is its type, in the list of tensors its dimensions."""
        return lambda data: struct.pack_into(form, data, data.index(text) + len(text) + skip, value)

    embedding = b"token_embd.weight"
    for change, message in [
        (put(4, "<I", 1), "GGUF version must be 2 or 3, got 1"),
        (put(4, "<I", 0x03000000), "big-endian"),
        (put(8, "<Q", 2**63), "list of tensors"),
        (put(8, "<Q", 10**6), "list of tensors"),
        (put(16, "<Q", 2**64 - 1), "metadata"),
        (put(24, "<Q", 2**62), "metadata"),
        (put_behind(b"general.architecture", 0, "<I", 77), "unknown type 77"),
        (put_behind(b"tokenizer.ggml.tokens", 8, "<Q", 2**61), "tokenizer.ggml.tokens"),
        (put_behind(b"tokenizer.ggml.scores", 8, "<Q", 2**61), "tokenizer.ggml.scores"),
        (put_behind(b"tokenizer.ggml.scores", 4, "<I", 9), "tokenizer.ggml.scores"),
        (put_behind(embedding, 0, "<I", 0), "1 to 4 dimensions, got 0"),
        (put_behind(embedding, 0, "<I", 9), "1 to 4 dimensions, got 9"),
        (put_behind(embedding, 4, "<Q", 0), "cannot have the shape"),
        (put_behind(embedding, 4, "<Q", 2**62), "token_embd.weight needs"),
        (put_behind(embedding, 20, "<I", 999), "unknown type 999"),
        (put_behind(embedding, 24, "<Q", 2**62), "token_embd.weight needs"),
        (put_behind(embedding, 24, "<Q", 7), "must begin at a multiple of"),
    ]:
        with pytest.raises(InputError, match=message):
            rewritten(change)


def test_duplicates(rewritten: Rewritten) -> None:
    with pytest.raises(InputError, match="occurs twice"):
        rewritten(lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))
    with pytest.raises(InputError, match="occurs twice"):
        rewritten(lambda data: data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=6))
def test_random_damage_never_crashes(model: Path, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(model.read_bytes()[:30000])
    for at, value in changes:
        data[at] = value
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError):
        check_source(open_gguf(path))


def write_small(path: Path, arch: str = "llama", **fields: int) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        writer.add_uint16(key.replace("_", "."), value)
    data = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unsuitable_sources(tmp_path: Path) -> None:
    with (
        open_gguf(write_small(tmp_path / "q")) as reader,
        pytest.raises(InputError, match=r"already quantized \(q4_0\)"),
    ):
        check_source(reader)
    with (
        open_gguf(write_small(tmp_path / "s", split_count=2)) as reader,
        pytest.raises(InputError, match="split model"),
    ):
        check_source(reader)
    adapter = gguf.GGUFWriter(tmp_path / "l", "llama")
    adapter.add_type("adapter")
    adapter.write_header_to_file()
    adapter.write_kv_data_to_file()
    adapter.close()
    with open_gguf(tmp_path / "l") as reader, pytest.raises(InputError, match="a LoRA adapter is not quantized"):
        check_source(reader)
    with open_gguf(write_small(tmp_path / "a", arch="")) as reader, pytest.raises(InputError, match="no general"):
        check_source(reader)
