"""The quality `best` and its parts: graph, token weights, sequential quantization, tuning, journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_architectures
import tiny_models
import torch
from torch.nn import functional

from agq_gguf.calibration.collect import Calibrator
from agq_gguf.errors import InputError, OutputError
from agq_gguf.format import blocks, reference
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.graphs import batches
from agq_gguf.graphs.llama import LlamaGraph
from agq_gguf.graphs.registry import graph_of as open_graph
from agq_gguf.graphs.registry import why_not
from agq_gguf.logits import compare
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import QuantizedMatrix, prepare_input, quantize_matrix
from agq_gguf.matrix.simulate import Rounder, restored
from agq_gguf.quantization import pipeline, resume
from agq_gguf.quantization.best import sequential, tune
from agq_gguf.quantization.best.fisher import Sensitivity, affordable, measure
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize

BEST = QuantizeOptions(quality="best", threads=1, context=64, calibration_tokens=1024)
MODELS = {
    "llama": {},
    "tied": {"tied": True, "n_layer": 1},
    "qwen2": {"arch": "qwen2"},
    "wide head": {"n_head": 2, "n_kv": 1},
}


Opener = Callable[..., LlamaGraph]


@pytest.fixture
def graph_of() -> Iterator[Opener]:
    """Opens graphs, whose files are closed after the test."""
    with ExitStack() as stack:
        yield lambda path, cache=1 << 30: open_graph(stack.enter_context(open_gguf(path)), cache)


def run_graph(graph: LlamaGraph, tokens: torch.Tensor) -> torch.Tensor:
    x = graph.embed(tokens)
    for layer in range(graph.shape.n_layer):
        x = graph.block(layer, x, graph.linear)
    return graph.logits(x)


def some_tokens(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, 500, (n, length), generator=torch.Generator().manual_seed(seed))


# the graph


OTHERS: dict[str, Callable[[Path], Path]] = {
    "bloom": partial(tiny_models.write_bloom, dtype="f32"),
    "bloom of 6 heads": partial(tiny_models.write_bloom, dtype="f32", n_embd=384, n_head=6, n_layer=1),
    "mpt as OPT": tiny_architectures.write_mpt,
}


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_graph_gives_the_logits_of_llama_cpp(graph_of: Opener, name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if name in OTHERS:
        OTHERS[name](path)
    else:
        tiny_models.write_llama(path, dtype="f32", **MODELS[name])
    with open_gguf(path) as reader:
        assert why_not(reader) == ""
        shape = reader.tensors["blk.0.attn_output.weight"].shape
    tokens = some_tokens(1, 48)[0].numpy().astype(np.int32)
    with Calibrator.open(path, ["a" * 200], {"blk.0.attn_output.weight": shape}, context=64, threads=1) as calibrator:
        theirs = calibrator.logits(tokens)
    ours = run_graph(graph_of(path), torch.from_numpy(tokens.astype(np.int64))[None])[0].numpy()
    assert compare(theirs, ours, tokens)[:, 2].max() < 1e-4


def test_graph_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    cases = {
        "architecture gpt2": tiny_models.write_gpt2(tmp_path / "gpt2.gguf"),
        "ffn_gate_inp.weight is not supported": tiny_models.write_llama(
            tmp_path / "moe.gguf", n_expert=4, n_expert_used=2
        ),
    }
    for expected, path in cases.items():
        with open_gguf(path) as reader:
            assert expected in why_not(reader)


def test_a_small_cache_changes_nothing(graph_of: Opener, llama_f16: Path) -> None:
    tokens = some_tokens(1, 20)
    small = graph_of(llama_f16, 70_000)
    assert torch.equal(run_graph(small, tokens), run_graph(graph_of(llama_f16), tokens))
    assert sum(t.nbytes for t in small._cache.values()) <= 70_000


# token weights


def test_sensitivity_is_kept(
    graph_of: Opener, llama_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run goes on behind the last batches it kept, with the same sums."""
    batches, names = [some_tokens(1, 12, seed) for seed in range(5)], {"blk.0.attn_q", "blk.1.ffn_down"}
    monkeypatch.setattr("agq_gguf.quantization.best.fisher._KEPT_BATCHES", 2)
    whole = measure(graph_of(llama_f16), batches, names, resume.Journal(None), lambda done: None)
    steps: list[int] = []

    def stop(done: int) -> None:
        steps.append(done)
        if done == 36:
            raise Stop

    with pytest.raises(Stop):
        measure(graph_of(llama_f16), batches, names, resume.Journal(tmp_path / "kept"), stop)
    again = measure(graph_of(llama_f16), batches, names, resume.Journal(tmp_path / "kept"), steps.append)
    assert steps == [0, 12, 24, 36, 24, 36, 48, 60]
    steps.clear()
    finished = measure(graph_of(llama_f16), batches, names, resume.Journal(tmp_path / "kept"), steps.append)
    assert steps == [60]
    for found in (again, finished):
        assert set(found.grams) == names and set(found.tokens) == set(whole.tokens)
        assert all(torch.equal(found.grams[name], whole.grams[name]) for name in names)
        for layer, stage in whole.tokens:
            weights, expected = found.weights(layer, stage), whole.weights(layer, stage)
            assert weights is not None and expected is not None and torch.equal(weights, expected)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_sensitivity_is_of_gradients(arch: str, graph_of: Opener, llama_f16: Path, tmp_path: Path) -> None:
    """Against autograd through the whole graph at once."""
    path = llama_f16 if arch == "llama" else tiny_models.write_bloom(tmp_path / "m.gguf")
    graph, tokens = graph_of(path), some_tokens(2, 24)
    names = [f"blk.{layer}.{name}" for layer in range(2) for stage in graph.stages for name in stage]
    found = measure(graph, [tokens], set(names[:-1]), resume.Journal(None), lambda done: None, seed=5)
    made: dict[str, torch.Tensor] = {}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        made[name] = functional.linear(x, graph.tensor(f"{name}.weight").clone().requires_grad_())
        made[name].retain_grad()
        return made[name]

    x = graph.embed(tokens)
    for layer in range(graph.shape.n_layer):
        x = graph.block(layer, x, linear)
    scores = functional.log_softmax(graph.logits(x), -1).flatten(0, 1)
    drawn = torch.multinomial(scores.detach().exp(), 1, generator=torch.Generator().manual_seed(5))
    (-scores.gather(1, drawn).sum()).backward()
    gradients = {name: product.grad.flatten(0, 1) for name, product in made.items() if product.grad is not None}
    assert set(found.tokens) == {(layer, stage) for layer in range(2) for stage in range(4)}
    for layer, stage in found.tokens:
        square = sum(gradients[f"blk.{layer}.{name}"].square().sum(-1) for name in graph.stages[stage])
        assert isinstance(square, torch.Tensor)
        root = square.sqrt()
        expected = 0.8 * square / square.mean() + 0.2 if stage == 0 else root / root.mean()
        weights = found.weights(layer, stage)
        assert weights is not None
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    assert set(found.grams) == set(names[:-1])
    for name, gram in found.grams.items():
        expected = gradients[name].T @ gradients[name]
        torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_grams_within_memory() -> None:
    rows = {"up": 30, "q": 20, "k": 10}
    assert affordable(rows, 4 * 1400) == {"up", "q", "k"}
    assert affordable(rows, 4 * 1399) == {"q", "k"}
    assert affordable(rows, 0) == set()


