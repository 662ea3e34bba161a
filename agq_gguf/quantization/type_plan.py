"""Chooses the type of each tensor: AGQ4 for matrices that are multiplied with, else a stock type, with the reason."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from agq_gguf.errors import InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import FLOATS, TYPE_IDS, TYPES, Reader, Tensor
from agq_gguf.gguf_io.tensor_names import EMBEDDING, OUTPUT
from agq_gguf.matrix.typed import SEARCHED

TARGET_TYPES = (blocks.TYPE_NAME, "q6_K", "q8_0", "f16", "f32")

# Tensors of two or more dimensions that stay as they are: they are added or convolved, or small and sensitive.
# Patterns of names. llama-quantize keeps the same tensors, apart from convolutions, which no quantized type fits.
_KEPT = {
    "norm": r"norm",
    "router": r"ffn_gate_inp|ffn_gate_tid2eid|exp_probs",
    "position or token type table": r"position_embd|pos_embd|token_types|attn_rel_b|rel_pos|rope_",
    "convolution": r"conv1d|\.conv\.|conv_|patch_embd|patch_merger|sam\.n",
    "recurrent state": r"ssm_a\.|ssm_d\.|time_mix_(?!key|value|receptance|gate|output)|_mix_lerp",
    "small low-rank or mixing matrix": r"altup|laurel|per_layer_model_proj|lora_|indexer\.[kq]_proj|hc_",
    "codebook table": r"codebook|code_embd|res_score",
}
_KEPT_IN = {  # more of them in some architectures
    "glm5-next": r"indexer|ssm_[fg]_[ab]|ssm_beta|attn_kv_a_mqa|attn_[kv]_b\.",
}

# Tensors that llama-quantize quantizes and that get Q8_0 here.
_CAREFUL = {
    "used one head at a time": r"attn_[kv]_b\.",
    "small and sensitive": r"indexer|ssm_dt|ssm_[fg]_[ab]",
}

_WIDE_EMBEDDING = 1024  # columns
_LOOKED_UP = (EMBEDDING, "per_layer_token_embd.weight")
_LARGEST_F16 = 65504.0
_SCANNED = 1 << 22  # values looked at at one time


@dataclass(frozen=True)
class TensorPlan:
    """The type of one tensor; `reason` says why it is not AGQ4 and is empty if it is."""

    source: Tensor
    type_name: str
    reason: str
    own_codes: bool = False  # AGQ4 that holds the integers of the source (`matrix/own_codes.py`)

    @property
    def searched(self) -> bool:
        """Whether its codes have to be found, as well as the statistics of its input allow."""
        return self.type_name in SEARCHED and self.type_name != self.source.type_name and not self.own_codes


def plan(
    reader: Reader,
    *,
    output_type: str = "auto",
    embedding_type: str = "auto",
    default_type: str = "agq4",
    keep_types: Collection[str] = (),
) -> list[TensorPlan]:
    """One entry for each tensor, in the order of the file.

    `output_type` is the type of the output matrix, which yields the logits: `output.weight`, or the token embedding if
    the file has no `output.weight`; "auto" means Q8_0. `embedding_type` is the type of a token embedding that is only
    looked up; "auto" means Q8_0 below 1024 columns, else AGQ4. Below 1024 columns 4 bits in the embedding cause a large
    part of the quality loss, and Q8_0 costs little size (docs/research/format-study.md). Raises InputError for other
    types. What stays of a quantized source, see `no_larger`.
    """
    for option, name in (("output type", output_type), ("embedding type", embedding_type), ("type", default_type)):
        if name not in TARGET_TYPES and (option == "type" or name != "auto"):
            raise InputError(f"{option} must be one of {', '.join(TARGET_TYPES)}, got {name!r}")
    kept_here = _KEPT_IN.get(str(reader.get("general.architecture")), "")
    plans = []
    for tensor in reader.tensors.values():
        if tensor.name == OUTPUT or (tensor.name == EMBEDDING and OUTPUT not in reader.tensors):
            wanted, option = "q8_0" if output_type == "auto" else output_type, "output type"
        elif tensor.name in _LOOKED_UP:
            wanted, option = embedding_type, "embedding type"
            if wanted == "auto":
                wanted = "q8_0" if tensor.shape[-1] < _WIDE_EMBEDDING else blocks.TYPE_NAME
        else:
            wanted, option = default_type, "type"
        found = no_larger(plan_tensor(tensor, wanted, option, kept_here), keep_types)
        if found.type_name == "f16" != tensor.type_name and not _fits_f16(reader, tensor):
            found = TensorPlan(tensor, tensor.type_name, f"{found.reason}; has values that F16 cannot hold")
        plans.append(found)
    return plans


def no_larger(plan: TensorPlan, keep_types: Collection[str]) -> TensorPlan:
    """The plan, or one that copies a quantized tensor.

    A tensor is copied if its type is one of `keep_types`, or if another stock type would need as many bits or more.
    """
    source = plan.source
    if not source.quantized or plan.type_name == source.type_name:
        return plan
    if source.type_name in keep_types:
        return TensorPlan(source, source.type_name, f"type {source.type_name} is kept")
    if plan.type_name == blocks.TYPE_NAME:
        return plan
    _, block, block_bytes = TYPES[TYPE_IDS[plan.type_name]]
    if source.n_bytes > source.n_elements // block * block_bytes:
        return plan
    return TensorPlan(source, source.type_name, f"{plan.reason}; the source's {source.type_name} is no larger")


def plan_tensor(
    tensor: Tensor, wanted: str = blocks.TYPE_NAME, option: str = "type", kept_here: str = ""
) -> TensorPlan:
    """The type for one tensor whose matrix should be of type `wanted`, which `option` asks for.

    `kept_here` is a pattern of names that this architecture keeps as they are.
    """
    kept = _why_kept(tensor, kept_here)
    if kept:
        return TensorPlan(tensor, tensor.type_name, kept)
    careful = next((reason for reason, pattern in _CAREFUL.items() if re.search(pattern, tensor.name)), "")
    if careful and wanted == blocks.TYPE_NAME:
        type_name, problem = "q8_0", careful
    elif wanted != blocks.TYPE_NAME:
        type_name, problem = wanted, f"{option} is {wanted}"
    else:
        shape_problem = blocks.shape_problem(*tensor.shape[-2:])
        if shape_problem is None:
            return TensorPlan(tensor, blocks.TYPE_NAME, "")
        type_name, problem = "q8_0", shape_problem
    if type_name == "q6_K" and tensor.shape[-1] % TYPES[TYPE_IDS["q6_K"]][1]:
        type_name, problem = "q8_0", f"{problem}; q6_K needs a multiple of 256 columns"
    if type_name == "q8_0" and tensor.shape[-1] % TYPES[TYPE_IDS["q8_0"]][1]:
        # BF16 is as small as F16, and a conversion could lose its range.
        type_name = "bf16" if tensor.type_name == "bf16" else "f16"
        problem = f"{problem}; q8_0 needs a multiple of 32 columns"
    return TensorPlan(tensor, type_name, problem)


def _fits_f16(reader: Reader, tensor: Tensor) -> bool:
    """Whether F16 can hold every value of the tensor without an infinity."""
    n_rows = tensor.n_elements // tensor.shape[-1]
    step = max(1, _SCANNED // tensor.shape[-1])
    blocks_of_rows = (range(begin, min(begin + step, n_rows)) for begin in range(0, n_rows, step))
    return all(np.abs(reader.read(tensor.name, rows)).max() <= _LARGEST_F16 for rows in blocks_of_rows)


def _why_kept(tensor: Tensor, kept_here: str) -> str:
    """Why a tensor is copied unchanged; empty if it may be converted."""
    if tensor.type_name not in FLOATS and not tensor.quantized:
        return f"type {tensor.type_name}"
    if not tensor.name.endswith(".weight"):
        return "bias" if tensor.name.endswith(".bias") else "not a weight"
    if sum(size > 1 for size in tensor.shape) < 2:
        return "one-dimensional"
    for reason, pattern in _KEPT.items():
        if re.search(pattern, tensor.name):
            return reason
    if kept_here and re.search(kept_here, tensor.name):
        return "small and sensitive in this architecture"
    is_3d = len(tensor.shape) == 3
    if len(tensor.shape) > 3 or (is_3d and not re.search(r"exps\.|attn_[kv]_b\.", tensor.name)):
        return "more than two dimensions, but not experts"
    return ""
