"""What people bring along: models in several files, odd metadata, LoRA adapters, vision files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from llama_runs import TEXT, all_logits, relative
from reference_model import Array, ReferenceModel

import agq_gguf
from agq_gguf.errors import InputError, OutputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.shards import open_model, part_path
from agq_gguf.inspection import inspect
from agq_gguf.inspection.verify import verify
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.quantization.report import Report
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.model_file import check_model_file

OPTIONS = QuantizeOptions(threads=1, calibration_tokens=256, matrix=MatrixOptions(learn_codebook=False))


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    agq_gguf.register()
    with quiet_log():
        yield


def split_with_gguf(source: Path, target: Path, parts: int) -> Path:
    """Cuts a model as convert_hf_to_gguf.py does, with gguf's own writer; returns the first part."""
    with open_gguf(source) as reader:
        per_part = -(-len(reader.tensors) // parts)
        writer = gguf.GGUFWriter(target, reader.architecture, split_max_tensors=per_part)
        theirs = gguf.GGUFReader(source)
        for field in theirs.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub)
        for tensor in theirs.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return part_path(target, 0, parts)


# models in several files


@pytest.fixture(scope="module")
def whole(models: Path) -> Path:
    return tiny_models.write_llama(models / "whole-f32.gguf", dtype="f32", n_ff=384)


@pytest.fixture(scope="module")
def cut(whole: Path) -> Path:
    return split_with_gguf(whole, whole.with_name("cut.gguf"), 3)


@pytest.fixture(scope="module")
def from_whole(whole: Path, words_file: Path) -> Path:
    quantize(whole, whole.with_name("from-whole.gguf"), calibration=words_file, options=OPTIONS)
    return whole.with_name("from-whole.gguf")


@pytest.mark.parametrize("named", [0, 2])
def test_parts_give_the_same_model(named: int, cut: Path, from_whole: Path, words_file: Path, tmp_path: Path) -> None:
    """Whichever part is named; calibrated, so llama.cpp reads the parts too."""
    source = part_path(cut.with_name("cut.gguf"), named, 3)
    quantize(source, tmp_path / "out.gguf", calibration=words_file, options=OPTIONS)
    with open_gguf(tmp_path / "out.gguf") as found, open_gguf(from_whole) as wanted:
        assert list(found.tensors) == list(wanted.tensors)
        for name in wanted.tensors:
            assert found.raw(name) == wanted.raw(name), name
        assert not any(key.startswith("split.") for key in found.metadata)
        same = {key: field.raw for key, field in wanted.metadata.items() if not key.startswith("agq.hash.")}
        assert same.items() <= {key: field.raw for key, field in found.metadata.items()}.items()


def split_output(whole: Path, target: Path, size: int = 100_000) -> Report:
    options = QuantizeOptions(threads=1, split_size=size, matrix=MatrixOptions(learn_codebook=False))
    return quantize(whole, target, options=options)


def test_output_in_several_files_runs(whole: Path, tmp_path: Path) -> None:
    report = split_output(whole, tmp_path / "out.gguf")
    one = split_output(whole, tmp_path / "one.gguf", 1 << 30)
    count = len(report.paths)
    assert count > 3 and one.paths == [tmp_path / "one.gguf"]
    assert report.paths == [part_path(tmp_path / "out.gguf", i, count) for i in range(count)]
    assert sorted(tmp_path.iterdir()) == sorted([*report.paths, *one.paths])
    before = 100_000
    for path in report.paths:
        with open_gguf(path) as part:
            tensors = list(part.tensors.values())
            assert path.stat().st_size <= 100_000 or len(tensors) == 1
            assert before + tensors[0].n_bytes > 99_500  # it would not have fitted into the file before
            assert all(tensor.offset % 64 == 0 for tensor in tensors)
            before = path.stat().st_size
    _, parts = all_logits(report.paths[0])
    _, together = all_logits(one.paths[0])
    np.testing.assert_array_equal(parts, together)
    assert verify(report.paths[1]).problems == verify(one.paths[0]).problems == []
    info, wanted = inspect.inspect_file(report.paths[0]), inspect.inspect_file(one.paths[0])
    assert (info.parameters, info.tensor_bytes) == (wanted.parameters, wanted.tensor_bytes)
    assert info.file_bytes == sum(path.stat().st_size for path in report.paths) == report.n_bytes
    assert check_model_file(report.paths[0]).agq_tensors == check_model_file(one.paths[0]).agq_tensors