def test_too_little_memory_for_grams_is_told(llama_f16: Path, words: str, tmp_path: Path) -> None:
    options = QuantizeOptions(quality="best", threads=1, context=64, calibration_tokens=256, memory=600_000, tune=False)
    report = quantize(llama_f16, tmp_path / "out.gguf", calibration=[words], options=options)
    assert any("do not compensate for each other's errors" in warning for warning in report.warnings)


def test_grams_of_levelled_rows(graph_of: Opener, llama_f16: Path) -> None:
    """Rows that are multiplied by something have gradients that are divided by it."""
    graph = graph_of(llama_f16)
    names = {name for name in graph._reader.tensors if name.startswith("blk.") and "norm" not in name}
    rows = len(graph.tensor("blk.0.ffn_up.weight"))
    gradients = torch.randn(40, rows, generator=torch.Generator().manual_seed(1))
    known = Sensitivity(grams={"blk.0.ffn_up": gradients.T @ gradients, "blk.0.ffn_gate": torch.eye(rows)})
    run = sequential.Sequential(graph, [some_tokens(1, 8)], names, known, MatrixOptions())
    factors = (run._levelled(0)["blk.0.ffn_up.weight"] / graph.tensor("blk.0.ffn_up.weight")).nanmedian(1).values
    assert factors.std() > 0.01
    found = run._take_gram("blk.0.ffn_up")
    assert found is not None
    torch.testing.assert_close(found, (gradients / factors).T @ (gradients / factors), rtol=1e-4, atol=1e-3)
    assert torch.equal(run._take_gram("blk.0.ffn_gate"), torch.eye(rows)) and run._take_gram("blk.0.attn_q") is None


