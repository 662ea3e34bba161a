"""Checkpoint folders given to `quantize`: our own import, llama.cpp's converter, packed checkpoints, and no traces."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from command_line import run
from test_packed import Packer, change, pack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own deprecations
    import tiny_checkpoints as tiny
    import transformers

from transformers_logits import logits_of, torch_logits

from agq_gguf.errors import HostError, InputError, OutputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.import_hf import converter, import_checkpoint
from agq_gguf.import_hf.checkpoint import Checkpoint, read_config
from agq_gguf.import_hf.packed import Unpacked, scheme_of
from agq_gguf.logits import compare
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
MATRIX = MatrixOptions(learn_codebook=False)


def options(**changes: Any) -> QuantizeOptions:
    return QuantizeOptions(quality="fast", threads=1, matrix=MATRIX, **changes)


@pytest.fixture
def unknown(own_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of an architecture that import-hf does not know, and no converter anywhere."""
    folder: Path = own_checkpoint("llama")
    change(folder, architectures=["OtherForCausalLM"])
    monkeypatch.delenv("AGQ_CONVERTER", raising=False)
    monkeypatch.setenv("PATH", "")
    return folder


def script(path: Path, body: str) -> Path:
    path.write_text("import shutil, sys\n" + textwrap.dedent(body), "utf-8")
    return path


