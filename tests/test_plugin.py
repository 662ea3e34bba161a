"""The plugin inside the stock llama-cpp-python: loading, logits against the reference, all that a chat app does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from llama_runs import LONG_TEXT, TEXT, all_logits, open_llama, relative, run_python
from reference_model import ReferenceModel

import agq_gguf
from agq_gguf.format import blocks
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.log import quiet_log

ALL_AGQ4 = QuantizeOptions(output_type="agq4", embedding_type="agq4", threads=1)
FAST_AGQ4 = replace(ALL_AGQ4, matrix=MatrixOptions(learn_codebook=False))
# llama.cpp rounds what it multiplies with F16 weights to F16, so some activations behind it get another int8 value.
LIMITS = {"narrow_experts": 0.02}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    agq_gguf.register()
    with quiet_log():
        yield


@pytest.fixture(scope="module")
def dense(models: Path) -> Path:
    source = tiny_models.write_llama(models / "plugin-f32.gguf", dtype="f32", n_embd=256, n_ff=384)
    quantize(source, models / "plugin-agq4.gguf", options=ALL_AGQ4)
    return models / "plugin-agq4.gguf"


@pytest.fixture(scope="module")
def experts(models: Path) -> Path:
    source = tiny_models.write_llama(models / "moe-f32.gguf", dtype="f32", n_ff=384, n_expert=4, n_expert_used=2)
    quantize(source, models / "moe-agq4.gguf", options=ALL_AGQ4)
    return models / "moe-agq4.gguf"


@pytest.fixture(scope="module")
def tied(models: Path) -> Path:
    source = tiny_models.write_llama(models / "tied-f32.gguf", dtype="f32", tied=True)
    quantize(source, models / "tied-agq4.gguf", options=ALL_AGQ4)
    return models / "tied-agq4.gguf"


@pytest.fixture(scope="module")
def halves(models: Path) -> Path:
    """Half tiles everywhere (192 and 320 columns); the embedding and the output end in a panel of 5 rows."""
    shape = {"n_embd": 192, "n_ff": 320, "n_head": 3, "n_kv": 1, "vocab": 453}
    source = tiny_models.write_llama(models / "halves-f32.gguf", dtype="f32", **shape)  # type: ignore[arg-type]
    report = quantize(source, models / "halves-agq4.gguf", options=FAST_AGQ4)
    assert {t.type_name for t in report.tensors if "norm" not in t.name} == {"agq4"}
    return models / "halves-agq4.gguf"


@pytest.fixture(scope="module")
def narrow_experts(models: Path) -> Path:
    """Experts whose matrices have a last panel of 8 rows each, and half tiles; ffn_down is F16."""
    shape = {"n_embd": 192, "n_ff": 200, "n_head": 3, "n_kv": 3, "n_expert": 4, "n_expert_used": 2}
    source = tiny_models.write_llama(models / "narrow-f32.gguf", dtype="f32", **shape)  # type: ignore[arg-type]
    report = quantize(source, models / "narrow-agq4.gguf", options=FAST_AGQ4)
    assert {t.type_name for t in report.tensors if "ffn_up_exps" in t.name} == {"agq4"}
    return models / "narrow-agq4.gguf"


# logits


@cache
def reference(path: Path, tokens: tuple[int, ...]) -> np.ndarray:
    """Logits of the independent forward, which takes a second or so."""
    return ReferenceModel(path).logits(list(tokens))


@pytest.mark.parametrize("name", ["dense", "experts", "tied", "halves", "narrow_experts"])
def test_logits_equal_the_reference(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    tokens, logits = all_logits(path)
    assert relative(logits, reference(path, tuple(tokens))) < LIMITS.get(name, 1e-5)


@pytest.mark.parametrize("options", [{}, {"flash_attn": True}, {"n_ubatch": 48}])
@pytest.mark.parametrize("name", ["dense", "experts", "halves", "narrow_experts"])
def test_long_prompts_with_own_attention(name: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    tokens, logits = all_logits(path, LONG_TEXT, **options)
    assert len(tokens) > 100
    wanted = reference(path, tuple(tokens))
    assert relative(logits, wanted) < 0.03
    assert np.mean(logits.argmax(1) == wanted.argmax(1)) > 0.9


LOGITS_OF = """
import sys, numpy, llama_runs, agq_gguf
from pathlib import Path
from agq_gguf.runtime.log import quiet_log
agq_gguf.register()
with quiet_log():
    for path in sys.argv[2:]:
        numpy.save(Path(sys.argv[1]) / Path(path).stem, llama_runs.all_logits(Path(path))[1])
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avxvnni", "avx512vnni"])
def test_every_instruction_set(isa: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    paths = {name: request.getfixturevalue(name) for name in ("experts", "halves", "narrow_experts")}
    result = run_python(LOGITS_OF, tmp_path, *paths.values(), env={"AGQ_FORCE_ISA": isa})
    if "not supported by this CPU" in result.stderr or "not a known kernel" in result.stderr:
        pytest.skip(f"{isa} cannot run here")
    assert result.returncode == 0, result.stderr
    for name, path in paths.items():
        tokens, _ = all_logits(path)
        found = np.load(tmp_path / f"{path.stem}.npy")
        assert relative(found, reference(path, tuple(tokens))) < LIMITS.get(name, 1e-5), name


@pytest.mark.parametrize("name", ["halves", "narrow_experts"])
def test_generation_with_odd_shapes(name: str, request: pytest.FixtureRequest) -> None:
    """Token by token, as generation has it, with what the model itself chose."""
    path = request.getfixturevalue(name)
    llama = open_llama(path, logits_all=True)
    prompt = llama.tokenize(TEXT)
    chosen = [token for token, _ in zip(llama.generate(prompt, temp=0.0), range(12), strict=False)]
    tokens = [*prompt, *chosen]
    llama.reset()
    for token in tokens:
        llama.eval([token])
    logits = np.array(llama.scores[: len(tokens)])
    llama.close()
    wanted = reference(path, tuple(tokens))
    assert relative(logits, wanted) < LIMITS.get(name, 1e-2)  # of many tokens, some have a rounding that is close
    assert np.median(np.linalg.norm(logits - wanted, axis=1)) < LIMITS.get(name, 1e-5) * np.linalg.norm(wanted)
    assert [int(row.argmax()) for row in logits[len(prompt) - 1 : -1]] == chosen


def test_unknown_instruction_set_is_an_error() -> None:
    result = run_python("import agq_gguf; agq_gguf.register()", env={"AGQ_FORCE_ISA": "sse9"})
    assert result.returncode != 0
    assert "HostError" in result.stderr
    assert "'sse9'" in result.stderr
    assert "scalar" in result.stderr


# situations


def test_small_ubatch_mmap_and_threads_change_nothing(dense: Path) -> None:
    _, plain = all_logits(dense)
    for options in ({"n_ubatch": 5}, {"n_batch": 7}, {"use_mmap": False}, {"n_threads": 1, "n_threads_batch": 1}):
        _, other = all_logits(dense, **options)
        assert relative(other, plain) < 1e-5, options


def test_flash_attention(dense: Path) -> None:
    _, plain = all_logits(dense, LONG_TEXT)
    _, flash = all_logits(dense, LONG_TEXT, flash_attn=True)
    # A K/V cache in F16 moves an activation to the next int8 step here and there.
    assert relative(flash, plain) < 0.1
    assert np.mean(flash.argmax(1) == plain.argmax(1)) > 0.7
    _, cached = all_logits(dense, LONG_TEXT, flash_attn=True, type_k=8, type_v=8)
    assert relative(cached, plain) < 0.2


def test_generation_after_the_prompt(dense: Path) -> None:
    """One token at a time gives what the whole text at once gives."""
    tokens, together = all_logits(dense)
    llama = open_llama(dense, logits_all=True)
    llama.eval(tokens[:9])
    for token in tokens[9:]:
        llama.eval([token])
    assert relative(np.array(llama.scores[: len(tokens)]), together) < 1e-5


def test_chat_streaming_and_grammar(dense: Path) -> None:
    from llama_cpp.llama_grammar import LlamaGrammar

    llama = open_llama(dense, chat_format="llama-2")
    messages = [{"role": "user", "content": "who found the key"}]
    whole = llama.create_chat_completion(messages, max_tokens=8, temperature=0)
    text = whole["choices"][0]["message"]["content"]
    parts = llama.create_chat_completion(messages, max_tokens=8, temperature=0, stream=True)
    assert "".join(p["choices"][0]["delta"].get("content") or "" for p in parts) == text
    grammar = LlamaGrammar.from_string('root ::= "red" | "blue"', verbose=False)
    answer = llama.create_completion("the box", max_tokens=8, temperature=0, grammar=grammar)
    assert answer["choices"][0]["text"] in ("red", "blue")


def test_embeddings_of_a_decoder_and_an_encoder(dense: Path, models: Path) -> None:
    from llama_cpp import LLAMA_POOLING_TYPE_MEAN

    llama = open_llama(dense, embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN)
    vectors = [np.array(llama.embed(text)) for text in ("the red key", "the red key", "who went to the house")]
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.allclose(vectors[0], vectors[2])

    source = tiny_models.write_bert(models / "plugin-bert.gguf", dtype="f32")
    report = quantize(source, models / "plugin-bert-agq4.gguf", options=ALL_AGQ4)
    assert report.by_type()["agq4"][0] >= 6
    wanted, found = (
        np.array(open_llama(path, embedding=True).embed("the red key in the box"))
        for path in (source, models / "plugin-bert-agq4.gguf")
    )
    assert wanted @ found / np.linalg.norm(wanted) / np.linalg.norm(found) > 0.95


def test_state_can_be_saved_and_restored(dense: Path) -> None:
    llama = open_llama(dense, logits_all=True)
    tokens = llama.tokenize(TEXT)
    llama.eval(tokens)
    state = llama.save_state()
    llama.eval([5, 6, 7])
    wanted = np.array(llama.scores[len(tokens) : len(tokens) + 3])
    llama.eval([8, 9, 10])
    llama.load_state(state)
    llama.eval([5, 6, 7])
    assert relative(np.array(llama.scores[len(tokens) : len(tokens) + 3]), wanted) < 1e-5


def test_several_models_and_contexts_in_threads(dense: Path, experts: Path, llama_q4: Path) -> None:
    """Contexts of AGQ4 and stock models work at the same time and give what they give alone."""
    from llama_cpp import LLAMA_POOLING_TYPE_NONE  # noqa: F401  llama_cpp is loaded before the threads start

    paths = [dense, experts, dense, llama_q4]
    alone = [all_logits(path)[1] for path in paths]
    together: list[list[np.ndarray]] = [[] for _ in paths]

    def work(i: int) -> None:
        for _ in range(5):
            together[i].append(all_logits(paths[i], n_threads=1, n_threads_batch=1)[1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in enumerate(together):
        assert len(results) == 5
        for logits in results:
            assert relative(logits, alone[i]) < 1e-5


def test_abort_callback_stops_a_prompt_and_leaves_the_context_usable(dense: Path) -> None:
    import llama_cpp

    calls = 0

    @llama_cpp.ggml_abort_callback  # type: ignore[untyped-decorator]
    def abort(_data: object) -> bool:
        nonlocal calls
        calls += 1
        return 5 < calls < 10_000

    llama = open_llama(dense)
    tokens = llama.tokenize(TEXT)
    llama_cpp.llama_set_abort_callback(llama.ctx, abort, None)
    with pytest.raises(RuntimeError):
        llama.eval(tokens)
    assert 5 < calls < 10  # it stopped at the node after the one that asked
    calls = 100_000
    llama.reset()
    llama.eval(tokens)
    again = llama.sample(temp=0)
    other = open_llama(dense)
    other.eval(tokens)
    assert again == other.sample(temp=0)


THREADS_OF = """
import os, sys, llama_runs, agq_gguf
from pathlib import Path
from agq_gguf.runtime.log import quiet_log
agq_gguf.register()
with quiet_log():
    n = int(sys.argv[2])
    before = len(os.listdir("/proc/self/task"))
    llama_runs.all_logits(Path(sys.argv[1]), n_threads=n, n_threads_batch=n)
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_the_thread_count_is_honoured(dense: Path) -> None:
    """OpenMP keeps its threads: a computation on n threads leaves n - 1 behind."""
    for n in (1, 2, 3):
        # Waits that sleep, which other processes on the cores bring about, have threads of their own.
        result = run_python(THREADS_OF, dense, n, env={"OMP_DYNAMIC": "false", "AGQ_WAIT": "spin"})
        assert result.stdout.strip() == str(n - 1), result.stderr


# other architectures


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon", "qwen2"])
def test_other_architectures_run(name: str, models: Path) -> None:
    """Logits stay near those of the source, as far as 4 bits without calibration can be near."""
    source = getattr(tiny_models, f"write_{name}")(models / f"plugin-{name}.gguf", dtype="f32")
    result = models / f"plugin-{name}-agq4.gguf"
    assert quantize(source, result, options=ALL_AGQ4).by_type()["agq4"][0] >= 8
    _, wanted = all_logits(source)
    _, found = all_logits(result)
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.8


# refusal


def test_stock_loader_refuses_the_file_without_the_plugin(dense: Path) -> None:
    result = run_python("import sys, llama_cpp; llama_cpp.Llama(sys.argv[1])", dense)
    assert result.returncode == 1  # an exception, no crash
    assert "Failed to load model" in result.stderr


def test_register_may_be_called_often_and_prints_nothing(dense: Path) -> None:
    code = """
import threading, agq_gguf, llama_cpp
threads = [threading.Thread(target=agq_gguf.register) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
agq_gguf.register()
lib = llama_cpp.llama_cpp._lib
print(lib.ggml_backend_dev_count())
"""
    result = run_python(code)
    assert (result.stdout, result.stderr) == ("2\n", "")  # AGQ and the CPU


def damage(source: Path, target: Path, tensor_name: str, change: Any) -> Path:
    """A copy of the file in which ``change(bytes of one tensor)`` was applied in place."""
    raw = np.fromfile(source, np.uint8)
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == tensor_name)
    data = raw[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
    change(data)
    raw.tofile(target)
    return target


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (48, 0, "the attributes must begin with 164, got 0"),
        (49, 2, "AGQ4 version must be 1 for this plugin, got 2"),
        (50, 0x13, "activation mode"),
        (51, 0x80, "flags"),
        (55, 0xFF, "tensor scale"),
        (56, 0x77, "checksum"),
        (62, 0xFF, "longer than"),
        (60, 1, "bytes for their content, got"),
        (1088 + 48, 127, "checksum"),
    ],
)
def test_damaged_attributes_are_named(offset: int, value: int, message: str, dense: Path, tmp_path: Path) -> None:
    def change(data: np.ndarray) -> None:
        data[offset] = value

    name = "blk.1.ffn_up.weight"
    path = damage(dense, tmp_path / "damaged.gguf", name, change)
    code = "import sys, agq_gguf, llama_cpp; agq_gguf.register(); llama_cpp.Llama(sys.argv[1], n_ctx=64).eval([1, 2])"
    result = run_python(code, path)
    assert result.returncode == 1, result.stderr  # an exception, no crash
    assert "RuntimeError" in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("agq:")]
    assert len(lines) == 1
    assert name in lines[0]
    assert message in lines[0]


def test_random_damage_never_crashes(dense: Path, tmp_path: Path) -> None:
    """Whatever the tensors hold, a context gives logits (perhaps NaN) or an error."""
    code = """
import sys, json, agq_gguf, llama_cpp
from agq_gguf.runtime.log import quiet_log
agq_gguf.register()
outcomes = []
with quiet_log():
    for path in sys.argv[1:]:
        try:
            llama_cpp.Llama(path, n_ctx=64, verbose=False).eval([1, 40, 300])
            outcomes.append("ran")
        except RuntimeError:
            outcomes.append("refused")
print(json.dumps(outcomes))
"""
    rng = np.random.default_rng(1)
    names = [t.name for t in gguf.GGUFReader(dense).tensors if t.tensor_type == blocks.TYPE_ID]
    paths = []
    for i in range(24):
        attributes_only = i % 2 == 0

        def change(data: np.ndarray, attributes_only: bool = attributes_only) -> None:
            tiles = data.reshape(-1, 1088)
            part = tiles[:4, 48:64] if attributes_only else tiles
            hit = rng.random(part.shape) < 0.05
            part[hit] = rng.integers(0, 256, int(hit.sum()))

        paths.append(damage(dense, tmp_path / f"{i}.gguf", str(rng.choice(names)), change))
    result = run_python(code, *paths)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert len(outcomes) == len(paths)
    assert "refused" in outcomes