# what the runtime does, simulated


@pytest.mark.parametrize(("bits", "scale"), [(8, "token"), (8, "group"), (8, "rotated"), (4, "token"), (4, "rotated")])
def test_simulation_is_the_reference(bits: int, scale: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(9, 256)).astype(np.float32) * np.exp(rng.normal(size=256)).astype(np.float32)
    x[4] = 0
    options = MatrixOptions(activation_bits=bits, activation_scale=scale)
    from agq_gguf.calibration.stats import InputStats

    stats = InputStats(9, np.square(x).mean(0), np.abs(x).max(0), x)
    prepared = prepare_input(stats, 256, 100, options)
    matrix = quantize_matrix(rng.normal(size=(64, 256)).astype(np.float32), prepared, options).matrix
    assert scale != "token" or matrix.parameters.listed.size  # else the order would not be tried
    rounder = Rounder(matrix.parameters, 256)
    found = functional.linear(rounder(torch.from_numpy(x)), restored(matrix, rounder)).numpy()
    wanted = reference.matmul_reference(x, matrix)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


# sequential quantization


def final_error(graph: LlamaGraph, tokens: torch.Tensor, matrices: dict, norms: dict[str, torch.Tensor]) -> float:
    rounders = {n: Rounder(m.matrix.parameters, m.matrix.codes.shape[1]) for n, m in matrices.items()}
    weights = {n: restored(m.matrix, rounders[n]) for n, m in matrices.items()}
    exact = approximate = graph.embed(tokens)
    for layer in range(graph.shape.n_layer):
        exact = graph.block(layer, exact, graph.linear)
        with graph.replacing(norms):
            approximate = graph.block(
                layer,
                approximate,
                lambda name, x: functional.linear(rounders[f"{name}.weight"](x), weights[f"{name}.weight"]),
            )
    return float((exact - approximate).square().mean() / exact.square().mean())