def test_parts_are_joined_by_gguf_tools(whole: Path, tmp_path: Path) -> None:
    """Every part stands for itself to gguf's reader, which is what tools are made of."""
    report = split_output(whole, tmp_path / "out.gguf")
    tensors = [t for path in report.paths for t in gguf.GGUFReader(path).tensors]
    assert [t.name for t in tensors] == [t.name for t in report.tensors]
    first = gguf.GGUFReader(report.paths[0])
    for key, kind, value in (("no", "UINT16", 0), ("count", "UINT16", len(report.paths)),
                             ("tensors.count", "INT32", len(tensors))):  # fmt: skip
        field = first.get_field(f"split.{key}")
        assert field is not None and field.types[0].name == kind and field.contents() == value


def test_damaged_sets_are_refused(cut: Path, whole: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(3):
            shutil.copy(part_path(cut.with_name("cut.gguf"), i, 3), folder)
        return folder

    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_model(path)

    folder = copy("missing")
    (folder / "cut-00002-of-00003.gguf").unlink()
    refused(folder / "cut-00001-of-00003.gguf", "part 2 of 3.*No such file")
    folder = copy("renamed")
    (folder / "cut-00001-of-00003.gguf").rename(folder / "first.gguf")
    refused(folder / "first.gguf", "must be called NAME-00001-of-00003.gguf")
    folder = copy("swapped")
    (folder / "cut-00003-of-00003.gguf").replace(folder / "cut-00002-of-00003.gguf")
    shutil.copy(cut, folder / "cut-00003-of-00003.gguf")
    refused(folder / "cut-00001-of-00003.gguf", r"must be part 1 of 3 \(counted from 0\), but says it is part 2 of 3")
    folder = copy("truncated")
    with (folder / "cut-00003-of-00003.gguf").open("r+b") as file:
        file.truncate(5000)
    refused(folder / "cut-00001-of-00003.gguf", "truncated")
    folder = copy("twice")
    with open_gguf(cut) as one, open_gguf(folder / "cut-00002-of-00003.gguf") as two:
        mine, other = next((a, b) for a in one.tensors for b in two.tensors if len(a) == len(b))
    data = (folder / "cut-00002-of-00003.gguf").read_bytes().replace(other.encode(), mine.encode(), 1)
    (folder / "cut-00002-of-00003.gguf").write_bytes(data)
    refused(folder / "cut-00001-of-00003.gguf", "is in cut-00001-of-00003.gguf too")


def test_names_in_a_file_cannot_lead_elsewhere(tmp_path: Path) -> None:
    """The number of parts is the only thing a file says; a name of its own is never used."""
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 2)
    writer.add_string("split.names", "/etc/passwd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf: cannot be opened"):
        open_model(tmp_path / "m-00001-of-00002.gguf")
    assert part_path(Path("/models/a.gguf"), 0, 2).parent == Path("/models")


