"""Names for sizes: how many bits the tensors of a model get, without any option of a tensor's type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.gguf_io.writer import layout
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.type_plan import TensorPlan, plan

# What each preset sets in `QuantizeOptions`. docs/quality.md shows sizes and measured divergence.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "small": {"output_type": "agq4", "embedding_type": "agq4"},
        "balanced": {},
        "near-lossless": {"target_bpw": 7.0, "target_types": ("q8_0",)},  # kernels of ours are faster than ggml's
    }
)


def with_preset(options: QuantizeOptions, name: str) -> QuantizeOptions:
    """The options with those of a preset.

    Options that are not at their default stay; with a target of their own, the preset's types for its target do not
    count. Raises InputError for an unknown name.
    """
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    defaults = QuantizeOptions()
    chosen = {key: value for key, value in PRESETS[name].items() if getattr(options, key) == getattr(defaults, key)}
    if options.target_bpw:
        chosen.pop("target_types", None)
    return replace(options, **chosen)


def saved_by_small(reader: Reader, plans: Sequence[TensorPlan], options: QuantizeOptions) -> int:
    """How many bytes smaller the file would be with the preset `small`; 0 if it would not."""
    small = plan(reader, keep_types=options.keep_types, **PRESETS["small"])
    return max(0, _n_bytes(plans) - _n_bytes(small))


def _n_bytes(plans: Sequence[TensorPlan]) -> int:
    placed = layout((p.source.name, p.type_name, p.source.shape) for p in plans)
    return sum(target.n_bytes for target in placed)
