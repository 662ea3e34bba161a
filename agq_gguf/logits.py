"""Compares the logits of two models: log-likelihood, KL divergence, agreement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities along the last axis, in binary64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def compare(
    reference: NDArray[np.float32], model: NDArray[np.float32], targets: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Logits [n, vocabulary] of both models and the tokens that really followed [n] -> [n, 4].

    The columns: negative log-likelihood by the reference and by the model, KL divergence, 1 where both agree on the
    most likely token.
    """
    p, q = log_softmax(reference), log_softmax(model)
    rows = np.arange(len(targets))
    # The sum cannot be negative but for rounding.
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0)
    agree = reference.argmax(axis=-1) == model.argmax(axis=-1)
    return np.stack([-p[rows, targets], -q[rows, targets], kl, agree], axis=1)
