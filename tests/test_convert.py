from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from command_line import run

from agq_gguf.calibration import collect
from agq_gguf.calibration.imatrix import load_imatrix
from agq_gguf.calibration.memory import hessian_bytes, work_bytes
from agq_gguf.calibration.stats import WeightStats
from agq_gguf.errors import InputError, OutputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import Reader, open_gguf
from agq_gguf.integrations import gguf_package
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize
from agq_gguf.quantization.report import REPLACED, Report
from agq_gguf.quantization.type_plan import plan

TEXT = "the red key in the box and the blue door to a cat, a dog. Where was the king? " * 25
OPTIONS = QuantizeOptions(threads=1, context=64)
ARCHITECTURES = ["llama", "gpt2", "bert", "bloom", "falcon", "qwen2"]

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Paths of tiny models by name, each written when first asked for."""
    folder = tmp_path_factory.mktemp("convert")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            if name == "moe":
                tiny_models.write_llama(path, n_layer=1, n_expert=4)
            elif name == "tied":
                tiny_models.write_llama(path, n_layer=1, tied=True)
            else:
                getattr(tiny_models, f"write_{name}")(path)
        return path

    return get


def check_file(src: Path, dst: Path, report: Report) -> None:
    """Reads the result with the gguf package and compares it with the source and the report."""
    gguf_package.extend()
    types = {t.name: t for t in report.tensors}
    with open_gguf(src) as source, open_gguf(dst) as ours:
        assert list(ours.tensors) == list(source.tensors) == list(types)
        for key, field in source.metadata.items():
            if key not in ("general.file_type", "general.alignment", "general.quantization_version"):
                assert ours.metadata[key].raw == field.raw
        for tensor in gguf.GGUFReader(dst).tensors:
            told = types[tensor.name]
            assert tensor.tensor_type.name.lower() == told.type_name == ours.tensors[tensor.name].type_name
            aligned = 64 if "agq4" in {told.type_name for told in types.values()} else 32
            assert tensor.n_bytes == told.n_bytes and tensor.data_offset % aligned == 0
            assert (told.reason == "") == (told.type_name == "agq4") == (told.error is not None)
            if source.tensors[tensor.name].type_name == told.type_name:
                same = bytes(source.raw(tensor.name)) == bytes(ours.raw(tensor.name))
                assert same == (not told.reason.endswith(REPLACED))
            if told.n_elements > 1 and tensor.tensor_type.name in ("AGQ4", "Q8_0"):
                w = source.read(tensor.name) * moved_factors(source, ours, tensor.name)
                restored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(w.shape)
                # Error feedback trades plain error for output error, so the bound is loose with it.
                assert np.square(restored - w).sum() < 0.1 * np.square(w).sum()
    assert dst.stat().st_size == report.n_bytes
    assert sum(n for n, _, _ in report.by_type().values()) == len(report.tensors)


def moved_factors(source: Reader, ours: Reader, name: str) -> np.ndarray | np.float32:
    """What equalization has multiplied the columns of a matrix by: what the norm in front of it has lost."""
    layer, _, kind = name.removesuffix(".weight").rpartition(".")
    if kind.startswith(("attn_q", "attn_k", "attn_v")):
        norms = [f"{layer}.attn_norm.weight"]
    elif kind.startswith(("ffn_up", "ffn_gate")) and "inp" not in kind:
        norms = [f"{layer}.{x}_norm.weight" for x in ("ffn", "attn")]  # Falcon's two halves share one
    else:
        norms = []
    for norm in norms:
        if norm in source.tensors:
            return source.read(norm) / ours.read(norm)
    return np.float32(1)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "moe", "tied"])
def test_every_architecture(models: Models, tmp_path: Path, name: str) -> None:
    report = quantize(models(name), tmp_path / "out.gguf", calibration=[TEXT], options=OPTIONS)
    check_file(models(name), tmp_path / "out.gguf", report)
    linear = [t for t in report.tensors if t.name.startswith("blk.") and t.type_name == "agq4"]
    assert len(linear) >= 4 * (1 if name in ("moe", "tied") else 2)
    assert all(t.error is not None and t.error < 0.006 and not t.note for t in linear)
    assert report.guidance == f"text, {int(report.guidance.split()[1])} tokens"
    assert [w for w in report.warnings if "calibrated on only" not in w] == []
    with open_gguf(tmp_path / "out.gguf") as out:
        assert out.get("agq.version") == 1 and out.get("agq.calibration") == report.guidance
        assert out.get("agq.tensors.agq4") == sum(t.type_name == "agq4" for t in report.tensors)
        for group in (["attn_q", "attn_k", "attn_v"], ["ffn_gate", "ffn_up"]):
            names = [f"blk.0.{x}.weight" for x in group]
            if names[0] in out.tensors and out.tensors[names[0]].type_name == "agq4":
                assert len({first_parameters(out, n) for n in names if n in out.tensors}) == 1


def first_parameters(reader: Reader, name: str) -> tuple[bytes, bytes]:
    tensor = reader.tensors[name]
    rows = np.frombuffer(reader.raw(name), np.uint8).reshape(-1, tensor.shape[-1] // 128 * 68)[: tensor.shape[-2]]
    parameters = blocks.read_parameters(rows)
    return parameters.exponents.tobytes(), parameters.listed.tobytes()


def test_a_channel_order_must_fit_the_smallest(tmp_path: Path) -> None:
    """k has too few rows to carry the list that q and v could; gate and up carry theirs."""
    src = tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1, n_embd=256, n_ff=384, n_head=4, n_kv=1)
    with open_gguf(src) as reader:
        norms = [reader.tensors[f"blk.0.{x}_norm.weight"].offset for x in ("attn", "ffn")]
    data = bytearray(src.read_bytes())
    for offset in norms:  # outliers that are worth an order
        for channel in (5, 70, 140, 210):
            data[offset + 4 * channel : offset + 4 * channel + 4] = np.float32(60).tobytes()
    src.write_bytes(data)
    options = replace(OPTIONS, matrix=replace(OPTIONS.matrix, activation_scale="token"))
    report = quantize(src, tmp_path / "o", calibration=[TEXT], options=options)
    assert all(not t.note for t in report.tensors)
    with open_gguf(tmp_path / "o") as out:
        listed = {x: len(first_parameters(out, f"blk.0.{x}.weight")[1]) // 2 for x in ("attn_q", "attn_k", "ffn_up")}
    assert listed["attn_q"] == listed["attn_k"] == 0 and listed["ffn_up"] >= 64


def errors(report: Report) -> dict[str, float]:
    return {t.name: t.error for t in report.tensors if t.error is not None and t.name.startswith("blk.")}


def test_without_guidance(models: Models, tmp_path: Path) -> None:
    report = quantize(models("llama"), tmp_path / "o", options=OPTIONS)
    check_file(models("llama"), tmp_path / "o", report)
    assert report.guidance == "none" and "without calibration" in report.warnings[0]
    again = quantize(models("llama"), tmp_path / "p", options=OPTIONS)
    assert (tmp_path / "o").read_bytes() == (tmp_path / "p").read_bytes() and again == report


def test_memory_and_threads_change_nothing(models: Models, tmp_path: Path) -> None:
    small = QuantizeOptions(threads=1, context=64, memory=hessian_bytes(256) + work_bytes(256))
    calls: list[tuple[str, int, int, str]] = []
    a = quantize(models("llama"), tmp_path / "a", calibration=[TEXT], options=OPTIONS)
    b = quantize(
        models("llama"), tmp_path / "b", calibration=[TEXT], options=small, progress=lambda *call: calls.append(call)
    )
    assert a == b and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    phases = [[c for c in calls if c[0] == phase] for phase in ("calibrate", "quantize")]
    for phase in phases:
        done = [c[1] for c in phase]
        assert done == sorted(done) and done[-1] == phase[-1][2]
    assert "pass 3 of" in "".join(c[3] for c in phases[0])


def test_experts_sharing_a_hessian_is_told(models: Models, tmp_path: Path) -> None:
    small = QuantizeOptions(threads=1, context=64, memory=hessian_bytes(256) + work_bytes(256))
    report = quantize(models("moe"), tmp_path / "o", calibration=[TEXT], options=small)
    assert any("the experts of 1 tensors share" in w for w in report.warnings)


def test_text_from_a_file(models: Models, tmp_path: Path) -> None:
    (tmp_path / "talk.txt").write_text(TEXT)
    report = quantize(models("llama"), tmp_path / "a", calibration=tmp_path / "talk.txt", options=OPTIONS)
    assert report.guidance.startswith("talk.txt, ")
    assert errors(report) == errors(quantize(models("llama"), tmp_path / "b", calibration=[TEXT], options=OPTIONS))


def write_imatrix(path: Path, sums: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    """As llama-imatrix does: sums of squares [matrices, K] and counts [matrices, 1]."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", kind)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32) * 50)
        writer.add_tensor(f"{name}.counts", np.full((len(values), 1), 50, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_imatrix(models: Models, tmp_path: Path) -> None:
    """The statistics of a calibration, passed through an imatrix, guide like a calibration without Hessian."""
    src = models("moe")
    with open_gguf(src) as reader:
        shapes = {p.source.name: p.source.shape for p in plan(reader) if p.type_name == "agq4"}
    found: dict[str, WeightStats] = {}
    with collect.Calibrator.open(src, [TEXT], shapes, context=64, threads=1) as calibrator:
        for one, stats in zip(
            calibrator.inputs, calibrator.collect(calibrator.inputs, 1 << 30, lambda _: None), strict=True
        ):
            found |= dict.fromkeys(one.weights, stats)
    sums = {n: np.stack([s.mean_square for s in (f.experts or (f.whole,))]) for n, f in found.items()}
    path = write_imatrix(tmp_path / "i.gguf", sums)
    loaded = load_imatrix(path)
    assert loaded.keys() == found.keys()
    for name, stats in loaded.items():
        assert len(stats.experts) == len(found[name].experts)
        for i in range(max(1, len(stats.experts))):
            mean_square = stats.of(i).mean_square
            np.testing.assert_allclose(mean_square, found[name].of(i).mean_square, rtol=1e-6)
    report = quantize(src, tmp_path / "o", imatrix=path, options=OPTIONS)
    assert report.guidance == "imatrix i.gguf" and not report.warnings
    plain = quantize(src, tmp_path / "p", calibration=[TEXT], options=QuantizeOptions(
        threads=1, context=64, matrix=MatrixOptions(error_feedback=False, refine=False, equalize=False)))  # fmt: skip
    for name, error in errors(report).items():
        assert error == pytest.approx(errors(plain)[name], rel=1e-3)


def test_a_text_and_an_imatrix(models: Models, tmp_path: Path) -> None:
    """The text is used, and a note says so."""
    src, text = models("llama"), tmp_path / "text.txt"
    text.write_text(TEXT)
    with open_gguf(src) as reader:
        sums = {p.source.name: np.ones((1, p.source.shape[-1])) for p in plan(reader) if p.type_name == "agq4"}
    path = write_imatrix(tmp_path / "i.gguf", sums)
    shown = run("quantize", src, tmp_path / "o", "--imatrix", path, "--calibration", text, "--quality", "fast", "-q")
    assert f"note: {path} is not used" in shown.stderr and "calibration: " in shown.stdout


def test_bad_imatrix(models: Models, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    for sums, kind, message in [
        ({name: np.ones((1, 128))}, "model", "not an imatrix"),
        ({}, "imatrix", "the imatrix is empty"),
        ({name: np.ones((1, 256))}, "imatrix", "another model"),
        ({name: np.ones((3, 128))}, "imatrix", "3 experts"),
        ({name: np.full((1, 128), np.nan)}, "imatrix", "damaged"),
        ({name: np.full((1, 128), -1.0)}, "imatrix", "damaged"),
    ]:
        path = write_imatrix(tmp_path / "i.gguf", sums, kind)
        for text in (None, [TEXT]):  # before calibration, too
            with pytest.raises(InputError, match=message):
                quantize(models("llama"), tmp_path / "o", calibration=text, imatrix=path, options=OPTIONS,
                         progress=lambda *_: pytest.fail("has begun"))  # fmt: skip
            with pytest.raises(InputError, match=message):
                plan_file(models("llama"), OPTIONS, calibration=text, imatrix=path)
    assert not (tmp_path / "o").exists()
    path = write_imatrix(tmp_path / "i.gguf", {name: np.ones((1, 128))})
    report = quantize(models("llama"), tmp_path / "o", imatrix=path, options=OPTIONS)
    assert "no activations were seen for 13 tensors" in report.warnings[0]


def test_recipe(models: Models) -> None:
    def types(name: str, **options: Any) -> dict[str, str]:
        return {p.source.name: p.type_name for p in plan_file(models(name), QuantizeOptions(**options))}

    llama = types("llama")
    assert llama["output.weight"] == "q8_0" and llama["token_embd.weight"] == "q8_0"  # a small model
    assert types("llama", embedding_type="agq4")["token_embd.weight"] == "agq4"
    assert types("tied")["token_embd.weight"] == "q8_0"
    assert types("tied", output_type="agq4")["token_embd.weight"] == "agq4"
    assert types("llama", output_type="f32", embedding_type="q8_0").items() >= {
        "output.weight": "f32", "token_embd.weight": "q8_0"}.items()  # fmt: skip
    moe = types("moe")
    assert moe["blk.0.ffn_gate_inp.weight"] == "f16" and moe["blk.0.ffn_down_exps.weight"] == "agq4"
    assert types("gpt2")["position_embd.weight"] == "f16" and types("gpt2")["blk.0.attn_qkv.bias"] == "f32"
    reasons = {p.source.name: p.reason for p in plan_file(models("moe"))}
    assert reasons["blk.0.ffn_gate_inp.weight"] == "router" and reasons["blk.0.attn_norm.weight"] == "one-dimensional"
    with pytest.raises(InputError, match=r"output type must be one of .*, got 'q3_k'"):
        types("llama", output_type="q3_k")


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    """96 columns: no multiple of 64."""
    src = tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1, n_embd=96, n_ff=200, n_head=4, n_kv=1)
    report = quantize(src, tmp_path / "o", calibration=[TEXT], options=OPTIONS)
    check_file(src, tmp_path / "o", report)
    told = {t.name: t for t in report.tensors}
    assert (told["blk.0.attn_q.weight"].type_name, told["blk.0.ffn_down.weight"].type_name) == ("q8_0", "f16")
    assert told["blk.0.attn_q.weight"].reason == "columns must be a multiple of 64, got 96"
    assert told["blk.0.ffn_down.weight"].reason.endswith("q8_0 needs a multiple of 32 columns")


def test_bad_sources_and_targets(models: Models, tmp_path: Path) -> None:
    src = tmp_path / "m.gguf"
    src.write_bytes(models("llama").read_bytes())
    before = src.read_bytes()
    with pytest.raises(InputError, match="is the source model"):
        quantize(src, src, options=OPTIONS)
    (tmp_path / "link").symlink_to(src)
    with pytest.raises(InputError, match="is the source model"):
        quantize(src, tmp_path / "link", options=OPTIONS)
    assert src.read_bytes() == before
    quantize(src, tmp_path / "q.gguf", options=OPTIONS)
    with pytest.raises(InputError, match="is an AGQ4 model already"):
        quantize(tmp_path / "q.gguf", tmp_path / "r.gguf", options=OPTIONS)
    with pytest.raises(InputError, match="No such file"):
        quantize(tmp_path / "none", tmp_path / "r.gguf", options=OPTIONS)
    with pytest.raises(OutputError, match="cannot write there"):
        quantize(src, tmp_path / "no" / "r.gguf", options=OPTIONS)
    with pytest.raises(InputError, match="No such file"):
        quantize(src, tmp_path / "r.gguf", calibration=tmp_path / "none.txt", options=OPTIONS)
    with pytest.raises(InputError, match="at least 64"):
        quantize(src, tmp_path / "r.gguf", calibration=["", ""], options=OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "m.gguf", "q.gguf"]


def test_a_nan_weight_is_named_and_nothing_left(models: Models, tmp_path: Path) -> None:
    with open_gguf(models("llama")) as reader:
        at = reader.tensors["blk.1.ffn_up.weight"].offset
    data = bytearray(models("llama").read_bytes())
    data[at : at + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds a NaN"):
        quantize(tmp_path / "m.gguf", tmp_path / "o", options=OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_interrupted_and_full_disk(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(phase: str, done: int, *_: object) -> None:
        if phase == "quantize" and done > 50000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(models("llama"), tmp_path / "o", options=OPTIONS, progress=stop)
    assert list(tmp_path.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        quantize(models("llama"), tmp_path / "o", options=OPTIONS)
    assert list(tmp_path.iterdir()) == []