def test_the_folder_gives_the_same_file_as_its_import(own_checkpoint: Any, tmp_path: Path) -> None:
    folder, outputs = own_checkpoint("opt"), tmp_path / "outputs"
    outputs.mkdir()
    import_checkpoint(folder, tmp_path / "f16.gguf")
    quantize(tmp_path / "f16.gguf", tmp_path / "wanted.gguf", options=options())
    kept = outputs / "kept.gguf"
    quantize(folder, outputs / "out.gguf", options=options(keep_float=str(kept)))
    assert (outputs / "out.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    assert kept.read_bytes() == (tmp_path / "f16.gguf").read_bytes()
    quantize(folder, outputs / "out.gguf", options=options())
    assert sorted(path.name for path in outputs.iterdir()) == ["kept.gguf", "out.gguf"]
    with pytest.raises(InputError, match="is a folder; a plan needs a GGUF file"):
        plan_file(folder)


def test_a_bfloat16_checkpoint_stays_one(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    change(folder, dtype="bfloat16")
    quantize(folder, tmp_path / "out.gguf", options=options(keep_float=str(tmp_path / "kept.gguf")))
    with open_gguf(tmp_path / "kept.gguf") as reader:
        assert reader.tensors["blk.0.ffn_up.weight"].type_name == "bf16"


def test_a_packed_checkpoint_needs_the_option(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    pack(folder, "awq", Packer(4, 128, False, False))
    with pytest.raises(InputError, match=r"already quantized \(AWQ, 4 bits, groups of 128\).*--allow-requantize"):
        quantize(folder, tmp_path / "out.gguf", options=options())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    report = quantize(folder, tmp_path / "out.gguf", options=options(allow_requantize=True))
    assert report.warnings[0].startswith("the checkpoint is quantized already (AWQ, 4 bits, groups of 128)")


def test_without_a_converter(unknown: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"OtherForCausalLM needs llama\.cpp's converter, .*--converter or AGQ_CONV"):
        quantize(unknown, tmp_path / "out.gguf", options=options())
    shown = run("quantize", unknown, tmp_path / "out.gguf", "--converter", tmp_path / "none.py", code=2)
    assert "none.py: there is no such file, but --converter names it" in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_converter_is_found_and_told_what_to_do(
    unknown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By option, by folder, by environment, by PATH, and as a module of this Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    model = tiny_models.write_llama(tmp_path / "model.gguf", n_layer=1)
    named = script(
        tools / "convert_hf_to_gguf.py",
        f"""
        assert sys.argv[1] == {str(unknown)!r} and sys.argv[4:] == ["--outtype", "auto"], sys.argv
        shutil.copyfile({str(model)!r}, sys.argv[sys.argv.index("--outfile") + 1])
        """,
    )
    quantize(model, tmp_path / "wanted.gguf", options=options())
    wanted = (tmp_path / "wanted.gguf").read_bytes()
    for value in (named, tools):
        quantize(unknown, tmp_path / "out.gguf", options=options(converter=str(value)))
        assert (tmp_path / "out.gguf").read_bytes() == wanted
    monkeypatch.setenv("AGQ_CONVERTER", str(named))
    assert converter.find("", "x") == named
    monkeypatch.delenv("AGQ_CONVERTER")
    named.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    assert converter.find("", "x") == named
    monkeypatch.setenv("PATH", "")
    monkeypatch.syspath_prepend(tools)
    assert converter.find("", "x") == named
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("sys.exit('one line\\nModel OtherForCausalLM is not supported')", InputError, "Model OtherForCausalLM is not"),
        ("sys.exit(3)", InputError, "cannot convert it: exit code 3"),
        ("pass", InputError, "cannot convert it: exit code 0"),
        ("import no_such_package", HostError, "llama.cpp's converter needs no_such_package, .* install it with"),
        ("open(sys.argv[3], 'w').write('x' * 100)", InputError, "not a GGUF file"),
    ],
)
def test_a_converter_that_fails(unknown: Path, tmp_path: Path, body: str, error: type[Exception], message: str) -> None:
    named = script(tmp_path / "c.py", body)
    with pytest.raises(error, match=message):
        quantize(unknown, tmp_path / "out.gguf", options=options(converter=str(named)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.py", "checkpoint"]


def test_an_interrupt_and_a_full_disk_leave_nothing(
    unknown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = script(tmp_path / "c.py", "pass")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(unknown, tmp_path / "out.gguf", options=options(converter=str(named)))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
        with pytest.raises(OutputError, match=r"needs \d+ bytes, 5 are free there; make room, or name a place"):
            quantize(unknown, tmp_path / "out.gguf", options=options(converter=str(named)))
    with pytest.raises(OutputError, match="cannot write there"):
        quantize(unknown, tmp_path / "no" / "out.gguf", options=options(converter=str(named)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.py", "checkpoint"]


def test_a_tokenizer_that_is_a_program_is_not_run(unknown: Path, tmp_path: Path) -> None:
    settings = unknown / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text("utf-8")), "auto_map": {"AutoTokenizer": "x.T"}}))
    named = script(tmp_path / "c.py", "raise SystemError")
    with pytest.raises(InputError, match=r"tokenizer is a program \(auto_map\)"):
        quantize(unknown, tmp_path / "out.gguf", options=options(converter=str(named)))


@pytest.mark.parametrize("size", [1, 1 << 31])
def test_packed_checkpoints_become_float_ones_for_the_converter(
    own_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """In one file or in many: imported, the folder gives what the packed one gives."""
    folder = own_checkpoint("opt")
    pack(folder, "compressed", Packer(4, 32, False, False))
    monkeypatch.setattr(converter, "_FILE_BYTES", size)
    with Checkpoint(folder) as files:
        scheme = scheme_of(read_config(folder), folder)
        assert scheme is not None
        converter.write_floats(Unpacked(files, scheme), tmp_path / "float")
    import_checkpoint(folder, tmp_path / "a.gguf")
    import_checkpoint(tmp_path / "float", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "a.gguf") as a, open_gguf(tmp_path / "b.gguf") as b:
        assert all(bytes(a.raw(name)) == bytes(b.raw(name)) for name in a.tensors)
    n_files = len(list((tmp_path / "float").glob("*.safetensors")))
    assert n_files == 1 if size > 1 else n_files > 20


# llama.cpp's own converter


def _config(name: str) -> Any:
    sizes = {**tiny.SIZES, "intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 256}
    if name == "gemma3":
        return transformers.Gemma3TextConfig(**sizes, head_dim=32, sliding_window=64, query_pre_attn_scalar=32)
    if name == "phi3":
        return transformers.Phi3Config(**sizes, pad_token_id=0, sliding_window=256)
    kind = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[name]
    return kind(**sizes)


@pytest.mark.slow  # `.ci/run` has the sources of llama.cpp for these tests only
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3", "phi3"])
def test_llama_cpps_converter(name: str, ggml_sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    causal = {"qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3", "phi3": "Phi3"}[name] + "ForCausalLM"
    torch_model = tiny._spread(getattr(transformers, causal)(_config(name)), 0)
    torch_model.save_pretrained(folder)
    # The converter knows byte-level tokenizers by the tokens they give, and random ones are not among them.
    tiny.llama_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    kept = tmp_path / "kept.gguf"
    report = quantize(folder, tmp_path / "out.gguf", options=options(converter=str(ggml_sources), keep_float=str(kept)))
    assert any(t.type_name == "agq4" for t in report.tensors)
    tokens = np.random.default_rng(5).integers(8, 500, 64).astype(np.int32)
    found = logits_of(kept, tokens)
    assert compare(torch_logits(torch_model, tokens), found, tokens)[:, 2].mean() < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "kept.gguf", "out.gguf"]
