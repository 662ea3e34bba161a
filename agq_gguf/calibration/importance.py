"""The importance matrix of a model: what llama-imatrix collects, read from llama.cpp's graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import PathName, Progress, Text, no_progress
from agq_gguf.calibration.collect import Calibrator
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.text import load_text

_MEMORY = 1 << 30  # bytes, more than mean squares need


def importance(
    model: PathName, text: Text, *, max_tokens: int, threads: int = 0, progress: Progress = no_progress
) -> dict[str, NDArray[np.float32]]:
    """For each weight the mean squares of its input on a text: [K], or [experts * K] for experts.

    Raises InputError if the model or the text cannot be used.
    """
    with open_model(model) as reader:
        wanted = {t.name: t.shape for t in reader.tensors.values() if len(t.shape) > 1 and t.name.endswith(".weight")}
    with Calibrator.open(model, load_text(text), wanted, max_tokens=max_tokens, threads=threads) as calibrator:
        inputs = calibrator.inputs
        found = calibrator.collect(
            inputs, _MEMORY, lambda done: progress("importance", done, calibrator.n_tokens, ""), hessians=False
        )
    return {
        name: np.concatenate([part.mean_square for part in stats.experts or (stats.whole,)])
        for entry, stats in zip(inputs, found, strict=True)
        for name in entry.weights
    }
