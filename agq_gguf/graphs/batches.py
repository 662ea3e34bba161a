"""Cuts calibration chunks into batches."""

from __future__ import annotations

import numpy as np
import torch


def batches_of(chunks: list[np.ndarray], tokens: int) -> list[torch.Tensor]:
    """Tensors [batch, length] of about `tokens` tokens each, from neighbouring chunks of equal length."""
    found: list[list[np.ndarray]] = []
    for chunk in chunks:
        if found and len(found[-1][0]) == len(chunk) and (len(found[-1]) + 1) * len(chunk) <= tokens:
            found[-1].append(chunk)
        else:
            found.append([chunk])
    return [torch.from_numpy(np.stack(part).astype(np.int64)) for part in found]
