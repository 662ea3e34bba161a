"""Checkpoints of LLaMA, OPT and BLOOM: the GGUF in llama.cpp must say and cut what transformers says and cuts."""

from __future__ import annotations

import itertools
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
    import transformers

import agq_gguf
from agq_gguf.convert import QuantizeOptions, quantize
from agq_gguf.errors import InputError, OutputError
from agq_gguf.evaluate import compare
from agq_gguf.host import Batch, Model, open_llama
from agq_gguf.import_hf import import_checkpoint
from agq_gguf.import_hf.llama import interleave_halves
from agq_gguf.quantizer import MatrixOptions

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
OWN_YARN = {**YARN, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}

# name: (config, tokenizer, bound of the mean KL divergence)
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], float]] = {
    "llama": (lambda: tiny.llama_config(), tiny.llama_tokenizer, 1e-4),
    "llama-tied-biases": (
        lambda: tiny.llama_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        tiny.llama_tokenizer,
        1e-4,
    ),
    "llama3": (
        lambda: tiny.llama_config(
            rope_scaling={**LLAMA3_ROPE, "original_max_position_embeddings": 64}, rope_theta=5e5, head_dim=64
        ),
        tiny.llama3_tokenizer,
        1e-4,
    ),
    "linear": (
        lambda: tiny.llama_config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
        tiny.llama3_tokenizer,
        1e-4,
    ),
    "yarn": (lambda: tiny.llama_config(rope_scaling=YARN, head_dim=64), tiny.llama3_tokenizer, 1e-4),
    "own-yarn": (lambda: tiny.llama_config(rope_scaling=OWN_YARN), tiny.llama3_tokenizer, 1e-4),
    "mistral": (
        lambda: transformers.MistralConfig(
            **tiny.SIZES, intermediate_size=256, num_key_value_heads=2, max_position_embeddings=256, sliding_window=None
        ),
        tiny.llama_tokenizer,
        1e-4,
    ),
    "opt": (lambda: tiny.opt_config(), tiny.opt_tokenizer, 1e-3),
    "opt-no-bias": (lambda: tiny.opt_config(enable_bias=False), tiny.opt_tokenizer, 1e-3),
    "bloom": (lambda: tiny.bloom_config(), tiny.bloom_tokenizer, 1e-4),
    "bloom-12-heads": (lambda: tiny.bloom_config(hidden_size=384, n_head=12), tiny.bloom_tokenizer, 1e-4),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Any]]:
    """Name of a case -> folder, model, tokenizer; made once, not to be changed."""
    made: dict[str, tuple[Path, Any, Any]] = {}

    def make(name: str) -> tuple[Path, Any, Any]:
        if name not in made:
            config, tokenizer, _ = CASES[name]
            folder, cut = tmp_path_factory.mktemp(name), tokenizer()
            made[name] = (folder, tiny.write(folder, config(), cut), cut)
        return made[name]

    return make


@pytest.fixture
def copy(checkpoints: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Name of a case -> a folder of one's own."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(checkpoints(name)[0], tmp_path / "checkpoint"))

    return make


def logits_of(path: Path, tokens: np.ndarray) -> np.ndarray:
    with Model(path) as model, model.context(len(tokens), threads=1) as context:
        batch = Batch(tokens, first_logits=0)
        context.decode(batch)
        return context.logits(batch).copy()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].float().numpy()
    return found


def greedy(next_logits: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, n: int) -> tuple[list[int], float]:
    """The n likeliest tokens one after the other, and by how much the closest of these choices was made."""
    margins = []
    for _ in range(n):
        last = next_logits(tokens)[-1]
        second, first = np.argsort(last)[-2:]
        margins.append(last[first] - last[second])
        tokens = np.append(tokens, np.int32(first))
    return [int(token) for token in tokens[-n:]], float(min(margins))


def clear_text(model: Any, n_tokens: int) -> tuple[np.ndarray, list[int]]:
    """A text and its continuation of 8 tokens by transformers, none of which is a matter of rounding."""
    for seed in range(100):
        start = np.random.default_rng(seed).integers(8, n_tokens, 24).astype(np.int32)
        told, margin = greedy(lambda t: torch_logits(model, t), start, 8)
        if margin > 0.1:
            return start, told
    raise AssertionError("no text with clear choices")