def test_old_parts_never_stand_beside_new_ones(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = split_output(whole, tmp_path / "out.gguf")
    rename = Path.replace
    seen = []

    def stop(self: Path, target: Path) -> Path:
        seen.append(report.paths[0].exists())
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(OutputError, match="No space"):
        split_output(whole, tmp_path / "out.gguf")
    assert seen == [False] * 3 and not report.paths[0].exists()


# metadata


def test_foreign_metadata_survives_byte_for_byte(packaged_model: Path, tmp_path: Path) -> None:
    theirs = gguf.GGUFReader(packaged_model)
    source = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    for field in theirs.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            source.add_key_value(field.name, field.contents(), kind, sub)
    source.add_chat_template("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\u2028</s>{% endfor %}\n")
    source.add_key_value("general.tags", ["a", "", "ü\n"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    source.add_float64("someone.else.value", 0.1)
    source.add_int8("someone.else.small", -3)
    source.add_array("someone.else.flags", [True, False])
    for tensor in theirs.tensors:
        source.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    source.write_header_to_file()
    source.write_kv_data_to_file()
    source.write_tensors_to_file()
    source.close()
    quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", options=OPTIONS)
    ours = {"general.file_type", "general.quantization_version", "general.alignment"}
    with open_gguf(tmp_path / "in.gguf") as before, open_gguf(tmp_path / "out.gguf") as after:
        kept = {key: field.raw for key, field in before.metadata.items() if key not in ours}
        assert len(kept) > 20 and {"tokenizer.chat_template", "tokenizer.ggml.tokens"} <= set(kept)
        found = {key: field.raw for key, field in after.metadata.items()}
        assert {key: found.get(key) for key in kept} == kept
        assert {key for key in found if key not in kept and not key.startswith("agq.")} <= ours


# adapters and vision


def write_lora(path: Path, names: dict[str, tuple[int, int]], rank: int = 4, alpha: float = 8.0) -> dict[str, Array]:
    """A LoRA adapter for weights of shape (M, K); returns what it adds to each, at scale 1."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    added = {}
    for name, (rows, columns) in names.items():
        a = (rng.standard_normal((rank, columns)) / np.sqrt(columns)).astype(np.float32)
        b = (rng.standard_normal((rows, rank)) / 4).astype(np.float32)
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
        added[name] = (alpha / rank) * b.astype(np.float64) @ a
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return added


class AdaptedModel(ReferenceModel):
    """The reference with what an adapter adds to some weights, in full precision."""

    added: dict[str, Array]

    def linear(self, x: Array, name: str, expert: int | None = None) -> Array:
        return super().linear(x, name, expert) + (x @ self.added[name].T if name in self.added else 0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lora_on_top_of_agq4(whole: Path, tmp_path: Path, scale: float) -> None:
    path = tmp_path / "agq4.gguf"
    quantize(whole, path, options=QuantizeOptions(threads=1, output_type="agq4", matrix=OPTIONS.matrix))
    with open_gguf(path) as reader:
        names = [
            "blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.attn_output.weight", "blk.1.ffn_gate.weight",
            "blk.1.ffn_down.weight", "output.weight",
        ]  # fmt: skip
        assert all(reader.tensors[name].type_name == "agq4" for name in names)
        shapes = {name: reader.tensors[name].shape for name in names}
    added = write_lora(tmp_path / "lora.gguf", {name: (s[0], s[1]) for name, s in shapes.items()})
    tokens, plain = all_logits(path)
    _, adapted = all_logits(path, TEXT, lora_path=str(tmp_path / "lora.gguf"), lora_scale=scale)
    model = AdaptedModel(path)
    model.added = {name: scale * value for name, value in added.items()}
    assert relative(adapted, plain) > 0.1
    assert relative(adapted, model.logits(tokens)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "architecture", "message"),
    [("mmproj", "clip", "vision or audio part"), ("", "clip", "vision"), ("adapter", "llama", "LoRA adapter")],
)
def test_auxiliary_files_are_left_alone(tmp_path: Path, kind: str, architecture: str, message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "aux.gguf", architecture)
    if kind:
        writer.add_type(kind)
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((32, 128), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=f"aux.gguf: .*{message}.*is not quantized; quantize the"):
        quantize(tmp_path / "aux.gguf", tmp_path / "out.gguf", options=OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["aux.gguf"]
