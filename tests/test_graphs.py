"""Graphs of llama.cpp in PyTorch: the same outputs, right gradients, parts, and refusals with a reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import tiny_models
import torch
from executors import matrices_of, opened, pairs_of, some_tokens
from torch.nn import functional

from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.graphs import parts, support
from agq_gguf.graphs.gradients import gradients
from agq_gguf.graphs.ir import Graph, Node, check_inputs, translate
from agq_gguf.graphs.layers import Layer, layers
from agq_gguf.graphs.losses import divergence, drawn
from agq_gguf.graphs.ops import OPS, attention
from agq_gguf.graphs.ops.shapes import window
from agq_gguf.graphs.run import Executor, Reading, State
from agq_gguf.graphs.segments import segments
from agq_gguf.graphs.trace import Raw, Trace, record
from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.graphs.windows import Cut, Strided
from agq_gguf.graphs.windows import window as plan_window
from agq_gguf.runtime.model import Model

# Architectures: writers of tiny models in F32.
COVERED: dict[str, Callable[[Path], Path]] = {
    **architectures.DECODERS,
    "bert": partial(tiny_models.write_bert, dtype="f32"),
    "wide head": partial(tiny_models.write_llama, dtype="f32", n_head=2, n_kv=1),
    "bloom of 6 heads": partial(tiny_models.write_bloom, dtype="f32", n_embd=384, n_head=6, n_layer=1),
    **architectures.GRAPHS,
    "gpt-oss": partial(architectures.write_gpt_oss, yarn=True),
    "deepseek2": architectures.write_deepseek2,
}
# Without GELU from a table, outputs agree to 1e-6 and less.
BY_TABLE = {"gpt2", "bloom", "falcon", "gemma2", "gemma3", "starcoder2", "bert", "bloom of 6 heads"}
BY_TABLE |= {"gemma", "phi2", "gptneox", "mpt"}
LENGTH = 40  # more than the sliding windows
# What these do is also in the others.
REPEATED = {"qwen2", "bloom", "gemma", "gemma2", "starcoder2", "granite", "smollm3", "yarn", "phi2", "gptneox"}
REPEATED |= {"nemotron", "olmo2", "cohere2", "glm4", "qwen2moe", "qwen3moe", "odd", "halves", "stablelm"}


def some_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize("name", some_slow(COVERED, REPEATED))
def test_outputs_are_llama_cpps(name: str, tmp_path: Path) -> None:
    """Of one text and of the second of two; stage by stage; also with a small cache of weights."""
    with opened(COVERED[name](tmp_path / "m.gguf"), LENGTH, 70_000) as (run, reader, model):
        tokens = some_tokens(2, LENGTH) % model.n_vocab
        assert support.tolerance(run.graph, reader) == (1e-3 if name in BY_TABLE else 1e-5)
        limit = 5e-4 if name in BY_TABLE else 2e-6
        for text in tokens:
            assert support.difference(run, model, text.numpy().astype(np.int32)) < limit
        with torch.no_grad():
            both = run.forward(tokens)
            assert torch.allclose(run.forward(tokens[1:])[0], both[1], rtol=1e-4, atol=1e-4 * float(both.abs().max()))
            plan = parts.stages(run.graph, matrices_of(run, blocks_only=False))
            state = parts.first_state(run, plan, tokens)
            for number, stage in enumerate(plan.stages):
                values = parts.multiplied(run, stage, state, partial(_plain, run))
                state = parts.next_state(run, plan, number + 1, values)
        assert torch.equal(state[run.graph.output].flatten(1, 3), both)
        assert sum(tensor.nbytes for tensor in run._cache.values()) <= 70_000


def _plain(run: Executor, place: Reading) -> torch.Tensor:
    return place.of(run.weight(place.weight))


@pytest.mark.parametrize(("dtype", "limit"), [("f16", 1e-3), ("bf16", 1e-2)])
def test_rough_weights(dtype: str, limit: float, tmp_path: Path) -> None:
    """llama.cpp rounds inputs of products as weights are rounded; the limit knows."""
    tokens = some_tokens(1, LENGTH)[0].numpy().astype(np.int32)
    with opened(tiny_models.write_llama(tmp_path / "m.gguf", dtype=dtype), LENGTH) as (run, reader, model):
        assert support.tolerance(run.graph, reader) == limit
        assert limit / 20 < support.difference(run, model, tokens) < limit


def test_rounding_explains_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models make more of rounded inputs than the limit allows. What is ten times as much is not rounding."""
    tokens = some_tokens(1, LENGTH)[0].numpy().astype(np.int32)
    monkeypatch.setattr(support, "tolerance", lambda graph, reader: 1e-7)
    path = tiny_models.write_llama(tmp_path / "m.gguf", dtype="f16")
    with open_gguf(path) as reader, Model(path) as model:
        run = support.open_graph(reader, model, tokens, 0)
        found = support.difference(run, model, tokens)
        assert 1e-7 < found < 3 * support.rounding(run, reader, tokens) < 20 * found
        monkeypatch.setattr(support, "difference", lambda *_: 10 * found)
        with pytest.raises(Unsupported, match="differ from those of llama"):
            support.open_graph(reader, model, tokens, 0)
    exact = tiny_models.write_llama(tmp_path / "exact.gguf", dtype="f32")
    with open_gguf(exact) as reader, Model(exact) as model, pytest.raises(Unsupported, match="more than 1e-07"):
        support.open_graph(reader, model, tokens, 0)  # llama.cpp rounds nothing here


