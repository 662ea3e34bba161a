"""Trains norm weights and scales after quantization, so that the output moves back towards the float model's.

The student is the quantized model with rounded activations, the teacher is the float model. The loss is the divergence
that `evaluate` measures, on the calibration text; for encoders it is 1 - cosine of the embedding. Codes, codebooks and
everything else stay fixed. Part of the text is held out, and the result is dropped unless it is better there. The
trained parameters are factors near 1, because the norm weights of one model differ by three powers of ten: a step size
that suits one ruins another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from agq_gguf.graphs.losses import divergence
from agq_gguf.graphs.run import Executor, Reading
from agq_gguf.matrix.codebook import storable
from agq_gguf.matrix.quantize import QuantizedMatrix
from agq_gguf.matrix.simulate import Rounder, restored
from agq_gguf.matrix.stock_feedback import QuantizedStock
from agq_gguf.matrix.typed import Quantized
from agq_gguf.quantization.best.sequential import Matrices, applied

_RATE = 5e-4  # learning rate of the factors
_WARM_UP = 0.1  # share of the steps
_COPIES = 8  # of the logits
_HELD_OUT = 8  # one batch in so many is held out
_USUAL = 0.99  # share of the held-out positions, those with the least divergence, that decide


@dataclass(frozen=True)
class Tuned:
    """The result; with empty dictionaries if tuning did not help."""

    norms: dict[str, torch.Tensor]
    matrices: dict[str, Matrices]
    before: float  # divergence (`losses.divergence`) per row on the held-out text
    after: float


class _Student:
    """The quantized model with trainable norms and scales."""

    def __init__(
        self,
        run: Executor,
        matrices: Mapping[str, Matrices],
        norms: Mapping[str, torch.Tensor],
        trained: Collection[str],
        stored: Mapping[str, torch.Tensor],
    ) -> None:
        self._run, self._stored = run, stored
        self._biases = {name: bias for name, bias in norms.items() if name not in trained}
        self._norms = {name: norms.get(name, run.weight(name)) for name in trained}
        self._norm_factors = {name: torch.ones_like(norm) for name, norm in self._norms.items()}
        self._matrices = {name: [_trainable(found, run.device) for found in made] for name, made in matrices.items()}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The trained parameters."""
        every = [matrix for found in self._matrices.values() for matrix in found]
        scales = [matrix.factors for matrix in every if isinstance(matrix, _Scaled)]
        return [factor.requires_grad_() for factor in (*self._norm_factors.values(), *scales)]

    def norms(self) -> dict[str, torch.Tensor]:
        """Current weights of norms, and biases that differ from the file's."""
        return self._biases | {name: norm * self._norm_factors[name] for name, norm in self._norms.items()}

    def matrices(self) -> dict[str, Matrices]:
        """The matrices with their current scales."""
        return {name: [matrix.trained() for matrix in found] for name, found in self._matrices.items()}

    def output(self, tokens: torch.Tensor) -> torch.Tensor:
        """The output of the quantized model."""
        with self._run.replacing({**self._stored, **self.norms()}, self._yield):
            return self._run.forward(tokens)

    def _yield(self, place: Reading) -> torch.Tensor | None:
        found = self._matrices.get(place.weight)
        if found is None or place.given is None:
            return None
        return place.by(lambda expert, x: found[expert](x))


class _Fixed:
    """A matrix of a stock type, in which nothing is trained."""

    def __init__(self, made: QuantizedStock, device: torch.device) -> None:
        self._made = made
        self._rounder, self._weight = applied(made, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product with x [.., K]."""
        return functional.linear(self._rounder(x), self._weight)

    def trained(self) -> QuantizedStock:
        """The matrix as it was."""
        return self._made


class _Scaled:
    """A matrix in AGQ4 with trainable scales."""

    def __init__(self, made: QuantizedMatrix, device: torch.device) -> None:
        self._made = made
        self._scales = torch.from_numpy(made.matrix.scales).to(device)
        self.factors = torch.ones_like(self._scales)
        self._rounder = Rounder(made.matrix.parameters, made.matrix.codes.shape[1], device)

    def scales(self) -> torch.Tensor:
        """Scales [M, K / 64], rounded as the file stores them; gradients ignore the rounding."""
        exact = self._scales * self.factors
        return exact + (storable(exact.detach()) - exact.detach())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product with x [.., K]."""
        return functional.linear(self._rounder(x), restored(self._made.matrix, self._rounder, self.scales()))

    def trained(self) -> QuantizedMatrix:
        """The matrix with its current scales."""
        scales = storable(self.scales()).cpu().numpy()
        return replace(self._made, matrix=replace(self._made.matrix, scales=scales))


def _trainable(made: Quantized, device: torch.device) -> _Fixed | _Scaled:
    return _Fixed(made, device) if isinstance(made, QuantizedStock) else _Scaled(made, device)


def bytes_needed(n_parameters: int, largest: int) -> int:
    """Memory that tuning needs, roughly: each restored weight, its gradient, and its codes as indices.

    `largest` is how many numbers the largest value has, usually the logits: the loss and its gradient need copies.
    """
    return 16 * n_parameters + _COPIES * 4 * largest


def tune(
    run: Executor,
    batches: list[torch.Tensor],
    matrices: Mapping[str, Matrices],
    norms: Mapping[str, torch.Tensor],
    *,
    trained: Collection[str],
    stored: Mapping[str, torch.Tensor],
    logits: bool,
    epochs: int,
    progress: Callable[[int, int], None],
) -> Tuned:
    """Trains on `batches` of tokens [batch, n].

    `norms` are those that differ from the file's, `trained` the names of those to train, `stored` the other tensors
    that differ. `logits` says what the graph's output is.
    """
    student = _Student(run, matrices, norms, trained, stored)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = run.forward(tokens)
        return divergence(wanted, student.output(tokens), logits)

    def divergences(batches: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([loss(batch).flatten() for batch in batches])

    kept = set(range(min(_HELD_OUT // 2, len(batches) - 1), len(batches), _HELD_OUT))
    aside = [batches[i] for i in kept]
    seen = [batch for i, batch in enumerate(batches) if i not in kept]
    if not seen or not student.parameters:
        return Tuned({}, {}, 0.0, 0.0)
    before = divergences(aside)
    optimizer = torch.optim.Adam(student.parameters, lr=_RATE, betas=(0.9, 0.95))
    steps, step = epochs * len(seen), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for i in torch.randperm(len(seen), generator=generator).tolist():
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 - step / steps)
            optimizer.zero_grad()
            loss(seen[i]).mean().backward()
            optimizer.step()
            step += 1
            progress(step, steps)
    after = divergences(aside)
    # A few positions hold a third of the divergence. Where they fall is luck, so they must not decide.
    usual = (before + after).argsort()[: int(_USUAL * len(before)) or 1]
    if not after[usual].mean() < before[usual].mean():
        return Tuned({}, {}, float(before.mean()), float(after.mean()))
    with torch.no_grad():
        return Tuned(student.norms(), student.matrices(), float(before.mean()), float(after.mean()))
