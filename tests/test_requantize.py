"""Sources that are quantized already: what is read, what is kept, what is refused, and that nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import architectures
import gguf
import numpy as np
import pytest
import tiny_models
from command_line import run

from agq_gguf.errors import HostError, InputError
from agq_gguf.gguf_io.reader import TYPE_IDS, TYPES, open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize
from agq_gguf.runtime.ggml import ggml

MATRIX = MatrixOptions(learn_codebook=False)  # learning takes most of the time, and these tests do not need it
OPTIONS = QuantizeOptions(threads=1, context=64, matrix=MATRIX, allow_requantize=True)
CODED = [name for name, block, _ in TYPES.values() if block > 1 and name not in ("agq4", "q8_1", "q8_K")]

KEPT = {"q1_0", "tq1_0", "tq2_0"}  # few values and a scale for 128 columns or more: AGQ4 holds them as they are


# Types that ggml makes slowly, or that some of its releases cannot make.
SLOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "nvfp4")


def random_rows(type_name: str, n: int, columns: int) -> np.ndarray:
    """Rows [n, bytes] of random blocks that hold no large values."""
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    wanted = n * columns // block
    data = np.random.default_rng(1).integers(0, 256, (8 * wanted, block_bytes), np.uint8)
    found = ggml().decoder(type_name)(bytearray(data)).reshape(len(data), block)
    small = data[np.nan_to_num(np.abs(found), nan=9.0).max(1) < 4]
    return np.resize(small, (wanted, block_bytes)).reshape(n, -1)


def coded(source: Path, target: Path, type_name: str, only: str = "blk.", but: str = "norm") -> Path:
    """A copy of a float model whose matrices are of one of ggml's types; names must have `only` and not `but`."""
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    with open_gguf(source) as reader:
        chosen = {
            t.name: len(t.shape) > 1 and t.name.endswith(".weight") and only in t.name and but not in t.name
            for t in reader.tensors.values()
        }
        placed = layout(
            (t.name, type_name if chosen[t.name] else t.type_name, t.shape) for t in reader.tensors.values()
        )
        with Writer(target, reader.metadata, {}, placed) as writer:
            for name, tensor in reader.tensors.items():
                if not chosen[name]:
                    writer.write(name, reader.chunks(name))
                    continue
                rows = reader.read(name).reshape(-1, tensor.shape[-1])
                row_bytes = tensor.shape[-1] // block * block_bytes
                if type_name in SLOW:
                    made = random_rows(type_name, len(rows), tensor.shape[-1])
                else:
                    importance = np.ones(tensor.shape[-1], np.float32)
                    row_bytes = tensor.shape[-1] // block * block_bytes
                    made = ggml().quantize(TYPE_IDS[type_name], rows, row_bytes, importance)
                writer.write(name, [made])
    return target