@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (4, 2), (4, 1)])
def test_levelled_matrices_are_the_same_function(graph_of: Opener, tmp_path: Path, n_head: int, n_kv: int) -> None:
    graph = graph_of(tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1, n_head=n_head, n_kv=n_kv))
    rng = torch.Generator().manual_seed(1)
    for name in ("attn_output", "ffn_down"):  # columns that are not alike, one of them zero
        weight = graph.tensor(f"blk.0.{name}.weight")
        weight *= torch.randn(weight.shape[1], generator=rng).exp()
        weight[:, 5] = 0
    tokens = some_tokens(2, 24)
    expected = run_graph(graph, tokens)
    names = {name for name in graph._reader.tensors if name.startswith("blk.") and "norm" not in name}
    run = sequential.Sequential(graph, [tokens], names, Sensitivity(), MatrixOptions())
    levelled = run._levelled(0)
    assert set(levelled) == {f"blk.0.{name}.weight" for name in ("attn_v", "attn_output", "ffn_up", "ffn_down")}
    with graph.replacing(levelled):
        found = run_graph(graph, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for name in ("attn_output", "ffn_down"):
        size = levelled[f"blk.0.{name}.weight"].square().mean(0)
        size = size.view(n_kv, n_head // n_kv, -1).mean(1).flatten() if name == "attn_output" else size
        torch.testing.assert_close(size[size > 0], size[size > 0].mean().expand_as(size[size > 0]), rtol=1e-3, atol=0)


def test_a_bias_of_v_keeps_its_matrices(graph_of: Opener, tmp_path: Path) -> None:
    graph = graph_of(tiny_models.write_llama(tmp_path / "m.gguf", arch="qwen2", n_layer=1))
    names = {name for name in graph._reader.tensors if name.startswith("blk.")}
    run = sequential.Sequential(graph, [some_tokens(1, 8)], names, Sensitivity(), MatrixOptions())
    assert set(run._levelled(0)) == {"blk.0.ffn_up.weight", "blk.0.ffn_down.weight"}


def test_taking_errors_back_helps(graph_of: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tiny_models.write_llama(tmp_path / "m.gguf", n_layer=3))
    names = {name for name in graph._reader.tensors if name.startswith("blk.") and "norm" not in name}
    batches, unseen = [some_tokens(8, 128, seed) for seed in range(4)], some_tokens(4, 128, 9)
    errors = []
    for share in (0.0, 0.5):
        monkeypatch.setattr(sequential, "_TAKEN_BACK", share)
        run = sequential.Sequential(graph, batches, names, Sensitivity(), MatrixOptions())
        with torch.no_grad():
            matrices: dict[str, QuantizedMatrix] = {}
            norms = run.run(resume.Journal(None), lambda done, name: None, matrices.__setitem__)
            errors.append(final_error(graph, unseen, matrices, norms))
    assert errors[1] < 0.93 * errors[0] < 0.02


def test_batches() -> None:
    chunks = [np.arange(n, dtype=np.int32) for n in (8, 8, 8, 5, 5, 8)]
    shapes = [tuple(batch.shape) for batch in batches.batches_of(chunks, 16)]
    assert shapes == [(2, 8), (1, 8), (2, 5), (1, 8)]


# tuning


def test_tuning_keeps_only_what_is_better(graph_of: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1))
    names = {name for name in graph._reader.tensors if name.startswith("blk.") and "norm" not in name}
    batches = [some_tokens(4, 64, seed) for seed in range(16)]
    run = sequential.Sequential(graph, batches, names, Sensitivity(), MatrixOptions(error_feedback=False))
    matrices: dict[str, QuantizedMatrix] = {}
    norms = run.run(resume.Journal(None), lambda done, name: None, matrices.__setitem__)
    steps: list[tuple[int, int]] = []

    def tuned_now() -> tune.Tuned:
        return tune.tune(
            graph,
            batches,
            matrices,
            norms,
            embedding=None,
            output=None,
            epochs=4,
            progress=lambda done, total: steps.append((done, total)),
        )

    tuned = tuned_now()
    assert tuned.after < 0.98 * tuned.before and steps[-1] == (56, 56)
    assert set(tuned.matrices) == names and set(tuned.norms) == set(graph.norms)
    for name, result in tuned.matrices.items():
        scales = result.matrix.scales
        assert np.array_equal(scales, blocks.round_scale(scales))
        assert np.array_equal(result.matrix.codes, matrices[name].matrix.codes)
    monkeypatch.setattr(tune, "_RATE", 1.0)
    worse = tuned_now()
    assert worse.after > worse.before and not worse.norms and not worse.matrices


# the whole


def test_best(llama_f16: Path, words: str, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    out = tmp_path / "out.gguf"
    report = quantize(
        llama_f16,
        out,
        calibration=[words],
        options=BEST,
        progress=lambda phase, done, total, what: seen.__setitem__(phase, (done, total)),
    )
    assert all(done == total for done, total in seen.values() if total > 8) and {"sensitivity", "tune"} <= set(seen)
    with open_gguf(out) as made, open_gguf(llama_f16) as source:
        assert made.get("agq.quality") == "best"
        norms = [name for name in source.tensors if "norm" in name]
        changed = [name for name in norms if not np.array_equal(made.read(name), source.read(name))]
        helped = not any("did not help" in warning for warning in report.warnings)
        assert changed == norms if helped else "output_norm.weight" not in changed
    errors = {t.name: t.error for t in report.tensors if t.type_name == "agq4"}
    assert len(errors) == 14 and all(e is not None and 0 < e < 0.006 for e in errors.values())


def test_best_without_tuning(llama_f16: Path, words: str, tmp_path: Path) -> None:
    phases: set[str] = set()
    report = quantize(
        llama_f16,
        tmp_path / "out.gguf",
        calibration=[words],
        options=replace(BEST, tune=False),
        progress=lambda phase, *_: phases.add(phase),
    )
    assert "sensitivity" in phases and "tune" not in phases
    assert not any("tun" in warning for warning in report.warnings)


def test_best_where_it_cannot_be(gpt2_f16: Path, words: str, tmp_path: Path) -> None:
    report = quantize(gpt2_f16, tmp_path / "out.gguf", calibration=[words], options=BEST)
    assert "does not support this model (architecture gpt2" in report.warnings[0]
    assert sum(t.type_name == "agq4" for t in report.tensors) == 8


def test_best_without_trust(llama_f16: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is not llama.cpp's is found out before it guides anything."""
    monkeypatch.setattr("agq_gguf.quantization.best.run._SAME", 0.0)
    report = quantize(llama_f16, tmp_path / "out.gguf", calibration=[words], options=BEST)
    assert "its logits in PyTorch differ from those of llama.cpp" in report.warnings[0]


def test_little_memory_uses_less_text(llama_f16: Path, words: str, tmp_path: Path) -> None:
    options = QuantizeOptions(quality="best", threads=1, context=64, calibration_tokens=1024, memory=3 << 20)
    report = quantize(llama_f16, tmp_path / "out.gguf", calibration=[words], options=options)
    assert any("a larger --memory uses all" in warning for warning in report.warnings)
    assert any("not tuned: tuning needs" in warning for warning in report.warnings)


def test_unknown_quality() -> None:
    with pytest.raises(InputError, match="quality must be one of fast, balanced, best, got 'good'"):
        QuantizeOptions(quality="good")


# journal


def test_journal(tmp_path: Path) -> None:
    folder = tmp_path / ".out.resume"
    first = resume.Journal(folder, "a")
    first.put("x", {"v": np.arange(3)})
    again = resume.Journal(folder, "a")
    kept = again.get("x")
    assert kept is not None and kept["v"].tolist() == [0, 1, 2] and again.get("y") is None
    assert again.has(["x"]) and not again.has(["x", "y"])
    [path] = folder.glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    assert again.get("x") is None  # damaged is as good as missing
    again.put("x", {"v": np.arange(3)})
    assert resume.Journal(folder, "b").get("x") is None  # another model, text or option
    again.close()
    assert not folder.exists()
    nothing = resume.Journal(None)
    nothing.put("x", {"v": 1})
    assert nothing.get("x") is None and not nothing.has(["x"])


def test_journal_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot store the finished parts"):
        resume.Journal(tmp_path / "file" / "folder", "a")


class Stop(Exception):
    pass


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_resume_gives_the_same_file(
    quality: str, llama_f16: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantizeOptions(quality=quality, resume=True, threads=1, context=64, calibration_tokens=512)
    module = sequential if quality == "best" else pipeline
    real, calls = module.quantize_matrix, []

    def counted(weight, prepared, options, name="the matrix", gram=None):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == stop_at:
            raise Stop
        return real(weight, prepared, options, name, gram)

    monkeypatch.setattr(module, "quantize_matrix", counted)
    stop_at = 0
    quantize(llama_f16, tmp_path / "whole.gguf", calibration=[words], options=options)
    assert len(calls) == 14
    calls.clear()
    stop_at = 9
    out = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        quantize(llama_f16, out, calibration=[words], options=options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.gguf.resume", "whole.gguf"]
    begun, stop_at = calls.copy(), 0
    calls.clear()
    quantize(llama_f16, out, calibration=[words], options=options)
    assert len(calls) < 10 and len(set(calls) | set(begun)) == 14
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_other_options_start_again(llama_f16: Path, words: str, tmp_path: Path) -> None:
    with open_gguf(llama_f16) as reader:
        tokens = [np.arange(5, dtype=np.int32)]
        keys = {
            resume.digest(reader, tokens, "a"),
            resume.digest(reader, tokens, "b"),
            resume.digest(reader, [tokens[0] + 1], "a"),
        }
        assert len(keys) == 3 and resume.digest(reader, tokens, "a") in keys
    with open_gguf(tiny_models.write_llama(tmp_path / "other.gguf", seed=1)) as reader:
        assert resume.digest(reader, tokens, "a") not in keys