# gradients


@pytest.mark.parametrize(
    "name", some_slow(("llama", "gemma3", "mixtral", "deepseek2", "mamba"), ("gemma3", "deepseek2", "mamba"))
)
def test_gradients_are_slopes(name: str, tmp_path: Path) -> None:
    """Along a direction of one matrix, in float64; and cutting the graph elsewhere changes nothing."""
    tokens = some_tokens(1, 12)
    with opened(COVERED[name](tmp_path / "m.gguf"), 12) as (run, _, _):
        drawn_tokens = some_tokens(1, 12, 5)

        def loss(y: torch.Tensor) -> torch.Tensor:
            return -y.log_softmax(-1).gather(2, drawn_tokens[..., None]).sum()

        found: dict[str, tuple[Reading, torch.Tensor]] = {}
        value = gradients(run, segments(run.graph), tokens, loss, lambda p, g: found.update({p.weight: (p, g)}))
        other: dict[str, torch.Tensor] = {}
        wide = segments(run.graph, 4)
        assert len(wide) > len(segments(run.graph))
        assert gradients(run, wide, tokens, loss, lambda p, g: other.update({p.weight: g})) == pytest.approx(value)
        for weight, (_, gradient) in found.items():
            torch.testing.assert_close(gradient, other[weight], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
        first = next(n for n in found if n.startswith("blk.0.") and found[n][0].ids is None)
        place, gradient = found[first]
        assert place.given is not None
        slope = gradient.flatten(0, -2).T @ place.given.flatten(0, -2)
        direction = slope / slope.norm()
        step = 1e-6 * float(run.weight(first).norm())  # so small that no token changes its expert
        with torch.no_grad(), _double(run):
            ends = []
            for size in (step, -step, step / 2, -step / 2):
                changed = run.weight(first).double() + size * direction.double()
                with run.replacing({first: changed}):
                    ends.append(float(loss(run.forward(tokens))))
        coarse, fine = (ends[0] - ends[1]) / (2 * step), (ends[2] - ends[3]) / step
        assert (4 * fine - coarse) / 3 == pytest.approx(float(slope.norm()), rel=0.02)


class _double:  # noqa: N801
    """Weights and constants in float64."""

    def __init__(self, run: Executor):
        self.run = run

    def __enter__(self) -> None:
        run = self.run
        self.read, self.constants, self.cache = run._read, run._constants, run._cache
        run._read = lambda name: self.read(name).double()
        run._constants = {i: v.double() if v.is_floating_point() else v for i, v in self.constants.items()}
        run._cache, run._memo = {}, {}

    def __exit__(self, *_: object) -> None:
        self.run._read, self.run._constants, self.run._cache = self.read, self.constants, self.cache
        self.run._memo = {}


def test_lost_gradients_are_zero(tmp_path: Path) -> None:
    """What the loss does not depend on."""
    with opened(tiny_models.write_llama(tmp_path / "m.gguf", dtype="f32"), 8) as (run, _, _):
        found: dict[str, float] = {}
        parts_ = segments(run.graph)
        gradients(
            run,
            parts_,
            some_tokens(1, 8),
            lambda y: y[:, :1].sum(),
            lambda p, g: found.update({p.weight: float(g[:, ..., 1:, :].norm())}),
        )
        assert found["output.weight"] == 0 and found["blk.1.ffn_down.weight"] == 0


def test_losses() -> None:
    """Their gradients tell the divergence of a small change."""
    y = torch.randn(400, 3, 8, generator=torch.Generator().manual_seed(0))
    y = y[:1].expand_as(y).contiguous()
    change = 0.01 * torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    for logits in (True, False):
        leaf = y.clone().requires_grad_()
        (g,) = torch.autograd.grad(drawn(leaf, logits, torch.Generator().manual_seed(2)), leaf)
        told = float((g * change).sum(-1).square().mean(0).sum()) / 2
        assert told == pytest.approx(float(divergence(y[0], y[0] + change, logits).sum()), rel=0.2)


def test_drawn_tokens_have_the_probabilities_of_the_model() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    leaf = p.log().repeat(1, 20000, 1).requires_grad_()
    loss = drawn(leaf, True, torch.Generator().manual_seed(3))
    (g,) = torch.autograd.grad(loss, leaf)
    tokens = (p - g[0]).round().argmax(-1)  # the gradient is p, minus 1 at the token
    torch.testing.assert_close(g[0], p - functional.one_hot(tokens, 6))
    counts = tokens.bincount(minlength=6)
    assert (counts[p == 0] == 0).all()
    torch.testing.assert_close(counts / 20000, p, rtol=0, atol=0.02)
    assert float(loss.detach()) == pytest.approx(-float(p[tokens].log().sum()), rel=1e-5)


# what is replaced


def test_replacing_ends_with_its_block(tmp_path: Path) -> None:
    tokens = some_tokens(1, 8)
    with opened(tiny_models.write_llama(tmp_path / "m.gguf", dtype="f32"), 8) as (run, _, _), torch.no_grad():
        before = run.forward(tokens)
        name = "blk.0.ffn_up.weight"
        zeros = {name: torch.zeros_like(run.weight(name))}

        def fail(place: Reading) -> torch.Tensor | None:
            if place.weight == "blk.1.attn_q.weight":
                raise RuntimeError("no")
            return None

        with run.replacing(zeros):
            without = run.forward(tokens)
            assert not torch.equal(without, before)
            with pytest.raises(RuntimeError, match="no"), run.replacing(readings=fail):
                assert run.weight(name).norm() == 0  # the outer block still holds
                run.forward(tokens)
            assert torch.equal(run.forward(tokens), without)
        assert torch.equal(run.forward(tokens), before)
        with run.replacing(readings=lambda p: p.of(zeros[name]) if p.weight == name else None):
            assert torch.equal(run.forward(tokens), without)
        assert torch.equal(run.forward(tokens), before)


# parts


def test_parts_of_a_llama(llama_f16: Path) -> None:
    with opened(llama_f16, 16) as (run, _, _):
        graph = run.graph
        plan = parts.stages(graph, matrices_of(run))
        kinds = [[name.split(".")[2] for name in stage.weights] for stage in plan.stages[:4]]
        assert [sorted(names) for names in kinds] == [
            ["attn_k", "attn_q", "attn_v"], ["attn_output"], ["ffn_gate", "ffn_up"], ["ffn_down"],
        ]  # fmt: skip
        norms = [parts.norm_before(graph, stage) for stage in plan.stages[:4]]
        assert norms == [("blk.0.attn_norm.weight",), (), ("blk.0.ffn_norm.weight",), ()]
        fewer = parts.stages(graph, matrices_of(run) - {"blk.0.attn_q.weight"})
        assert parts.norm_before(graph, fewer.stages[0]) == ()  # another matrix reads what the norm makes
        assert len(parts.norms(graph)) == 5
        attended = {f"blk.{i}.attn_{x}.weight" for i in range(2) for x in "kv"}
        assert parts.keys_and_values(graph) == attended
        assert parts.lookups(graph) == {"token_embd.weight"} and parts.products(graph)["output.weight"] == 1
        assert [len(part.alive) for part in segments(graph)] == [1] * 5
        assert parts.numbers_alive(graph, plan) == 16 * (128 + 2 * 256)


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma3", "qwen2vl", "phi3", "bert"])
def test_all_is_on_one_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on PyTorch's device `meta`, which has shapes but no values, and refuses tensors of others.

    It stands for a GPU, which test machines do not have.
    """

    def mask_as_it_is(
        mask: torch.Tensor, q: torch.Tensor, bias: float, spelled: bool
    ) -> tuple[bool, int, torch.Tensor]:  # the real one looks at values
        mask = mask[..., : q.shape[3], :]
        return False, mask.shape[-1], mask * attention.slopes(q.shape[2], bias) if bias > 0 else mask

    monkeypatch.setattr(attention, "_mask", mask_as_it_is)
    with opened(COVERED[name](tmp_path / "m.gguf"), LENGTH) as (_, reader, model):
        graph = support.graph_for(reader, model, some_tokens(1, LENGTH)[0].numpy().astype(np.int32) % model.n_vocab)
        run = Executor(graph, lambda tensor: torch.from_numpy(reader.read(tensor)), 1 << 30, "meta")
        first = next(found for i in range(len(graph.nodes)) if (found := graph.matrix_of(i)))
        weight = run.weight(first).clone().requires_grad_()
        with run.replacing({first: weight}):
            output = run.forward(some_tokens(2, LENGTH))
        loss = drawn(output, model.facts.causal, torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(loss, weight)
        assert output.device.type == gradient.device.type == "meta"


def test_parts_of_experts(tmp_path: Path) -> None:
    with opened(architectures.write_mixtral(tmp_path / "m.gguf"), 16) as (run, _, _):
        plan = parts.stages(run.graph, matrices_of(run) | {"blk.0.ffn_gate_inp.weight"})
        groups = parts.groups(run.graph, plan.stages[2])
        assert [(group.weights, group.has_experts) for group in groups] == [
            (("blk.0.ffn_gate_inp.weight",), False),
            (("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"), True),
        ]


@pytest.mark.parametrize(("name", "expected"), [
    ("llama", {"attn_v>attn_output", "ffn_up>ffn_down"}), ("qwen2", {"ffn_up>ffn_down"}), ("gpt2", set()),
    ("gemma3", {"attn_v>attn_output", "ffn_up>ffn_down"}), ("falcon", {"attn_qkv>attn_output"}),
    ("phi3", {"attn_qkv>attn_output"}), ("mixtral", {"attn_v>attn_output", "ffn_up_exps>ffn_down_exps"}),
])  # fmt: skip
def test_pairs_that_may_be_scaled(name: str, expected: set[str], tmp_path: Path) -> None:
    with opened(COVERED[name](tmp_path / "m.gguf"), 8) as (run, _, _):
        found = pairs_of(run, matrices_of(run), some_tokens(1, 8))
        assert {f"{p.front.split('.')[2]}>{p.behind.split('.')[2]}" for p in found} == expected
        if name == "llama":  # two heads of queries share one of values
            source = next(p.source for p in found if p.front == "blk.0.attn_v.weight")
            rows = torch.arange(64).view(2, 32)
            assert torch.equal(source.view(2, 2, 32), rows[:, None].expand(2, 2, 32))


def test_streams_choose_alike(tmp_path: Path) -> None:
    """A stream follows the experts that another one chose."""
    tokens = some_tokens(1, 16)
    with opened(architectures.write_mixtral(tmp_path / "m.gguf"), 16) as (run, _, _), torch.no_grad():
        plan = parts.stages(run.graph, matrices_of(run))
        seen: list[list[torch.Tensor]] = []

        def go(noise: float, choices: State) -> None:
            seen.append([])
            state = parts.first_state(run, plan, tokens)
            for number, stage in enumerate(plan.stages):

                def product(place: Reading) -> torch.Tensor:
                    if place.ids is not None:
                        seen[-1].append(place.ids)
                    y = place.of(run.weight(place.weight))
                    return y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * y.std()

                values = parts.multiplied(run, stage, state, product, choices)
                state = parts.next_state(run, plan, number + 1, values, choices)

        chosen: State = {}
        go(0.0, chosen)
        assert len(chosen) == 2
        go(1.0, chosen)
        go(1.0, {})
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))


def test_layers_with_attention(llama_f16: Path, tmp_path: Path) -> None:
    def found(path: Path) -> tuple[dict[int, Layer], Trace]:
        with open_gguf(path) as reader, Model(path) as model:
            shapes = {tensor.name: tensor.shape for tensor in reader.tensors.values()}
            tokens = some_tokens(1, 8)[0].numpy().astype(np.int32)
            [trace] = record(model, [tokens], shapes, flash_attention="off")
            return layers(translate(trace, shapes)), trace

    here, trace = found(llama_f16)
    names = {i: trace.tensors[address].name for i, address in enumerate(trace.nodes)}
    shown = [("" if x.before is None else names[x.before], names[x.attention], names[x.after_attention])
             for x in here.values()]  # fmt: skip
    assert shown == [("", "kq_soft_max-0", "ffn_inp-0"), ("l_out-0", "kq_soft_max-1", "ffn_inp-1")]
    assert found(tiny_models.write_falcon(tmp_path / "f.gguf"))[0] == {}  # the feed-forward runs beside the attention


# memory


def test_windows() -> None:
    """Cut out where rows do not overlap; both ways give what the memory holds."""
    flat = torch.arange(60.0)
    node = partial(Node, "WINDOW", (0,))
    for ne, strides, offset, kind in (((3, 4, 1, 1), (1, 10, 0, 0), 12, Cut), ((3, 4, 2, 1), (5, 1, 20, 0), 1, Cut),
                                      ((4, 5, 1, 1), (1, 2, 0, 0), 7, Strided)):  # fmt: skip
        root = Raw(1, "NONE", "f32", (60, 1, 1, 1), (4, 240, 240, 240), b"", (), 0, 0, "root")
        view = Raw(2, "VIEW", "f32", ne, tuple(4 * s for s in strides), b"", (1,), 1, 4 * offset, "view")
        plan = plan_window(view, root, 4)
        assert isinstance(plan, kind)
        found = window(node(tuple(reversed(ne)), attr=plan), {}, flat[None])
        wanted = torch.as_strided(flat, tuple(reversed(ne)), tuple(reversed(strides)), offset)
        assert torch.equal(found[0], wanted)


# refusals


def test_refusals(tmp_path: Path) -> None:
    cases = {
        "its graph has RWKV_WKV7, which cannot be differentiated here": architectures.write_rwkv7(
            tmp_path / "rwkv.gguf"
        ),
        "it has an encoder and a decoder: two graphs": architectures.write_t5(tmp_path / "t5.gguf"),
    }
    for reason, path in cases.items():
        assert support.supported(path).startswith(reason)
    assert support.supported(tiny_models.write_gpt2(tmp_path / "gpt2.gguf")) == ""
    assert "llama.cpp cannot" in support.supported(_damaged(tmp_path / "bad.gguf"))


def _damaged(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(20))
    return path


def test_a_difference_is_told(llama_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_ROUGH", 1e-9)
    monkeypatch.setattr(support, "_TIMES_ROUNDING", 0)
    assert "its logits in PyTorch differ from those of llama.cpp by" in support.supported(llama_f16)
    assert support.supported(llama_f16).endswith("more than 1e-09")


def test_an_operation_that_fails(llama_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a form that was never seen: the model is not supported, and nothing breaks."""

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("sizes do not match\nin detail")

    monkeypatch.setitem(OPS, "RMS_NORM", fail)
    assert support.supported(llama_f16) == "PyTorch cannot run its graph: sizes do not match"


def test_graphs_that_depend_on_the_text() -> None:
    def trace(values: list[float], ne: int = 2) -> Trace:
        leaf = Raw(1, "NONE", "f32", (2, 1, 1, 1), (4, 8, 8, 8), b"", (), 0, 0, "bias", True, np.array(values))
        node = Raw(2, "ADD", "f32", (ne, 1, 1, 1), (4, 8, 8, 8), b"", (1,), 0, 0, "sum")
        return Trace([2], {1: leaf, 2: node})

    check_inputs(trace([1, 2]), trace([1, 2]))
    with pytest.raises(Unsupported, match="its graph's input bias depends on the text"):
        check_inputs(trace([1, 2]), trace([1, 3]))
    with pytest.raises(Unsupported, match="its graph is another for another text"):
        check_inputs(trace([1, 2]), trace([1, 2], 3))


def test_unknown_operations() -> None:
    graph = Graph([Node("TOKENS", (), (1, 1, 1, 4)), Node("MAGIC", (0,), (1, 1, 1, 4), varies=True)], 1)
    with pytest.raises(Unsupported, match="its graph has MAGIC, which cannot be differentiated here"):
        Executor(graph, lambda name: torch.empty(1), 0)
