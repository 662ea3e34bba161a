"""Files of checkpoints: every layout that is read, and all that is refused, with one sentence and no traces."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own deprecations
    import tiny_checkpoints as tiny

from agq_gguf.errors import InputError, OutputError
from agq_gguf.import_hf import import_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("layout", ["parts", "bin", "bin-parts", "old-bin"])
def test_every_layout_gives_the_same_file(layout: str, own_checkpoint: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder, model, _ = own_checkpoint("bloom"), checkpoints("bloom")[1], None
    import_checkpoint(folder, tmp_path / "single.gguf")
    if layout == "parts":
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="300KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    elif layout == "old-bin":
        tiny.write_pytorch(folder, model, parts=2, _use_new_zipfile_serialization=False)
    else:
        tiny.write_pytorch(folder, model, parts=3 if layout == "bin-parts" else 1)
    import_checkpoint(folder, tmp_path / "other.gguf")
    wanted, found = tensors_of(tmp_path / "single.gguf"), tensors_of(tmp_path / "other.gguf")
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)


def test_links_as_in_the_cache_of_huggingface_hub(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert import_checkpoint(snapshot, tmp_path / "out.gguf").n_tensors > 20


class _Payload:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_pickles_run_no_code_unless_allowed(own_checkpoint: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder, trace = own_checkpoint("opt"), tmp_path / "was-here"
    (folder / "model.safetensors").unlink()
    state = {**checkpoints("opt")[1].state_dict(), "extra": _Payload(trace)}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*--allow-pickle"):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert not trace.exists()
    import_checkpoint(folder, tmp_path / "out.gguf", allow_pickle=True)
    assert trace.exists()


def test_a_plain_pickle_is_refused(own_checkpoint: Any, tmp_path: Path) -> None:
    folder, trace = own_checkpoint("opt"), tmp_path / "was-here"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(trace)))
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:\\x", "a\\b", 7])
def test_an_index_may_not_leave_the_folder(name: Any, own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    shutil.copy(folder / "model.safetensors", tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}), encoding="utf-8")
    with pytest.raises(InputError, match="not a file of this folder"):
        import_checkpoint(folder, tmp_path / "out.gguf")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "remove"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*convert_hf_to_gguf"),
        ("opt", {"architectures": "remove"}, r"\(not named\)"),
        ("opt", {"architectures": [{}]}, r"\(not named\)"),
        ("opt", {"do_layer_norm_before": False}, r"do_layer_norm_before.*350m"),
        ("opt", {"word_embed_proj_dim": 64}, r"word_embed_proj_dim.*350m"),
        ("opt", {"activation_function": "gelu"}, "activation_function"),
        ("opt", {"max_position_embeddings": 100}, r"embed_positions.*\[258, 128\].*\[102, 128\]"),
        ("opt", {"num_hidden_layers": 3}, r"tensors are missing, first layers\.2"),
        ("opt", {"num_hidden_layers": 1}, r"tensors are not part.*layers\.1"),
        ("opt", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("opt", {"num_attention_heads": 5}, "5 heads"),
        ("opt", {"hidden_size": "big"}, "hidden_size must be a number .*, got 'big'"),
        ("opt", {"hidden_size": True}, "hidden_size must be a number .*, got True"),
        ("opt", {"hidden_size": "remove"}, "has no hidden_size"),
        ("opt", {"tie_word_embeddings": False}, "lm_head"),
        ("opt", {"enable_bias": False}, "not part"),
        ("opt", {"quantization_config": {"quant_method": "fp8"}}, "already quantized .fp8, not supported.; only GPTQ"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("bloom", {"layer_norm_epsilon": -1}, "layer_norm_epsilon"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"num_key_value_heads": 3}, "3 key/value heads"),
        ("llama", {"head_dim": 33}, "even number of channels .*, got 33"),
        ("llama", {"vocab_size": 500}, r"embed_tokens.*\[576, 128\]"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "has no factor"),
        ("llama", {"rope_parameters": [1]}, "rope_scaling"),
        ("llama", {"rope_parameters": {**tiny.LLAMA3_ROPE, "low_freq_factor": 9.0}}, "original_max"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_named(
    name: str, changes: dict[str, Any], message: str, own_checkpoint: Any, tmp_path: Path
) -> None:
    folder, out = own_checkpoint(name), tmp_path / "out.gguf"
    out.write_bytes(b"old")
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        import_checkpoint(folder, out)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out.gguf"]


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def nested(depth: int) -> dict[str, Any]:
    """A pre-tokenizer within sequences within sequences."""
    return {"type": "Sequence", "pretokenizers": [nested(depth - 1)]} if depth else {"type": "Punctuation"}


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("opt", lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), r"Whitespace.*convert_hf_to_gguf"),
        ("opt", lambda t: t.update(pre_tokenizer=None), "the rule that splits text"),
        ("opt", lambda t: t.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        ("opt", lambda t: t["model"].update(type="WordPiece"), "WordPiece"),
        ("opt", lambda t: t["model"].update(dropout=0.1), "dropout"),
        ("opt", lambda t: t.update(model=3), "not a valid tokenizer"),
        ("opt", lambda t: t["model"].update(vocab=[["a", 0]]), "only BPE"),
        ("opt", lambda t: t["model"]["vocab"].update(new=-4), "number -4"),
        ("opt", lambda t: t["model"]["vocab"].update(new="7"), "number '7'"),
        ("opt", lambda t: t["model"].update(merges=[]), "no merges"),
        ("opt", lambda t: t["model"].update(merges=[3]), "not a valid tokenizer"),
        ("opt", lambda t: t["added_tokens"].append({"id": 570, "content": "a", "special": True}), "same text 'a'"),
        ("opt", lambda t: t["added_tokens"].append({"content": "a"}), "not a valid tokenizer"),
        ("opt", lambda t: t.update(pre_tokenizer=nested(400)), "the rule that splits text"),
        ("llama", lambda t: t["model"]["vocab"].pop("<0x41>"), "255 of the 256 byte tokens"),
        ("llama", lambda t: t.update(normalizer={"type": "NFKC"}), "NFKC"),
        ("llama", lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    ],
)
def test_tokenizers_that_cannot_be_imported(
    name: str, edit: Callable[[dict[str, Any]], None], message: str, own_checkpoint: Any, tmp_path: Path
) -> None:
    folder = own_checkpoint(name)
    edit_tokenizer(folder, edit)
    with pytest.raises(InputError, match=message):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_more_tokens_than_the_model_has_are_left_out(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    edit_tokenizer(folder, lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 600, "content": "<far>"}))
    report = import_checkpoint(folder, tmp_path / "out.gguf")
    assert "left out 1 tokens" in report.warnings[0]
    assert len(gguf.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.tokens"].contents()) == 576


def test_missing_and_damaged_files(own_checkpoint: Any, tmp_path: Path) -> None:
    folder, out = own_checkpoint("opt"), tmp_path / "out.gguf"

    def fails(message: str) -> None:
        with pytest.raises(InputError, match=message):
            import_checkpoint(folder, out)

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    fails("not a readable safetensors file")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    fails("not a readable safetensors file")
    (folder / "model.safetensors").unlink()
    fails("has no weights")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}), encoding="utf-8")
    fails("1 of 1 files are missing")
    index.write_text("[]", encoding="utf-8")
    fails("must hold a JSON object, got list")
    index.write_text("{}", encoding="utf-8")
    fails("no weight_map")
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not really")
    fails("pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    fails("not a JSON file")
    (folder / "tokenizer.json").unlink()
    fails("has no tokenizer")
    (folder / "config.json").unlink()
    fails("config.json: cannot be read")
    with pytest.raises(InputError, match="not a folder"):
        import_checkpoint(folder / "config.json", out)
    assert not out.exists()


def test_values_that_do_not_fit(own_checkpoint: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    (folder / "model.safetensors").unlink()
    state = {key: value.clone() for key, value in checkpoints("opt")[1].state_dict().items()}
    state["model.decoder.layers.1.fc1.weight"][3, 5] = 70.0  # times 1024 is too large for F16
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"layers\.1\.fc1\.weight.*--outtype bf16 or f32"):
        import_checkpoint(folder, tmp_path / "out.gguf")
    import_checkpoint(folder, tmp_path / "out.gguf", outtype="f32")
    state["model.decoder.layers.1.fc1.weight"][3, 5] = float("nan")
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"layers\.1\.fc1\.weight.*damaged"):
        import_checkpoint(folder, tmp_path / "other.gguf", outtype="f32")
    assert not (tmp_path / "other.gguf").exists()


def test_where_the_file_may_go(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        import_checkpoint(folder, folder / "model.safetensors")
    with pytest.raises(OutputError):
        import_checkpoint(folder, tmp_path / "no" / "such" / "folder.gguf")
    with pytest.raises(InputError, match="outtype must be one of f32, f16, bf16, got 'q4_0'"):
        import_checkpoint(folder, tmp_path / "out.gguf", outtype="q4_0")


def test_command_line(own_checkpoint: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from agq_gguf.cli.app import app

    folder = own_checkpoint("opt")
    with pytest.raises(SystemExit) as end:
        app(["import-hf", str(folder), str(tmp_path / "out.gguf"), "--outtype", "bf16"])
    assert end.value.code == 0
    out, err = capfd.readouterr()
    assert "mpt, 0." in out
    assert "import: 100%" in err
    change_config(folder, architectures=["Nobody"])
    with pytest.raises(SystemExit) as end:
        app(["import-hf", str(folder), str(tmp_path / "out.gguf")])
    assert end.value.code == 2
    assert "convert_hf_to_gguf.py" in capfd.readouterr().err
