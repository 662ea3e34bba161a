"""The quality `best` and its parts: token weights, sequential quantization, tuning, journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import tiny_models
import torch
from executors import matrices_of, opened, pairs_of, some_tokens
from torch.nn import functional

from agq_gguf.calibration.session import Session
from agq_gguf.errors import InputError, OutputError
from agq_gguf.format import blocks, reference
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.graphs import batches, parts, support
from agq_gguf.graphs.losses import drawn
from agq_gguf.graphs.run import Executor, Reading
from agq_gguf.matrix import typed
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import QuantizedMatrix, prepare_input, quantize_matrix
from agq_gguf.matrix.simulate import Rounder, restored
from agq_gguf.measure.embeddings import evaluate_embeddings
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.quantization import resume
from agq_gguf.quantization.best import fisher, sequential, tune
from agq_gguf.quantization.best.fisher import Sensitivity, affordable, measure
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize

BEST = QuantizeOptions(quality="best", threads=1, context=64, calibration_tokens=1024)

Opener = Callable[..., Executor]


@pytest.fixture
def graph_of() -> Iterator[Opener]:
    """Opens graphs for texts of some tokens, whose files are closed after the test."""
    with ExitStack() as stack:
        yield lambda path, length: stack.enter_context(opened(path, length))[0]


def plan_of(run: Executor, names: set[str] | None = None) -> parts.Plan:
    return parts.stages(run.graph, matrices_of(run) if names is None else names)


# token weights


def test_sensitivity_is_kept(
    graph_of: Opener, llama_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run goes on behind the last batches it kept, with the same sums."""
    batches, names = [some_tokens(1, 12, seed) for seed in range(5)], {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"}
    run = graph_of(llama_f16, 12)
    plan, table = plan_of(run), "token_embd.weight"
    monkeypatch.setattr("agq_gguf.quantization.best.fisher._KEPT_BATCHES", 2)

    def measured(journal: resume.Journal, progress: Callable[[int], None]) -> Sensitivity:
        return measure(run, plan, batches, names, journal, progress, tables=[table])

    whole = measured(resume.Journal(None), lambda done: None)
    steps: list[int] = []

    def stop(done: int) -> None:
        steps.append(done)
        if done == 36:
            raise Stop

    with pytest.raises(Stop):
        measured(resume.Journal(tmp_path / "kept"), stop)
    again = measured(resume.Journal(tmp_path / "kept"), steps.append)
    assert steps == [0, 12, 24, 36, 24, 36, 48, 60]
    steps.clear()
    finished = measured(resume.Journal(tmp_path / "kept"), steps.append)
    assert steps == [60]
    for found in (again, finished):
        assert set(found.grams) == names and set(found.rows) == set(whole.rows)
        assert all(torch.equal(found.grams[name], whole.grams[name]) for name in names)
        assert torch.equal(found.squares[table], whole.squares[table])
        for key in whole.rows:
            weights, expected = found.weights([key]), whole.weights([key])
            assert weights is not None and expected is not None and torch.equal(weights, expected)


def test_weights_of_rows_do_not_depend_on_the_order_of_places() -> None:
    """Rounding in the last bit changes which codes are found: then no two versions could be compared."""
    names = ["q", "k", "v"]
    gradients = dict(zip(names, torch.randn(3, 1, 500, 8, generator=torch.Generator().manual_seed(0)), strict=True))
    sums = []
    for order in permutations(names):
        found = Sensitivity()
        adder = fisher._Adder(found, dict.fromkeys(names, "q"), (), ())
        for name in order:
            adder.visit(Reading(0, name, torch.empty(0), None), gradients[name])
        adder.finish()
        [square] = found.rows["q"]
        sums.append(square)
    assert all(torch.equal(square, sums[0]) for square in sums)


@pytest.mark.parametrize("arch", ["llama", "tied", "bloom", "mixtral"])
def test_sensitivity_is_of_gradients(arch: str, graph_of: Opener, llama_f16: Path, tmp_path: Path) -> None:
    """Against autograd through the whole graph at once."""
    writers: dict[str, Callable[[Path], Path]] = {
        "bloom": tiny_models.write_bloom,
        "mixtral": architectures.write_mixtral,
        "tied": partial(tiny_models.write_llama, tied=True),
    }
    run, tokens = graph_of(writers[arch](tmp_path / "m.gguf") if arch in writers else llama_f16, 24), some_tokens(2, 24)
    plan = plan_of(run)
    names = [name for stage in plan.stages for name in stage.weights if "exps" not in name]
    table = "token_embd.weight"
    found = measure(
        run, plan, [tokens], set(names[:-1]), resume.Journal(None), lambda done: None, tables=[table], seed=5
    )
    made: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}

    def follow(place: Reading) -> torch.Tensor:
        if place.given is not None:
            given[place.weight] = place.given.detach().flatten(0, -2)
        y = place.of(run.weight(place.weight).clone().requires_grad_())
        y.retain_grad()
        return made.setdefault(place.weight + " looked up" * (place.given is None), y)

    with run.replacing(readings=follow):
        drawn(run.forward(tokens), True, torch.Generator().manual_seed(5)).backward()
    gradients = {name: product.grad.flatten(0, -2) for name, product in made.items() if product.grad is not None}
    groups = [group for stage in plan.stages for group in parts.groups(run.graph, stage)]
    assert set(found.rows) == {group.key for group in groups}
    for group in groups:
        square = sum(gradients[name].square().sum(-1) for name in group.weights)
        assert isinstance(square, torch.Tensor)
        root = square.sqrt()
        attended = any(x in name for name in group.weights for x in ("attn_k", "attn_v", "attn_qkv"))
        expected = 0.8 * square / square.mean() + 0.2 if attended else root / root.mean()
        weights = found.weights(group.weights)
        assert weights is not None
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    assert set(found.grams) == set(names[:-1])
    for name, gram in [*found.grams.items(), (f"{table} looked up", found.squares[table])]:
        expected = gradients[name].T @ gradients[name]
        if "looked up" in name and arch == "tied":
            rows = given[table] * gradients[table].norm(dim=-1, keepdim=True)
            expected = expected + rows.T @ rows
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


