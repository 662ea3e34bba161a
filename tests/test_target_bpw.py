"""`--target-bpw`: what each tensor costs in a coarser type, and which ones get more bits; `--act-bits`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from executors import opened
from torch.nn import functional

from agq_gguf.calibration.stats import InputStats
from agq_gguf.errors import InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import Tensor, open_gguf
from agq_gguf.graphs.run import Reading
from agq_gguf.matrix import stock_types
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.quantization.budget import costs, knapsack
from agq_gguf.quantization.options import QuantizeOptions, activation_options
from agq_gguf.quantization.pipeline import plan_file, quantize
from agq_gguf.quantization.type_plan import TensorPlan

QUIET = lambda done, total, name: None  # noqa: E731
BOTH = ("agq4", "q8_0")


# ggml's own types


@pytest.mark.parametrize(("type_name", "most"), [("q6_K", 5e-4), ("q8_0", 5e-5), ("f16", 1e-7)])
def test_rows_come_back(type_name: str, most: float) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    error = np.square(stock_types.rounded(rows, type_name) - rows).sum() / np.square(rows).sum()
    assert most / 20 < error < most


def test_importance_moves_the_error() -> None:
    """q6_K: channels that count get smaller errors than without weights."""
    rows = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    important = np.full(256, 1e-3, np.float32)
    important[:16] = 1.0

    def error(importance: np.ndarray | None) -> float:
        return float(np.square(stock_types.rounded(rows, "q6_K", importance) - rows)[:, :16].sum())

    assert error(important) < 0.95 * error(None)


# the choice


def plans_of(**rows: int) -> list[TensorPlan]:
    return [TensorPlan(Tensor(name, "f16", (n, 256), 0, 512 * n), "agq4", "") for name, n in rows.items()]


def test_the_most_per_byte_comes_first() -> None:
    plans = plans_of(a=128, b=128, c=1280)
    damage_of = {
        "a": {"agq4": 1.0, "q6_K": 0.5, "q8_0": 0.0},
        "b": {"agq4": 3.0, "q6_K": 0.1, "q8_0": 0.0},
        "c": {"agq4": 4.0, "q6_K": 1.0, "q8_0": 0.9},
    }
    least = knapsack.bits_per_weight(plans)
    assert least == pytest.approx(4.25)

    def types(target: float) -> list[str]:
        chosen = knapsack.choose(plans, damage_of, target)
        assert knapsack.bits_per_weight(chosen) <= target
        assert all((plan.reason == "sensitive") == (plan.type_name != "agq4") for plan in chosen)
        return [plan.type_name for plan in chosen]

    assert types(4.25) == ["agq4", "agq4", "agq4"]
    assert types(4.25 + 2.32 / 12) == ["agq4", "q6_K", "agq4"]
    # q6_K is above the line from agq4 to q8_0 for `a`: one step. What is too large for the rest is passed over.
    assert types(4.25 + (2.32 + 4.25) / 12) == ["q8_0", "q6_K", "agq4"]
    assert types(9) == ["q8_0", "q8_0", "q8_0"]
    with pytest.raises(InputError, match=r"must be at least 4\.250 bits per weight for this model, got 4\.2"):
        types(4.2)


def test_a_large_step_may_come_first() -> None:
    """The small steps save more per byte, but leave too little room for the table, and more of the budget unused."""
    plans = plans_of(table=1280, a=128, b=128)
    damage_of = {
        "table": {"agq4": 9.0, "q8_0": 0.0},
        "a": {"agq4": 1.0, "q8_0": 0.0},
        "b": {"agq4": 1.1, "q8_0": 0.0},
    }

    def types(target: float) -> list[str]:
        chosen = knapsack.choose(plans, damage_of, target)
        assert knapsack.bits_per_weight(chosen) <= target
        return [plan.type_name for plan in chosen]

    assert types(4.25 + 4.25 * 11 / 12) == ["q8_0", "agq4", "q8_0"]
    assert types(4.25 + 4.25 * 9 / 12) == ["agq4", "q8_0", "q8_0"]


def test_a_type_that_cannot_hold_the_values_is_not_taken() -> None:
    plans = plans_of(a=128)
    damage_of = {"a": {"agq4": 1.0, "q5_1": float("nan"), "q6_K": float("inf"), "q8_0": 0.5}}
    assert [plan.type_name for plan in knapsack.choose(plans, damage_of, 7)] == ["agq4"]
    assert [plan.type_name for plan in knapsack.choose(plans, damage_of, 9)] == ["q8_0"]


def test_types_that_do_not_fit_are_not_offered() -> None:
    wide, narrow = plans_of(wide=128)[0], TensorPlan(Tensor("narrow", "f16", (128, 128), 0, 1), "agq4", "")
    kept = TensorPlan(Tensor("norm", "f32", (128,), 0, 1), "f32", "one-dimensional")
    found = knapsack.open_types([wide, narrow, kept], {"narrow": True})
    of_wide = ("agq4", "q5_K", "q5_1", "q6_K", "q8_0")
    assert found == {"wide": of_wide, "narrow": ("agq4", "q5_0", "q5_1", "q8_0")}
    assert knapsack.open_types([wide, narrow, kept], {"narrow": False}) == {"wide": of_wide}
    few = knapsack.open_types([wide, narrow], {}, ("q8_0", "q6_K"))
    assert few == {"wide": ("agq4", "q6_K", "q8_0"), "narrow": ("agq4", "q8_0")}
    with pytest.raises(InputError, match="types for a target must be among q5_K, q5_0, q5_1, q6_K, q8_0, got 'q4_K'"):
        QuantizeOptions(target_types=("q8_0", "q4_K"))


# the cost


@pytest.mark.parametrize("kind", ["untied", "tied", "bloom", "mixtral"])
def test_gradients_foretell_the_divergence(kind: str, tmp_path: Path) -> None:
    """Each tensor's cost against the divergence of the model in which just this tensor is AGQ4."""
    tied = kind in ("tied", "bloom")
    if kind == "bloom":
        path = tiny_models.write_bloom(tmp_path / "m.gguf", n_layer=1)
    else:
        path = tiny_models.write_llama(
            tmp_path / "m.gguf", n_layer=1, tied=tied, n_expert=4 * (kind == "mixtral"), n_expert_used=2
        )
    tokens = torch.randint(300, 500, (8, 64), generator=torch.Generator().manual_seed(0))
    options = MatrixOptions()
    with opened(path, 64) as (run, _, _):
        names = ["blk.0.attn_qkv.weight" if kind == "bloom" else "blk.0.attn_v.weight", "blk.0.ffn_down.weight"]
        names = ["blk.0.attn_v.weight", "blk.0.ffn_down_exps.weight"] if kind == "mixtral" else names
        names += ["token_embd.weight"] if tied else ["token_embd.weight", "output.weight"]
        found = costs.by_gradients(run, tokens, dict.fromkeys(names, BOTH), options, QUIET)
        assert set(found) == set(names)

        inputs: dict[str, torch.Tensor] = {}

        def note(place: Reading) -> None:
            if place.given is not None:
                inputs.setdefault(place.weight, place.given.flatten(0, -2))

        def scores() -> torch.Tensor:
            with torch.no_grad():
                return functional.log_softmax(run.forward(tokens), -1)

        with run.replacing(readings=note):
            wanted = scores()
        for name in names:
            known = costs._stats(inputs[name]) if name in inputs else None
            weight = run.weight(name)
            for type_name in BOTH:
                every = [
                    costs.tried(w, type_name, known, options) for w in weight.numpy().reshape(-1, *weight.shape[-2:])
                ]

                def product(place: Reading, every: list[costs.Tried] = every, name: str = name) -> torch.Tensor | None:
                    if place.weight != name or place.given is None:
                        return None
                    return place.by(lambda expert, x: every[expert].product(x))

                rough = torch.stack([one.weight for one in every]).reshape(weight.shape)
                with run.replacing({name: rough}, product):
                    real = float((wanted.exp() * (wanted - scores())).sum(-1).mean())
                most = 3 if kind == "mixtral" else 2  # other inputs may choose other experts
                assert real / most < found[name][type_name] < most * real


