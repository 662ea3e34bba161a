"""The LLaMA graph in PyTorch, stage by stage.

llama.cpp's graph gives no gradients, and cannot run a second model that is quantized while it runs; this graph can.
A block has four stages, each a group of matrices with one input: q, k, v; attention output; gate and up; down. A stage
computes the input of its matrices from the state (x, y) (`stage_input`), and the next state from their outputs
(`stage_output`). x is the residual stream, y the input that the previous stage computed for this one. The caller
multiplies with the matrices. Everything is float32, [batch, tokens, channels].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from agq_gguf.gguf_io.reader import Reader

STAGES = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
State = tuple[torch.Tensor, torch.Tensor | None]  # x [batch, tokens, n_embd], y [batch, tokens, channels]
Linear = Callable[[str, torch.Tensor], torch.Tensor]  # weight's name without ".weight", input -> product without bias

# Whether rotary embedding rotates halves (i, i + n / 2) or neighbours (i, i + 1): llama.cpp's choice per architecture.
_TURNS_HALVES = {"llama": False, "qwen2": True, "qwen3": True}
ARCHITECTURES = tuple(_TURNS_HALVES)
_BLOCK_TENSORS = (
    r"blk\.\d+\.(attn_norm|ffn_norm|attn_q_norm|attn_k_norm|attn_[qkv]|attn_output|ffn_gate|ffn_up|ffn_down)\.weight"
    r"|blk\.\d+\.attn_([qkv]|output)\.bias|token_embd\.weight|output_norm\.weight|output\.weight|rope_freqs\.weight"
)


@dataclass(frozen=True)
class Shape:
    """Sizes and constants of the model."""

    n_layer: int
    n_head: int
    n_kv: int
    head: int  # channels of a head
    rotated: int  # channels of a head that are rotated
    eps: float
    base: float
    position_scale: float  # positions are multiplied by this
    halves: bool


def why_not(reader: Reader) -> str:
    """Why this graph does not support a model of these architectures; empty if it does."""
    arch = reader.architecture
    for name in reader.tensors:
        if not re.fullmatch(_BLOCK_TENSORS, name):
            return f"its tensor {name} is not supported"
    scaling = reader.get(f"{arch}.rope.scaling.type", "none")
    if not isinstance(scaling, str) or scaling not in ("none", "linear"):
        return f"its rotary scaling {scaling!r} is not supported"
    return why_not_causal(reader)


def why_not_causal(reader: Reader) -> str:
    """Why a model needs more than plain causal attention without extra scales; empty if it does not."""
    arch = reader.architecture
    causal, window = (reader.get(f"{arch}.attention.{key}") for key in ("causal", "sliding_window"))
    if not (causal is None or causal is True) or type(window) not in (int, type(None)) or window:
        return "its attention is not plain causal attention"
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale", "attention.clamp_kqv"):
        if reader.get(f"{arch}.{key}") is not None:
            return f"its metadata key {arch}.{key} is not supported"
    counts = reader.get(f"{arch}.attention.head_count"), reader.get(f"{arch}.attention.head_count_kv", 1)
    return "" if all(type(n) is int and n > 0 for n in counts) else "its head counts differ from layer to layer"


class LlamaGraph:
    """A model that `why_not` finds supported. Reads weights when they are used, and caches up to `cache` bytes."""

    stages: tuple[tuple[str, ...], ...] = STAGES
    # Pairs of matrices between which channels may be scaled: rows of the first are multiplied by factors, and columns
    # of the second are divided by them.
    levelled: tuple[tuple[str, str], ...] = (("attn_v", "attn_output"), ("ffn_up", "ffn_down"))

    def __init__(self, reader: Reader, cache: int) -> None:
        self._reader, self._room = reader, cache
        self._cache: dict[str, torch.Tensor] = {}
        self._replaced: dict[str, torch.Tensor] = {}  # tensors to use instead of the file's
        arch = reader.architecture

        def value(key: str, default: float) -> float:
            return reader.number(f"{arch}.{key}", default)

        n_head = int(value("attention.head_count", 1))
        head = int(value("attention.key_length", reader.tensors["token_embd.weight"].shape[-1] // n_head))
        linear = reader.get(f"{arch}.rope.scaling.type", "none") == "linear"
        self.shape = Shape(
            n_layer=int(value("block_count", 0)),
            n_head=n_head,
            n_kv=int(value("attention.head_count_kv", n_head)),
            head=head,
            rotated=int(value("rope.dimension_count", head)),
            eps=value("attention.layer_norm_rms_epsilon", 1e-5),
            base=value("rope.freq_base", 10000.0),
            position_scale=1 / (value("rope.scaling.factor", 1.0) or 1.0) if linear else 1.0,  # as in llama.cpp, 0 is 1
            halves=_TURNS_HALVES.get(arch, False),
        )
        self.output_name = "output.weight" if "output.weight" in reader.tensors else "token_embd.weight"
        self._turns: torch.Tensor | None = None

    # weights

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the file in float32, or its replacement."""
        if name in self._replaced:
            return self._replaced[name]
        if name in self._cache:
            return self._cache[name]
        found = torch.from_numpy(self._reader.read(name))
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._cache[name] = found
        return found

    @contextmanager
    def replacing(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside the block, these tensors replace the file's: for norms in training and levelled matrices."""
        before, self._replaced = self._replaced, dict(tensors)
        try:
            yield
        finally:
            self._replaced = before

    def has(self, name: str) -> bool:
        """Whether the file holds the tensor."""
        return name in self._reader.tensors

    @property
    def norms(self) -> list[str]:
        """Names of the norm weights that are stored as F32."""
        tensors = self._reader.tensors.values()
        return [tensor.name for tensor in tensors if tensor.name.endswith("_norm.weight") and tensor.type_name == "f32"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The product with a weight of the file."""
        return functional.linear(x, self.tensor(f"{name}.weight"))

    # the graph

    def embed(self, tokens: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """x from tokens [batch, tokens] int64; `table` [vocabulary, n_embd] replaces the embedding."""
        return self.enter((self.tensor("token_embd.weight") if table is None else table)[tokens])

    def enter(self, rows: torch.Tensor) -> torch.Tensor:
        """x from rows [batch, tokens, n_embd] of the embedding."""
        return rows

    def stage_input(self, layer: int, stage: int, state: State) -> torch.Tensor:
        """The input of the matrices of a stage."""
        x, y = state
        if stage == 0:
            return self._norm(x, f"blk.{layer}.attn_norm")
        if stage == 2:
            return self._norm(x, f"blk.{layer}.ffn_norm")
        assert y is not None
        return y

    def stage_output(self, layer: int, stage: int, state: State, products: list[torch.Tensor]) -> State:
        """The state after a stage, from the `products` of its matrices in the order of `stages`."""
        names = [f"blk.{layer}.{name}.bias" for name in self.stages[stage]]
        products = [
            product + self.tensor(name) if self.has(name) else product
            for name, product in zip(names, products, strict=True)
        ]
        if stage == 0:
            return state[0], self._attention(layer, *products)
        if stage == 2:
            return state[0], self._activated(layer, *products)
        return state[0] + products[0], None

    def block(self, layer: int, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """A whole block."""
        state: State = (x, None)
        for stage, names in enumerate(self.stages):
            given = self.stage_input(layer, stage, state)
            state = self.stage_output(layer, stage, state, [linear(f"blk.{layer}.{name}", given) for name in names])
        return state[0]

    def logits(self, x: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] from the last block's x; `output` replaces the output matrix."""
        matrix = self.tensor(self.output_name) if output is None else output
        return functional.linear(self.normed(x), matrix)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the output matrix."""
        return self._norm(x, "output_norm")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.tensor(f"{name}.weight")
        return functional.rms_norm(x, (x.shape[-1],), None, self.shape.eps) * weight

    def _activated(self, layer: int, *products: torch.Tensor) -> torch.Tensor:
        gate, up = products
        return functional.silu(gate) * up

    def _attention(self, layer: int, *products: torch.Tensor) -> torch.Tensor:
        (q, k, v), shape = products, self.shape
        batch, tokens, _ = q.shape
        heads = [part.view(batch, tokens, -1, shape.head) for part in (q, k)]
        for i, name in enumerate(("attn_q_norm", "attn_k_norm")):
            if self.has(f"blk.{layer}.{name}.weight"):
                heads[i] = self._norm(heads[i], f"blk.{layer}.{name}")
        turned = [self._rotate(part.transpose(1, 2)) for part in heads]
        value = v.view(batch, tokens, shape.n_kv, -1).transpose(1, 2)
        repeat = shape.n_head // shape.n_kv
        mixed = functional.scaled_dot_product_attention(
            turned[0], turned[1].repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), is_causal=True
        )
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x [batch, heads, tokens, head]."""
        shape, tokens = self.shape, x.shape[2]
        if self._turns is None or len(self._turns) < tokens:
            frequency = shape.base ** (-torch.arange(0, shape.rotated, 2, dtype=torch.float64) / shape.rotated)
            if self.has("rope_freqs.weight"):
                frequency = frequency / self.tensor("rope_freqs.weight").double()
            angle = torch.arange(tokens, dtype=torch.float64)[:, None] * shape.position_scale * frequency
            self._turns = torch.stack([angle.cos(), angle.sin()], -1).float()
        cos, sin = self._turns[:tokens].unbind(-1)
        part, rest = x[..., : shape.rotated], x[..., shape.rotated :]
        if shape.halves:
            a, b = part.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([turned, rest], -1)
