"""What a loaded model can do, asked of llama.cpp itself; every command that runs a model asks here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agq_gguf.errors import InputError

if TYPE_CHECKING:
    from agq_gguf.runtime.model import Model

_PROBE_CONTEXT = 32  # tokens
_SAME = 1e-3  # relative difference of logits that rounding can make


@dataclass(frozen=True)
class Abilities:
    """What a model can do. `problem` says why it cannot predict a next token; it is empty if it can."""

    problem: str


def abilities_of(model: Model) -> Abilities:
    """Runs a loaded model on three tokens, unless llama.cpp or the file says before that it predicts nothing."""
    return Abilities(declared_problem(model) or _probed_problem(model))


def declared_problem(model: Model) -> str:
    """Why the model predicts no next token, as far as llama.cpp and the file say so; its weights are not needed."""
    if model.has_encoder:
        return "it has an encoder, whose text a prompt would have to be"
    if not model.facts.causal:
        return "it is an encoder"
    if model.is_diffusion:
        return "it is a diffusion model, which fills in all tokens of a text at a time"
    return ""


def _probed_problem(model: Model) -> str:
    """Whether llama.cpp lets tokens see later ones, which it does for some architectures whatever the file says."""
    from agq_gguf.runtime.model import Batch

    tokens = np.array([1, 2, 3], np.int32) % max(model.n_vocab, 1)
    with model.context(_PROBE_CONTEXT, threads=1, flash_attention="off") as context:
        found = []
        for last in (tokens[2], (tokens[2] + 1) % model.n_vocab):
            context.clear()
            batch = Batch([tokens[0], tokens[1], last], first_logits=0)
            context.decode(batch)
            try:
                found.append(context.logits(batch).copy())
            except InputError:
                return "llama.cpp computes no logits for it"
    one, other = found
    if not np.isfinite(one).all():
        return ""  # a damaged model, not one of another kind: the command that runs it says so
    if float(np.ptp(one[0])) == 0:
        return "llama.cpp computes no logits for it"
    if np.abs(one[0] - other[0]).max() > _SAME * np.abs(one[0]).max():
        return "each of its tokens sees later ones"
    return ""