def test_inputs_count() -> None:
    """A type whose inputs share a scale over 256 channels pays for an outlier; AGQ4 rotates it away."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 256)).astype(np.float32)
    x[:, 7] *= 300
    stats = InputStats(64, np.square(x).mean(0), None, x)
    w = (rng.standard_normal((64, 256)) / 16).astype(np.float32)
    w[:, 7] /= 300
    exact = torch.from_numpy(x @ w.T)

    def error(type_name: str) -> float:
        made = costs.tried(w, type_name, stats, MatrixOptions())
        return float((made.product(torch.from_numpy(x)) - exact).square().mean())

    assert error("q6_K") > 3 * error("q8_0") > 0


def test_errors_where_gradients_are_not_known(gpt2_f16: Path, words: str) -> None:
    """The output matrix counts as much as all blocks together; with statistics, channels count as they are used."""
    types = {
        plan.source.name: BOTH for plan in plan_file(gpt2_f16, QuantizeOptions(output_type="agq4")) if not plan.reason
    }
    with open_gguf(gpt2_f16) as reader:
        output = "output.weight" if "output.weight" in reader.tensors else "token_embd.weight"
        plain = costs.by_errors(reader, output, {}, types, MatrixOptions(), QUIET)
    assert set(plain) == set(types)
    inner = [plain[name]["agq4"] for name in types if name.startswith("blk.")]
    assert all(0.003 < cost < 0.015 for cost in inner)
    assert plain[output]["agq4"] == pytest.approx(sum(inner), rel=0.5)
    assert all(costs["q8_0"] < 0.1 * costs["agq4"] for costs in plain.values())


# the whole


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_a_target_is_met_and_helps(quality: str, llama_f16: Path, words: str, tmp_path: Path) -> None:
    def run(target: float) -> tuple[float, float, set[str]]:
        out = tmp_path / f"{target}.gguf"
        options = QuantizeOptions(quality=quality, target_bpw=target, threads=1, context=64, calibration_tokens=512)
        report = quantize(llama_f16, out, calibration=[words], options=options)
        assert report.bits_per_weight <= target
        assert {t.type_name for t in report.tensors if t.reason == "sensitive"} <= set(knapsack.LADDER[1:])
        kinds = {t.type_name for t in report.tensors}
        return report.bits_per_weight, evaluate(out, llama_f16, words, context=64, chunks=8, threads=1).mean_kl, kinds

    least = knapsack.bits_per_weight(plan_file(llama_f16, QuantizeOptions(output_type="agq4", embedding_type="agq4")))
    few, more = run(least + 0.01), run(least + 1)
    assert few[0] == pytest.approx(least) and "q8_0" not in few[2] and "q8_0" in more[2]
    assert more[0] > least + 0.5 and more[1] < 0.8 * few[1]


def test_best_with_nothing_but_tables(
    llama_f16: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that gives every matrix Q8_0 leaves `best` the table; its two streams would hold all logits."""
    monkeypatch.setattr("agq_gguf.quantization.best.run.Sequential", lambda *args, **more: pytest.fail("no stages"))
    monkeypatch.setattr(
        costs, "by_gradients",
        lambda run, tokens, types, *more, **named: {n: {t: float(t != "q8_0") for t in types[n]} for n in types},
    )  # fmt: skip
    options = QuantizeOptions(
        quality="best", target_bpw=8.4, output_type="q8_0", embedding_type="agq4", threads=1, context=64,
        calibration_tokens=512,
    )  # fmt: skip
    report = quantize(llama_f16, tmp_path / "out.gguf", calibration=[words], options=options)
    assert [t.name for t in report.tensors if t.type_name == "agq4"] == ["token_embd.weight"]


