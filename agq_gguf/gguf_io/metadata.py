"""The metadata keys that this package writes and reads; docs/format.md describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from agq_gguf.gguf_io.reader import Reader

PREFIX = "agq."
VERSION = "agq.version"
CALIBRATION = "agq.calibration"
QUALITY = "agq.quality"
REQUANTIZED_FROM = "agq.requantized_from"  # the types of a source whose weights were quantized already
ACTIVATION_BITS = "agq.activation_bits"
ACTIVATION_SCALE = "agq.activation_scale"
TENSOR_COUNT = "agq.tensors."  # and the name of a type

HASH_PREFIX = "agq.hash."
TENSOR_HASHES = "agq.hash.sha256"
METADATA_HASH = "agq.hash.metadata"

ERROR_PREFIX = "agq.error."
_ERROR_TENSORS, _ERROR_VALUES = "agq.error.tensors", "agq.error.values"

PRUNE_PREFIX = "agq.prune."
PRUNE_LAYERS = "agq.prune.layers"
PRUNE_CURVE = "curve."  # after PRUNE_PREFIX: savings and costs of each setting that calibration measured


def error_table(errors: dict[str, float]) -> dict[str, Any]:
    """The keys for the squared output error of each AGQ4 tensor; empty without tensors."""
    if not errors:
        return {}
    return {_ERROR_TENSORS: list(errors), _ERROR_VALUES: np.array(list(errors.values()), np.float32)}


def read_errors(reader: Reader) -> dict[str, float]:
    """Tensor name -> squared output error, as `error_table` wrote it; empty if that is missing or damaged."""
    names, values = reader.get(_ERROR_TENSORS), reader.get(_ERROR_VALUES)
    if names is None or values is None or np.ndim(names) != 1 or np.shape(names) != np.shape(values):
        return {}
    numbers = np.asarray(values)
    if not np.issubdtype(numbers.dtype, np.floating):
        return {}
    return {str(name): float(value) for name, value in zip(names, numbers, strict=True) if np.isfinite(value)}