def sequential_of(run: Executor, batches: list[torch.Tensor], known: Sensitivity | None = None, **more: Any) -> Any:
    options = more.pop("options", MatrixOptions())
    pairs = pairs_of(run, matrices_of(run), batches[0])
    types = dict.fromkeys(matrices_of(run), blocks.TYPE_NAME)
    known = known or Sensitivity()
    return sequential.Sequential(run, plan_of(run), types, batches, known, options, pairs=pairs, **more)


def test_grams_of_levelled_rows(graph_of: Opener, llama_f16: Path) -> None:
    """Rows that are multiplied by something have gradients that are divided by it."""
    run = graph_of(llama_f16, 8)
    up, gate = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
    rows = len(run.weight(up))
    gradients = torch.randn(40, rows, generator=torch.Generator().manual_seed(1))
    known = Sensitivity(grams={up: gradients.T @ gradients, gate: torch.eye(rows)})
    done = sequential_of(run, [some_tokens(1, 8)], known)
    done._level(done._plan.stages[2])
    factors = (done._levelled[up] / run.weight(up)).nanmedian(1).values
    assert factors.std() > 0.01
    found = done._take_gram(up)
    assert found is not None
    torch.testing.assert_close(found, (gradients / factors).T @ (gradients / factors), rtol=1e-4, atol=1e-3)
    assert torch.equal(done._take_gram(gate), torch.eye(rows)) and done._take_gram("blk.0.attn_q.weight") is None


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


# where it runs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_told(llama_f16: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="PyTorch finds no CUDA device"):
        quantize(llama_f16, tmp_path / "out.gguf", options=QuantizeOptions(quality="best", device="cuda"))
    with pytest.raises(InputError, match="device must be one of cpu, cuda"):
        QuantizeOptions(device="gpu")


# sequential quantization


def final_error(
    run: Executor, tokens: torch.Tensor, matrices: dict[str, sequential.Matrices], norms: dict[str, torch.Tensor]
) -> float:
    applied = {name: sequential.Applied(made) for name, made in matrices.items()}
    with torch.no_grad():
        exact = run.forward(tokens)
        with run.replacing(norms, lambda place: place.by(applied[place.weight]) if place.weight in applied else None):
            approximate = run.forward(tokens)
    return float((exact - approximate).square().mean() / exact.square().mean())