def floats(source: Path, target: Path) -> Path:
    """The same model with its quantized tensors in F32."""
    with open_gguf(source) as reader:
        for type_name in CODED:
            reader.decoders[type_name] = ggml().decoder(type_name)
        placed = layout((t.name, "f32" if t.quantized else t.type_name, t.shape) for t in reader.tensors.values())
        with Writer(target, reader.metadata, {}, placed) as writer:
            for name, tensor in reader.tensors.items():
                writer.write(name, [reader.read(name)] if tensor.quantized else reader.chunks(name))
    return target


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with 256 columns, which every type of ggml supports."""
    path = tmp_path_factory.mktemp("wide") / "f16.gguf"
    return tiny_models.write_llama(path, n_layer=1, n_embd=256, n_ff=256, n_head=4, n_kv=4)


@pytest.mark.parametrize("type_name", CODED)
def test_every_type_is_read_as_ggml_and_gguf_read_it(type_name: str) -> None:
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    rng = np.random.default_rng(TYPE_IDS[type_name])
    rows = rng.standard_normal((8, 512), np.float32)
    ours = ggml().decoder(type_name)
    if type_name not in SLOW:
        made = ggml().quantize(TYPE_IDS[type_name], rows, 512 // block * block_bytes, np.ones(512, np.float32))
        assert np.square(ours(bytearray(made)) - rows.reshape(-1)).mean() < 0.7
    data = rng.integers(0, 256, (4, 512 // block * block_bytes), np.uint8)  # also NaNs, infinities, all codes
    found = ours(bytearray(data))
    assert found.shape == (2048,)
    kind = gguf.GGMLQuantizationType(TYPE_IDS[type_name])
    if kind in gguf.quants._type_traits:
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(found, gguf.quants.dequantize(data, kind).reshape(-1))


@pytest.mark.parametrize("type_name", ["q8_1", "q8_K"])
def test_types_that_are_never_in_files(type_name: str) -> None:
    with pytest.raises(HostError, match=f"cannot turn the type {type_name} into floats"):
        ggml().decoder(type_name)


def test_requantizing_is_quantizing_what_the_source_says(tmp_path: Path) -> None:
    """A model with a matrix of each type: the same bytes come out as from that model in F32."""
    source = tiny_models.write_llama(tmp_path / "0.gguf", n_layer=4, n_embd=256, n_ff=256, n_head=8, n_kv=1)
    with open_gguf(source) as reader:
        names = [name for name in reader.tensors if "blk." in name and "norm" not in name]
    for i, type_name in enumerate(CODED):
        source = coded(source, tmp_path / f"{i + 1}.gguf", type_name, only=names[i])
    with pytest.raises(InputError, match=r"already quantized \(q4_0\).*--allow-requantize"):
        quantize(source, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    options = QuantizeOptions(quality="fast", threads=1, matrix=MATRIX, allow_requantize=True, keep_types=())
    report = quantize(source, tmp_path / "out.gguf", options=options)
    quantize(floats(source, tmp_path / "f32.gguf"), tmp_path / "plain.gguf", options=options)
    with open_gguf(tmp_path / "out.gguf") as ours, open_gguf(tmp_path / "plain.gguf") as plain:
        assert plain.get("agq.requantized_from") is None
        assert set(ours.get("agq.requantized_from").split(", ")) == set(CODED) - KEPT
        for name, tensor in plain.tensors.items():
            assert ours.tensors[name].type_name == tensor.type_name == ("agq4" if name in names else tensor.type_name)
            assert bytes(ours.raw(name)) == bytes(plain.raw(name)), name
    assert "the source is quantized already (q4_0, " in report.warnings[0]
    small = {name for name in set(CODED) - KEPT if 8 * TYPES[TYPE_IDS[name]][2] < 4.25 * TYPES[TYPE_IDS[name]][1]}
    assert small and set(report.warnings[1].split(" has fewer bits than AGQ4")[0].split(", ")) == small
    assert "q4_0" in inspect_file(tmp_path / "out.gguf").metadata["requantized_from"]


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
@pytest.mark.parametrize("type_name", ["q8_0", "q4_K"])
def test_calibrated_on_the_source_as_it_is(
    wide: Path, words: str, tmp_path: Path, quality: str, type_name: str
) -> None:
    source = coded(wide, tmp_path / "coded.gguf", type_name)
    options = QuantizeOptions(
        quality=quality, tune=False, threads=1, calibration_tokens=2048, matrix=MATRIX, allow_requantize=True
    )
    report = quantize(source, tmp_path / "out.gguf", calibration=[words], options=options)
    assert not [w for w in report.warnings if "no activations" in w or "falling back" in w]
    errors = [t.error for t in report.tensors if t.error is not None]
    assert len(errors) == 7 and max(errors) < 0.02
    assert evaluate(tmp_path / "out.gguf", source, words, context=128, chunks=4).mean_kl < 0.05


def test_what_stays_stock_keeps_its_bytes(wide: Path, tmp_path: Path) -> None:
    """A table that would become Q8_0 stays Q4_K, and a Q8_0 one is not rounded again; a larger stock type shrinks."""
    source = coded(wide, tmp_path / "a.gguf", "q4_K", only="token_embd")
    source = coded(source, tmp_path / "b.gguf", "q8_0", only="output.weight", but="attn")
    report = quantize(source, tmp_path / "out.gguf", options=OPTIONS)
    told = {t.name: t for t in report.tensors}
    assert told["token_embd.weight"].type_name == "q4_K"
    assert told["token_embd.weight"].reason == "embedding type is q8_0; the source's q4_K is no larger"
    assert told["output.weight"].type_name == "q8_0"
    with open_gguf(source) as before, open_gguf(tmp_path / "out.gguf") as after:
        for name in ("token_embd.weight", "output.weight"):
            assert bytes(before.raw(name)) == bytes(after.raw(name))
        assert after.get("agq.requantized_from") is None  # no tensor lost anything
    assert not [w for w in report.warnings if "quantized already" in w]
    options = QuantizeOptions(threads=1, matrix=MATRIX, allow_requantize=True, output_type="q6_K")
    assert {p.source.name: p.type_name for p in plan_file(source, options)}["output.weight"] == "q6_K"


def test_types_to_keep(wide: Path, tmp_path: Path) -> None:
    source = coded(wide, tmp_path / "a.gguf", "mxfp4", only="ffn_")
    source = coded(source, tmp_path / "b.gguf", "q6_K", only="attn_q.")

    def types(**changes: object) -> dict[str, str]:
        options = QuantizeOptions(threads=1, matrix=MATRIX, allow_requantize=True, **changes)  # type: ignore[arg-type]
        return {p.source.name[6:-7]: p.type_name for p in plan_file(source, options) if p.source.name[:3] == "blk"}

    assert (types()["ffn_up"], types()["attn_q"]) == ("mxfp4", "agq4")
    kept = types(keep_types=("q6_K",))
    assert (kept["ffn_up"], kept["attn_q"], kept["attn_k"]) == ("agq4", "q6_K", "agq4")
    quantize(source, tmp_path / "out.gguf", options=OPTIONS)
    with open_gguf(source) as before, open_gguf(tmp_path / "out.gguf") as after:
        assert bytes(before.raw("blk.0.ffn_up.weight")) == bytes(after.raw("blk.0.ffn_up.weight"))
    with pytest.raises(InputError, match=r"types to keep must be names of ggml's types, .*, got 'q6'"):
        QuantizeOptions(keep_types=("q6",))
    with pytest.raises(InputError, match="got 'agq4'"):
        QuantizeOptions(keep_types=("agq4",))


def test_a_target_holds_with_kept_types(wide: Path, words: str, tmp_path: Path) -> None:
    source = coded(wide, tmp_path / "a.gguf", "q4_0")
    options = QuantizeOptions(
        threads=1, matrix=MATRIX, allow_requantize=True, target_bpw=6.0, calibration_tokens=1024, keep_types=("q4_0",)
    )
    assert quantize(source, tmp_path / "out.gguf", calibration=[words], options=options).bits_per_weight <= 6.0


def test_damaged_blocks_are_named(wide: Path, tmp_path: Path) -> None:
    source = coded(wide, tmp_path / "coded.gguf", "q4_0")
    with open_gguf(source) as reader:
        at = reader.tensors["blk.0.ffn_up.weight"].offset
    data = bytearray(source.read_bytes())
    data[at : at + 2] = np.float16(np.nan).tobytes()
    source.write_bytes(data)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight holds a NaN"):
        quantize(source, tmp_path / "out.gguf", options=OPTIONS)
    assert not (tmp_path / "out.gguf").exists()


def test_agq4_is_not_a_source(wide: Path, tmp_path: Path) -> None:
    quantize(wide, tmp_path / "q.gguf", options=OPTIONS)
    for options in (OPTIONS, QuantizeOptions()):
        with pytest.raises(InputError, match=r"is an AGQ4 model already; start from the file that it was made from"):
            quantize(tmp_path / "q.gguf", tmp_path / "out.gguf", options=options)


def test_on_the_command_line(wide: Path, tmp_path: Path) -> None:
    source = coded(wide, tmp_path / "coded.gguf", "mxfp4", only="ffn_")
    refused = run("quantize", source, tmp_path / "out.gguf", code=2)
    assert refused.stderr.count("\n") == 1 and "--allow-requantize" in refused.stderr
    shown = run("quantize", source, tmp_path / "out.gguf", "--allow-requantize", "--dry-run")
    assert "type mxfp4 is kept" in shown.stdout
    shown = run("quantize", source, tmp_path / "out.gguf", "--allow-requantize", "--keep-types", "none", "-q", "-t", 1)
    assert "warning: the source is quantized already (mxfp4)" in shown.stderr
    wrong = run("quantize", source, tmp_path / "out.gguf", "--allow-requantize", "--keep-types", "mxfp5", code=2)
    assert "got 'mxfp5'" in wrong.stderr


# gpt-oss as it is published: MXFP4 experts, everything else of full precision


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    return coded(architectures.write_gpt_oss(folder / "f32.gguf"), folder / "mxfp4.gguf", "mxfp4", only="_exps.")


def test_mxfp4_is_not_contained_in_agq4() -> None:
    """Two blocks of 32 whose scales differ by one step hold more values than a codebook has entries.

    A group of 64 has one scale for both, so each of their values needs a code of its own.
    """
    decode = ggml().decoder("mxfp4")
    codes = bytes(range(16)) + bytes(range(16))
    low, high = (decode(bytearray([e]) + bytearray(codes[:16])) for e in (127, 128))
    assert len(np.unique(low)) <= 15 and np.array_equal(high, 2 * low)
    assert len(np.unique(np.concatenate([low, high]))) > 16


def test_gpt_oss_keeps_its_experts(gpt_oss: Path, words: str, tmp_path: Path) -> None:
    """Experts have as many bits in MXFP4 as in AGQ4, and lose nothing if they stay."""
    divergence, size = {}, {}
    for keep in (("mxfp4",), ()):
        options = QuantizeOptions(
            threads=1, calibration_tokens=2048, matrix=MATRIX, allow_requantize=True, keep_types=keep
        )
        out = tmp_path / f"{len(keep)}.gguf"
        report = quantize(gpt_oss, out, calibration=[words], options=options)
        experts = [t for t in report.tensors if t.name.endswith("_exps.weight")]
        assert {t.type_name for t in experts} == {"mxfp4" if keep else "agq4"}
        size[keep] = sum(t.n_bytes for t in experts)
        # Not the mean: a position where another expert is chosen, in both files, makes a third of it or more.
        divergence[keep] = evaluate(out, gpt_oss, words, context=128, chunks=4).median_kl
    assert size[("mxfp4",)] == size[()]
    assert divergence[("mxfp4",)] < 0.6 * divergence[()]