@pytest.mark.parametrize("guide", ["text", "imatrix", "nothing"])
def test_a_target_for_any_architecture(
    guide: str, gpt2_f16: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "agq_gguf.calibration.imatrix.load_imatrix",
        lambda path: pytest.fail("read without need") if guide != "imatrix" else {},
    )
    options = QuantizeOptions(target_bpw=6, threads=1, context=64, calibration_tokens=512)
    report = quantize(
        gpt2_f16, tmp_path / "out.gguf",
        calibration=[words] if guide == "text" else None,
        imatrix=tmp_path / "i.gguf" if guide == "imatrix" else None,
        options=options,
    )  # fmt: skip
    assert 5 < report.bits_per_weight <= 6
    assert sum(t.reason == "sensitive" for t in report.tensors) > 0 and report.by_type()["agq4"][0] > 0


def test_types_that_the_user_wants_stay(llama_f16: Path, words: str) -> None:
    options = QuantizeOptions(output_type="f16", embedding_type="agq4", target_bpw=7.5, threads=1, context=64)
    types = {p.source.name: p.type_name for p in plan_file(llama_f16, options, calibration=[words])}
    assert types["output.weight"] == "f16" and types["token_embd.weight"] == "agq4"
    with pytest.raises(InputError, match=r"must be at least \d\.\d+ bits per weight for this model"):
        plan_file(llama_f16, QuantizeOptions(target_bpw=3))
    for target in (-1, 99, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"must be 4\.25 to 16 bits per weight, or 0 for no target, got"):
            QuantizeOptions(target_bpw=target)


# activations


def test_activations(llama_f16: Path, words: str, tmp_path: Path) -> None:
    kl = {}
    for bits, scale in ((4, "rotated"), (8, "rotated"), (8, "token"), (8, "group")):
        out = tmp_path / f"{bits}{scale}.gguf"
        options = QuantizeOptions(threads=1, context=64, calibration_tokens=512, matrix=activation_options(bits, scale))
        quantize(llama_f16, out, calibration=[words], options=options)
        with open_gguf(out) as reader:
            assert reader.get("agq.activation_bits") == bits
            name = "blk.0.ffn_up.weight"
            raw = np.array(np.frombuffer(reader.raw(name), np.uint8))  # a copy: the mapping ends before
            found = blocks.read_parameters(raw.reshape(reader.tensors[name].shape[0], -1))
            assert (found.activation_bits, found.activation_scale) == (bits, scale)
            assert reader.get("agq.activation_scale") == scale
        kl[bits, scale] = evaluate(out, llama_f16, words, context=64, chunks=8, threads=1).mean_kl
    assert max(kl[8, scale] for scale in blocks.ACTIVATION_SCALES) < kl[4, "rotated"] < 1
    with pytest.raises(InputError, match="activation bits must be 4 or 8, got 5"):
        activation_options(5)
    with pytest.raises(InputError, match="activation scale must be one of token, group, rotated, got 'row'"):
        activation_options(8, "row")
