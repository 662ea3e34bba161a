"""Compares the logits of two models: log-likelihood, KL divergence, agreement on the most likely token."""

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
    """Compares the logits [n, vocabulary] of both models, given the tokens that really followed [n]; returns [n, 4].

    The columns are: negative log-likelihood by the reference, the same by the model, KL divergence, and 1 if both agree
    on the most likely token, else 0.
    """
    p, q = log_softmax(reference), log_softmax(model)
    rows = np.arange(len(targets))
    # Only rounding can make the sum negative.
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0)
    agree = reference.argmax(axis=-1) == model.argmax(axis=-1)
    return np.stack([-p[rows, targets], -q[rows, targets], kl, agree], axis=1)
