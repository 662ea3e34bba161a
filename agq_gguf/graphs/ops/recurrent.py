"""State space models: a loop over tokens, exact but slow."""

from __future__ import annotations

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import Memo, op
from agq_gguf.graphs.unsupported import Unsupported


@op("SSM_CONV")
def convolution(node: Node, memo: Memo, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A convolution of each channel with its own kernel."""
    found = functional.conv1d(x.flatten(0, 2), weight[0, 0, 0][:, None], groups=x.shape[3])
    return found.transpose(1, 2).unflatten(0, x.shape[:3])


@op("SSM_SCAN")
def scan(
    node: Node,
    memo: Memo,
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Mamba's recurrence: outputs of all tokens, then the last state, as flat values."""
    if node.i32(0) > 1:
        raise Unsupported("its graph has SSM_SCAN with several states, which cannot be differentiated here")
    state = state[:, ids.flatten()]  # [batch, sequences, heads, channels, states]
    heads = x.shape[3]
    b, c = (v.repeat_interleave(heads // v.shape[3], 3) for v in (b, c))
    dt = functional.softplus(dt[:, 0])[..., None]  # [batch, sequences, tokens, heads, 1]
    decay, given = (dt * a).exp(), x * dt
    made = []
    for t in range(x.shape[2]):
        state = state * decay[:, :, t, :, None] + given[:, :, t, ..., None] * b[:, :, t, :, None]
        made.append((state * c[:, :, t, :, None]).sum(-1))
    y = torch.stack(made, 2)
    return torch.cat([y.flatten(1), state.flatten(1)], 1).reshape(len(y), *node.shape)
