"""Operations on each value, and sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import OPS, Memo, Operation, op, repeated

# llama.cpp takes these from a table of F16 values, so its results differ by 1e-4 to 3e-4.
BY_TABLE = ("UNARY.GELU", "UNARY.GELU_QUICK", "GLU.GEGLU", "GLU.GEGLU_QUICK")


@op("ADD", "ADD1")
def add(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b"""
    return a + repeated(b, a)


@op("SUB")
def subtract(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b"""
    return a - repeated(b, a)


@op("MUL")
def multiply(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a * b, value by value"""
    return a * repeated(b, a)


@op("DIV")
def divide(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b"""
    return a / repeated(b, a)


@op("SCALE")
def scale(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """x times a constant, plus a constant."""
    factor, bias = node.f32(0), node.f32(1)
    return x * factor + bias if bias else x * factor


@op("CLAMP")
def clamp(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """x within limits."""
    return x.clamp(node.f32(0), node.f32(1))


@op("SUM_ROWS")
def sum_rows(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """The sum of each row."""
    return x.sum(-1, keepdim=True)


@op("MEAN")
def mean(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """The mean of each row."""
    return x.mean(-1, keepdim=True)


@op("CUMSUM")
def cumulative_sum(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Sums of the beginnings of each row."""
    return x.cumsum(-1)


@op("SUM")
def total(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """The sum of everything."""
    return x.flatten(1).sum(1).reshape(-1, 1, 1, 1, 1)


@op("FILL")
def fill(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """A constant in the shape of x."""
    return torch.full_like(x, node.f32(0))


@op("ARANGE")
def arange(node: Node, memo: Memo) -> torch.Tensor:
    """Numbers in equal steps."""
    start, _, step = (node.f32(i) for i in range(3))
    return (start + step * torch.arange(node.shape[-1]))[None, None, None, None]


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU with tanh, as ggml computes it."""
    return functional.gelu(x, approximate="tanh")


def gelu_quick(x: torch.Tensor) -> torch.Tensor:
    """GELU with a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operation:
    return lambda node, memo, x: function(x)


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SQR": torch.square,
    "SQRT": torch.sqrt,
    "LOG": torch.log,
    "SIN": torch.sin,
    "COS": torch.cos,
    "UNARY.ABS": torch.abs,
    "UNARY.SGN": torch.sign,
    "UNARY.NEG": torch.neg,
    "UNARY.STEP": lambda x: (x > 0).float(),
    "UNARY.TANH": torch.tanh,
    "UNARY.ELU": functional.elu,
    "UNARY.RELU": torch.relu,
    "UNARY.SIGMOID": torch.sigmoid,
    "UNARY.GELU": gelu,
    "UNARY.GELU_QUICK": gelu_quick,
    "UNARY.GELU_ERF": functional.gelu,
    "UNARY.SILU": functional.silu,
    "UNARY.HARDSWISH": functional.hardswish,
    "UNARY.HARDSIGMOID": functional.hardsigmoid,
    "UNARY.EXP": torch.exp,
    "UNARY.EXPM1": torch.expm1,
    "UNARY.SOFTPLUS": functional.softplus,
    "UNARY.FLOOR": torch.floor,
    "UNARY.CEIL": torch.ceil,
    "UNARY.ROUND": torch.round,
    "UNARY.TRUNC": torch.trunc,
}
OPS |= {name: _unary(function) for name, function in _FUNCTIONS.items()}


@op("LEAKY_RELU")
def leaky_relu(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """ReLU with a slope below zero."""
    return functional.leaky_relu(x, node.f32(0))


@op("UNARY.XIELU")
def xielu(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """The activation of Apertus."""
    alpha_n, alpha_p, beta, eps = (node.f32(i) for i in range(1, 5))
    negative = (torch.expm1(x.clamp(max=eps)) - x) * alpha_n + beta * x
    return torch.where(x > 0, alpha_p * x * x + beta * x, negative)


def _halves(node: Node, a: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What is activated and what it gates; without `b`, both are halves of a row."""
    if b is not None:
        return a, b
    first, second = a.chunk(2, -1)
    return (second, first) if node.i32(1) else (first, second)


def _gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Operation:
    def apply(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        gate, up = _halves(node, a, b)
        return function(gate) * up

    return apply


_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "REGLU": torch.relu,
    "GEGLU": gelu,
    "SWIGLU": functional.silu,
    "GEGLU_ERF": functional.gelu,
    "GEGLU_QUICK": gelu_quick,
}
OPS |= {f"GLU.{name}": _gated(function) for name, function in _GATES.items()}


@op("GLU.SWIGLU_OAI")
def swiglu_oai(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """The gate of gpt-oss."""
    gate, up = _halves(node, a, b)
    alpha, limit = node.f32(2), node.f32(3)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


@op("GLU.SWIGLU_CLAMP")
def swiglu_clamp(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU within a limit."""
    gate, up = _halves(node, a, b)
    limit = node.f32(3)
    return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
