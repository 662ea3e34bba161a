"""The metadata keys that this package writes and reads."""

from __future__ import annotations

ERROR_TENSORS, ERROR_VALUES = "agq.error.tensors", "agq.error.values"  # squared output error of each AGQ4 tensor