@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (4, 2), (4, 1)])
def test_levelled_matrices_are_the_same_function(graph_of: Opener, tmp_path: Path, n_head: int, n_kv: int) -> None:
    run = graph_of(tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1, n_head=n_head, n_kv=n_kv), 24)
    rng = torch.Generator().manual_seed(1)
    for name in ("attn_output", "ffn_down"):  # columns that are not alike, one of them zero
        weight = run.weight(f"blk.0.{name}.weight")
        weight *= torch.randn(weight.shape[1], generator=rng).exp()
        weight[:, 5] = 0
    tokens = some_tokens(2, 24)
    done = sequential_of(run, [tokens])
    with torch.no_grad():
        expected = run.forward(tokens)
        for stage in done._plan.stages:
            done._level(stage)
        levelled = done._levelled
        assert set(levelled) == {f"blk.0.{name}.weight" for name in ("attn_v", "attn_output", "ffn_up", "ffn_down")}
        with run.replacing(levelled):
            found = run.forward(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for name in ("attn_output", "ffn_down"):
        size = levelled[f"blk.0.{name}.weight"].square().mean(0)
        size = size.view(n_kv, n_head // n_kv, -1).mean(1).flatten() if name == "attn_output" else size
        torch.testing.assert_close(size[size > 0], size[size > 0].mean().expand_as(size[size > 0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("arch", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_taking_errors_back_helps(arch: str, graph_of: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts: dict[str, Any] = {"n_expert": 4, "n_expert_used": 2} if arch == "mixtral" else {}
    run = graph_of(tiny_models.write_llama(tmp_path / "m.gguf", n_layer=3 if arch == "llama" else 2, **experts), 128)
    batches, unseen = [some_tokens(8, 128, seed) for seed in range(4)], some_tokens(4, 128, 9)
    errors = []
    for share in (0.0, 0.5):
        monkeypatch.setattr(sequential, "_TAKEN_BACK", share)
        matrices: dict[str, sequential.Matrices] = {}
        norms = sequential_of(run, batches).run(resume.Journal(None), lambda *_: None, matrices.__setitem__)
        assert [len(made) for made in matrices.values() if len(made) > 1] == [4] * 6 * bool(experts)
        errors.append(final_error(run, unseen, matrices, norms))
    limit = 0.97 if experts else 0.93
    assert errors[1] < limit * errors[0] < 0.1


def test_batches() -> None:
    chunks = [np.arange(n, dtype=np.int32) for n in (8, 8, 8, 5, 5, 8)]
    shapes = [tuple(batch.shape) for batch in batches.batches_of(chunks, 16)]
    assert shapes == [(2, 8), (1, 8), (2, 5), (1, 8)]


# tuning


def test_tuning_keeps_only_what_is_better(graph_of: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = graph_of(tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1), 64)
    names, trained = matrices_of(run), parts.norms(run.graph)
    batches = [some_tokens(4, 64, seed) for seed in range(16)]
    matrices: dict[str, sequential.Matrices] = {}
    norms = sequential_of(run, batches, options=MatrixOptions(error_feedback=False)).run(
        resume.Journal(None), lambda *_: None, matrices.__setitem__
    )
    steps: list[tuple[int, int]] = []

    def tuned_now() -> tune.Tuned:
        return tune.tune(
            run,
            batches,
            matrices,
            norms,
            trained=trained,
            stored={},
            logits=True,
            epochs=4,
            progress=lambda done, total: steps.append((done, total)),
        )

    tuned = tuned_now()
    assert tuned.after < 0.98 * tuned.before and steps[-1] == (56, 56)
    assert set(tuned.matrices) == names and set(tuned.norms) == set(trained)
    for name, [result] in tuned.matrices.items():
        assert isinstance(result, QuantizedMatrix)
        scales = result.matrix.scales
        assert np.array_equal(scales, blocks.round_scale(scales))
        before = matrices[name][0]
        assert isinstance(before, QuantizedMatrix) and np.array_equal(result.matrix.codes, before.matrix.codes)
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


def test_best_where_it_cannot_be(words: str, tmp_path: Path) -> None:
    source = architectures.write_t5(tmp_path / "t5.gguf")
    report = quantize(source, tmp_path / "out.gguf", calibration=[words], options=BEST)
    assert report.warnings[0].startswith(
        'falling back to quality "balanced": "best" does not support this model (it has'
    )
    assert sum(t.type_name == "agq4" for t in report.tensors) == 36
    with open_gguf(tmp_path / "out.gguf") as made:
        assert made.get("agq.quality") == "balanced"


def test_best_without_trust(llama_f16: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is not llama.cpp's is found out before it guides anything."""
    monkeypatch.setattr(support, "_ROUGH", 0.0)
    monkeypatch.setattr(support, "_TIMES_ROUNDING", 0)
    report = quantize(llama_f16, tmp_path / "out.gguf", calibration=[words], options=BEST)
    assert "its logits in PyTorch differ from those of llama.cpp by" in report.warnings[0]


ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    "gemma3": partial(architectures.write_gemma3, tied=False),  # a tied output is so sure that nothing matters
    "gpt2": tiny_models.write_gpt2,
    "phi3": architectures.write_phi3,
    "mixtral": architectures.write_mixtral,
}


@pytest.mark.parametrize(
    "name", ["gemma3", "mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "phi3"))]
)
def test_best_is_better_than_balanced(name: str, words: str, tmp_path: Path) -> None:
    source = ARCHITECTURES[name](tmp_path / "m.gguf")
    found = {}
    for quality in ("balanced", "best"):
        out = tmp_path / f"{quality}.gguf"
        options = replace(BEST, quality=quality, calibration_tokens=2048, tune=False)
        report = quantize(source, out, calibration=[words], options=options)
        assert not any("falling back" in warning for warning in report.warnings)
        found[quality] = evaluate(out, source, words, context=64, chunks=24, threads=1).mean_kl
    assert found["best"] < 0.9 * found["balanced"]


@pytest.mark.parametrize("name", architectures.EMBEDDERS)
def test_best_of_a_model_that_embeds(name: str, words: str, tmp_path: Path) -> None:
    """Its loss is 1 - cosine of the pooled embedding, or of each token's if the last one stands for the text."""
    source, lost = architectures.EMBEDDERS[name](tmp_path / "m.gguf"), {}
    for quality in ("balanced", "best"):
        out = tmp_path / f"{quality}.gguf"
        options = replace(BEST, quality=quality, calibration_tokens=4096)
        report = quantize(source, out, calibration=[words], options=options)
        assert not any("falling back" in warning for warning in report.warnings)
        lost[quality] = evaluate_embeddings(out, source, words, context=32, chunks=60, threads=1).mean_distance
    assert lost["best"] < 0.85 * lost["balanced"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_tables_are_weighed_by_gradients(tied: bool, words: str, tmp_path: Path) -> None:
    """Embedding and output matrix in AGQ4, or one that is both: rounded where it costs least."""
    llama_f16, found = tmp_path / "m.gguf", {}
    tiny_models.write_llama(llama_f16, tied=tied)
    for quality in ("balanced", "best"):
        out = tmp_path / f"{quality}.gguf"
        options = replace(BEST, quality=quality, calibration_tokens=2048, tune=False)
        options = replace(options, embedding_type="agq4", output_type="agq4")
        report = quantize(llama_f16, out, calibration=[words], options=options)
        assert sum(t.type_name == "agq4" for t in report.tensors) == 16 - tied
        found[quality] = evaluate(out, llama_f16, words, context=64, chunks=24, threads=1).mean_kl
    assert found["best"] < 0.9 * found["balanced"]


def test_chunks_of_one_length(llama_f16: Path, words: str) -> None:
    """The last chunk begins earlier, so that all run in one graph."""
    with Session(llama_f16, [words]) as session:
        plain, equal = session.chunks(100, 100_000), session.chunks(100, 100_000, equal=True)
        assert len(plain[-1]) < 100 and {len(chunk) for chunk in equal} == {100}
        assert all(np.array_equal(a, b) for a, b in zip(plain[:-1], equal[:-1], strict=True))
        assert np.array_equal(plain[-1][1:], equal[-1][-len(plain[-1]) + 1 :])


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
    real, calls = typed.quantize, []

    def counted(weight, prepared, options, name, gram=None):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == stop_at:
            raise Stop
        return real(weight, prepared, options, name, gram)

    monkeypatch.setattr(typed, "quantize", counted)
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


def test_a_run_that_was_interrupted_while_tuning_can_go_on_without_it(
    llama_f16: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantizeOptions(quality="best", resume=True, threads=1, context=64, calibration_tokens=512)
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"

    def stop(*args: object, **more: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(tune, "tune", stop)
        with pytest.raises(Stop):
            quantize(llama_f16, out, calibration=[words], options=options)
    untuned = replace(options, tune=False)
    quantize(llama_f16, whole, calibration=[words], options=untuned)
    monkeypatch.setattr(typed, "quantize", stop)  # nothing is left to quantize
    quantize(llama_f16, out, calibration=[words], options=untuned)
    assert out.read_bytes() == whole.read_bytes()


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