# what is computed


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text_equal_transformers(name: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, model, tokenizer = checkpoints(name)
    bound = CASES[name][2]
    tokens = np.random.default_rng(5).integers(8, len(tokenizer), 96).astype(np.int32)
    wanted = torch_logits(model, tokens)
    start, told = clear_text(model, len(tokenizer))
    for outtype in ("f16", "f32"):
        path = tmp_path / f"{outtype}.gguf"
        report = import_checkpoint(folder, path, outtype=outtype)
        assert report.n_parameters >= sum(p.numel() for p in set(model.parameters())) - 2 * 128  # OPT: two positions
        scored = compare(wanted, logits_of(path, tokens), tokens)
        assert scored[:, 2].mean() < bound, (outtype, scored[:, 2].mean())
        assert greedy(lambda t, path=path: logits_of(path, t), start, 8)[0] == told  # type: ignore[misc]


def test_half_precision_checkpoint_and_outtypes(copy: Any, tmp_path: Path) -> None:
    folder = copy("llama")
    half = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    import_checkpoint(folder, tmp_path / "bf16.gguf", outtype="bf16")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "bf16.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    # Bit for bit the weights of the checkpoint.
    stored = torch.from_numpy(tensors["blk.0.ffn_up.weight"].data.view(np.int16).copy()).view(torch.bfloat16)
    assert torch.equal(stored, half.model.layers[0].mlp.up_proj.weight)


def pruned_logits(path: Path, tokens: np.ndarray, prune: str) -> tuple[np.ndarray, int]:
    """Logits of the last token of a prompt, and how many of its tokens were dropped on the way."""
    with agq_gguf.options(prune=prune), Model(path) as model, model.context(len(tokens), threads=1) as context:
        batch = Batch(tokens)
        context.decode(batch)
        dropped = sum(layer >= 0 for layer in agq_gguf.last_pruned()) if prune != "off" else 0
        return context.logits(batch)[0].copy(), dropped


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_then_quantize_prune_and_generate(name: str, checkpoints: Any, tmp_path: Path, words_file: Path) -> None:
    folder, _, _ = checkpoints(name)
    import_checkpoint(folder, tmp_path / "f16.gguf")
    options = QuantizeOptions(threads=1, calibration_tokens=512, matrix=MatrixOptions(learn_codebook=False))
    report = quantize(tmp_path / "f16.gguf", tmp_path / "agq4.gguf", calibration=words_file, options=options)
    kinds = report.by_type()
    assert kinds["agq4"][0] == (14 if name == "llama" else 8)
    assert not report.warnings or "calibrated on" in report.warnings[0]
    tokens = np.random.default_rng(3).integers(8, 400, 100).astype(np.int32)
    wanted, found = logits_of(tmp_path / "f16.gguf", tokens), logits_of(tmp_path / "agq4.gguf", tokens)
    # Random weights are the hardest to quantize: 4 bits leave an error of some 8% in each of their products.
    assert 0.01 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.35
    whole, _ = pruned_logits(tmp_path / "agq4.gguf", tokens, "off")
    masked, _ = pruned_logits(tmp_path / "agq4.gguf", tokens, "mask,0:0.3")
    pruned, dropped = pruned_logits(tmp_path / "agq4.gguf", tokens, "0:0.3")
    assert dropped == 30
    assert np.linalg.norm(pruned - masked) < 1e-3 * np.linalg.norm(whole) < np.linalg.norm(pruned - whole)
    llama = open_llama(tmp_path / "agq4.gguf", threads=1)
    said = list(itertools.islice(llama.generate(llama.tokenize(b"The king went to"), temp=0), 8))
    llama.close()
    assert len(said) == 8
    assert max(said) < 576


# trained checkpoints, as they lie in tests/data

TRAINED = sorted(path.parent for path in (Path(__file__).parent / "data").glob("*/config.json"))
STORIES = Path(agq_gguf.__file__).parent / "data"


@pytest.mark.parametrize("folder", TRAINED, ids=lambda folder: folder.name)
def test_trained_checkpoints(folder: Path, tmp_path: Path) -> None:
    report = import_checkpoint(folder, tmp_path / "f16.gguf")
    assert report.warnings == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (STORIES / "evaluation.txt").read_text(encoding="utf-8")[:2500]
    with Model(tmp_path / "f16.gguf") as host:
        for piece in [*tiny.NASTY, text]:
            assert host.tokenize(piece, parse_special=True).tolist() == tokenizer(piece).input_ids, piece
        tokens = host.tokenize(text)[:250]
    wanted = torch_logits(model, tokens)
    scored = compare(wanted[:-1], logits_of(tmp_path / "f16.gguf", tokens)[:-1], tokens[1:])
    assert scored[:, 2].mean() < (1e-3 if report.architecture == "mpt" else 1e-4)
    told, margin = greedy(lambda t: torch_logits(model, t), tokens[:60], 12)
    assert margin > 1e-3
    assert greedy(lambda t: logits_of(tmp_path / "f16.gguf", t), tokens[:60], 12)[0] == told

    plain = MatrixOptions(learn_codebook=False)
    options = QuantizeOptions(threads=1, calibration_tokens=4096, context=256, matrix=plain)
    quantize(tmp_path / "f16.gguf", tmp_path / "agq4.gguf", calibration=STORIES / "calibration.txt", options=options)
    exact, quantized = (logits_of(tmp_path / f"{name}.gguf", tokens)[:-1] for name in ("f16", "agq4"))
    scored = compare(exact, quantized, tokens[1:])
    assert scored[:, 2].mean() < 0.05
    assert scored[:, 1].mean() < scored[:, 0].mean() + 0.05  # nats per token
    whole, _ = pruned_logits(tmp_path / "agq4.gguf", tokens, "off")
    pruned, dropped = pruned_logits(tmp_path / "agq4.gguf", tokens, "1:0.3")
    assert dropped == 75
    assert compare(whole[None], pruned[None], tokens[:1])[0, 2] < 0.5
    llama = open_llama(tmp_path / "agq4.gguf", threads=1)
    said = list(itertools.islice(llama.generate(tokens[:60].tolist(), temp=0), 12))
    llama.close()
    assert said[0] in np.argsort(quantized[59])[-2:]


# how text is cut


@pytest.mark.parametrize("name", ["llama", "llama3", "opt", "bloom"])
def test_tokens_equal_transformers(name: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, _, _ = checkpoints(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if name != "llama" else checkpoints(name)[2]
    report = import_checkpoint(folder, tmp_path / "out.gguf")
    assert report.warnings == []
    special = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    texts = tiny.NASTY + [f"in {s} text{s}{s} x" for s in special] + [f"{special[0]}first", f"last{special[-1]}"]
    texts.append("a lazyCat, lazyCats")  # a token of llama3 that no merges lead to
    with Model(tmp_path / "out.gguf", vocab_only=True) as model:
        for text in texts:
            assert model.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


@pytest.mark.parametrize(("name", "prefix"), [("llama", "<s>"), ("llama3", "<|begin_of_text|>"), ("opt", "</s>")])
def test_special_tokens_and_chat_template(name: str, prefix: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, _, tokenizer = checkpoints(name)
    import_checkpoint(folder, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")

    def value(key: str) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        return field.contents() if field else None

    tokens = value("ggml.tokens")
    assert tokens[value("ggml.bos_token_id")] == prefix
    assert tokens[value("ggml.eos_token_id")] == tokenizer.eos_token
    assert value("ggml.add_bos_token") is True
    assert value("ggml.add_eos_token") is False
    assert value("chat_template") == (None if name == "opt" else tiny.CHAT)
    kinds = value("ggml.token_type")
    assert kinds[tokens.index(prefix)] == gguf.TokenType.CONTROL
    assert tokens[-1].startswith("[PAD")
    assert kinds[-1] == gguf.TokenType.UNUSED
    if name == "llama3":
        assert kinds[tokens.index("<tool>")] == gguf.TokenType.USER_DEFINED


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_told(legacy: bool, tmp_path: Path) -> None:
    """LlamaTokenizer of transformers 5 adds no space to a text that begins with one; llama.cpp does."""
    tokenizer = tiny.llama_tokenizer(published=False, legacy=legacy)
    tiny.write(tmp_path / "in", tiny.llama_config(), tokenizer)
    report = import_checkpoint(tmp_path / "in", tmp_path / "out.gguf")
    assert any("begins with a space" in warning for warning in report.warnings)
    assert any("' leading and trailing '" in warning for warning in report.warnings)
    with Model(tmp_path / "out.gguf", vocab_only=True) as model:
        for text in tiny.NASTY:
            if not text.startswith(" "):
                assert model.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


def test_sentencepiece_file_alone(copy: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder = copy("llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    report = import_checkpoint(folder, tmp_path / "out.gguf")
    assert report.warnings == []
    tokenizer = checkpoints("llama")[2]
    with Model(tmp_path / "out.gguf", vocab_only=True) as model:
        for text in [*tiny.NASTY, "<s> in text </s>"]:
            assert model.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


def test_vocabulary_and_merges_alone(copy: Any, checkpoints: Any, tmp_path: Path) -> None:
    """As the checkpoints of OPT come: no tokenizer.json."""
    folder = copy("opt")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert import_checkpoint(folder, tmp_path / "out.gguf").warnings == []
    tokenizer = checkpoints("opt")[2]
    with Model(tmp_path / "out.gguf", vocab_only=True) as host:
        for text in [*tiny.NASTY, "in </s> text<pad>"]:
            assert host.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


# files


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("layout", ["parts", "bin", "bin-parts", "old-bin"])
def test_every_layout_gives_the_same_file(layout: str, copy: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder, model, _ = copy("bloom"), checkpoints("bloom")[1], None
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


def test_links_as_in_the_cache_of_huggingface_hub(copy: Any, tmp_path: Path) -> None:
    folder = copy("opt")
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


def test_pickles_run_no_code_unless_allowed(copy: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder, trace = copy("opt"), tmp_path / "was-here"
    (folder / "model.safetensors").unlink()
    state = {**checkpoints("opt")[1].state_dict(), "extra": _Payload(trace)}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*--allow-pickle"):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert not trace.exists()
    import_checkpoint(folder, tmp_path / "out.gguf", allow_pickle=True)
    assert trace.exists()


def test_a_plain_pickle_is_refused(copy: Any, tmp_path: Path) -> None:
    folder, trace = copy("opt"), tmp_path / "was-here"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(trace)))
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:\\x", "a\\b", 7])
def test_an_index_may_not_leave_the_folder(name: Any, copy: Any, tmp_path: Path) -> None:
    folder = copy("opt")
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
        ("opt", {"architectures": "remove"}, "not named"),
        ("opt", {"architectures": [{}]}, "not named"),
        ("opt", {"do_layer_norm_before": False}, r"do_layer_norm_before.*350m"),
        ("opt", {"word_embed_proj_dim": 64}, r"word_embed_proj_dim.*350m"),
        ("opt", {"activation_function": "gelu"}, "activation_function"),
        ("opt", {"max_position_embeddings": 100}, r"embed_positions.*\[258, 128\].*\[102, 128\]"),
        ("opt", {"num_hidden_layers": 3}, r"tensors are missing, first layers\.2"),
        ("opt", {"num_hidden_layers": 1}, r"tensors are not part.*layers\.1"),
        ("opt", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("opt", {"num_attention_heads": 5}, "5 heads"),
        ("opt", {"hidden_size": "big"}, "hidden_size is 'big'"),
        ("opt", {"hidden_size": True}, "hidden_size is True"),
        ("opt", {"hidden_size": "remove"}, "has no hidden_size"),
        ("opt", {"tie_word_embeddings": False}, "lm_head"),
        ("opt", {"enable_bias": False}, "not part"),
        ("opt", {"quantization_config": {"quant_method": "gptq"}}, "already quantized .gptq."),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("bloom", {"layer_norm_epsilon": -1}, "layer_norm_epsilon"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"num_key_value_heads": 3}, "3 key/value heads"),
        ("llama", {"head_dim": 33}, "33 channels"),
        ("llama", {"vocab_size": 500}, r"embed_tokens.*\[576, 128\]"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "has no factor"),
        ("llama", {"rope_parameters": [1]}, "rope_scaling"),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 9.0}}, "original_max"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_named(
    name: str, changes: dict[str, Any], message: str, copy: Any, tmp_path: Path
) -> None:
    folder, out = copy(name), tmp_path / "out.gguf"
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
        ("opt", lambda t: t.update(pre_tokenizer=None), "rule that is not known"),
        ("opt", lambda t: t.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        ("opt", lambda t: t["model"].update(type="WordPiece"), "WordPiece"),
        ("opt", lambda t: t["model"].update(dropout=0.1), "dropout"),
        ("opt", lambda t: t.update(model=3), "not a tokenizer"),
        ("opt", lambda t: t["model"].update(vocab=[["a", 0]]), "only BPE"),
        ("opt", lambda t: t["model"]["vocab"].update(new=-4), "number -4"),
        ("opt", lambda t: t["model"]["vocab"].update(new="7"), "number '7'"),
        ("opt", lambda t: t["model"].update(merges=[]), "no merges"),
        ("opt", lambda t: t["model"].update(merges=[3]), "not a tokenizer"),
        ("opt", lambda t: t["added_tokens"].append({"id": 570, "content": "a", "special": True}), "same text 'a'"),
        ("opt", lambda t: t["added_tokens"].append({"content": "a"}), "not a tokenizer"),
        ("opt", lambda t: t.update(pre_tokenizer=nested(400)), "rule that is not known"),
        ("llama", lambda t: t["model"]["vocab"].pop("<0x41>"), "255 of the 256 byte tokens"),
        ("llama", lambda t: t.update(normalizer={"type": "NFKC"}), "NFKC"),
        ("llama", lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    ],
)
def test_tokenizers_that_cannot_be_imported(
    name: str, edit: Callable[[dict[str, Any]], None], message: str, copy: Any, tmp_path: Path
) -> None:
    folder = copy(name)
    edit_tokenizer(folder, edit)
    with pytest.raises(InputError, match=message):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_more_tokens_than_the_model_has_are_left_out(copy: Any, tmp_path: Path) -> None:
    folder = copy("opt")
    edit_tokenizer(folder, lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 600, "content": "<far>"}))
    report = import_checkpoint(folder, tmp_path / "out.gguf")
    assert "left out 1 tokens" in report.warnings[0]
    assert len(gguf.GGUFReader(tmp_path / "out.gguf").get_field("tokenizer.ggml.tokens").contents()) == 576


def test_missing_and_damaged_files(copy: Any, tmp_path: Path) -> None:
    folder, out = copy("opt"), tmp_path / "out.gguf"

    def fails(message: str) -> None:
        with pytest.raises(InputError, match=message):
            import_checkpoint(folder, out)

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    fails("not a readable safetensors file")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    fails("not a readable safetensors file")
    (folder / "model.safetensors").unlink()
    fails("holds no weights")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}), encoding="utf-8")
    fails("1 of 1 files are missing")
    index.write_text("[]", encoding="utf-8")
    fails("no JSON object")
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


def test_values_that_do_not_fit(copy: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder = copy("opt")
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


def test_where_the_file_may_go(copy: Any, tmp_path: Path) -> None:
    folder = copy("opt")
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        import_checkpoint(folder, folder / "model.safetensors")
    with pytest.raises(OutputError):
        import_checkpoint(folder, tmp_path / "no" / "such" / "folder.gguf")
    with pytest.raises(InputError, match="unknown type"):
        import_checkpoint(folder, tmp_path / "out.gguf", outtype="q4_0")


def test_command_line(copy: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from agq_gguf.cli import app

    folder = copy("opt")
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


# the pieces


def test_interleaving_is_what_llama_cpp_rotates() -> None:
    """Row 2i of a head is row i of the checkpoint, row 2i + 1 row i + half."""
    rows = torch.arange(16)[:, None]
    assert interleave_halves(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
