"""The methods that format_study.py compares: 4-bit weight formats and roundings of activations, simulated in PyTorch.

Each function takes f32 tensors and returns them as rounded by a file or a kernel, also in f32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

IQ4_NL = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)


# weights: codebooks and scales


@dataclass(frozen=True)
class Scheme:
    """A 4-bit weight format, and the options to choose its numbers."""

    group: int = 64
    scale: str = "12"  # "f32", "16": binary16, "12": its upper 12 bits, "sub": binary16 per 128 and 4 bits per 64
    codebook: str = "learned7"  # "uniform" (with a zero point), "fixed8", "fixed7", "learned7", "learned" (not rounded)
    lloyd: int = 4
    candidates: int = 12
    refit: bool = True
    weighted: bool = True
    gptq: bool = True
    damp: float = 0.01
    inverse: bool = False  # weight a group's scale search by what remains of an error after feedback, 1 / U_kk^2
    order: str = "none"  # most active column first: "groups": whole groups, "static": groups and scales stay, "stored"
    rotated: bool = False  # each group of 64 columns is multiplied by a Hadamard matrix before


@dataclass
class Stats:
    """Calibration statistics of one input: second moments (K, K), largest values (K), a few rows (n, K)."""

    hessian: torch.Tensor
    amax: torch.Tensor
    rows: torch.Tensor
    importance: torch.Tensor = field(default_factory=lambda: torch.ones(1))


def round_scale(d: torch.Tensor, kind: str) -> torch.Tensor:
    """Scales rounded as in the file; "12" is sign, 5 bits of exponent, 6 of mantissa, with a common factor alpha."""
    if kind == "f32":
        return d
    alpha = d.abs().amax().clamp_min(1e-30)
    half = (d / alpha).half()
    if kind in ("16", "sub"):
        return half.float() * alpha
    bits = (half.view(torch.int16).int() + 8) & ~15
    return bits.to(torch.int16).view(torch.float16).float() * alpha


class Codebook:
    """16 ascending values; rounds with a table of 4096 cells, which is much faster than a search."""

    def __init__(self, values: torch.Tensor):
        """Makes the table: for each cell the code nearest to its middle."""
        self.values, self.top = values, float(values.abs().max())
        cells = (torch.arange(4096) - 2047.5) / 2048 * self.top
        self.table = torch.bucketize(cells, (values[1:] + values[:-1]) / 2)
        self.rounded = values[self.table]

    def cell(self, x: torch.Tensor) -> torch.Tensor:
        """Cell of each x."""
        return x.mul(2048 / self.top).add_(2048).clamp_(0, 4095).long()

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The value nearest to each x."""
        return self.rounded.take(self.cell(x))

    def code(self, x: torch.Tensor) -> torch.Tensor:
        """The index of the value nearest to each x."""
        return self.table.take(self.cell(x))


def search_scale(w: torch.Tensor, h: torch.Tensor, book: Codebook, scheme: Scheme, kind: str = "") -> torch.Tensor:
    """Signed scale per row that minimizes sum h (w - d * code)^2. w: (rows, n), h: (n); returns (rows, 1)."""
    kind = kind or scheme.scale
    top = w.abs().amax(1, keepdim=True).clamp_min(1e-12) / book.top
    best_d, best_e = top, torch.full_like(top, torch.inf)

    def consider(d: torch.Tensor) -> torch.Tensor:
        nonlocal best_d, best_e
        d = round_scale(d, kind)
        d = torch.where(d.abs() < 1e-20, torch.full_like(d, 1e-20), d)
        q = book.nearest(w / d)
        e = (h * (w - d * q).square()).sum(1, keepdim=True)
        best_d, best_e = torch.where(e < best_e, d, best_d), torch.minimum(e, best_e)
        return (h * w * q).sum(1, keepdim=True) / (h * q * q).sum(1, keepdim=True).clamp_min(1e-30)

    factors = torch.linspace(0.7, 1.2, scheme.candidates).tolist() if scheme.candidates > 1 else [1.0]
    for factor in factors:
        for sign in (1, -1):
            consider(sign * factor * top)
    if scheme.refit:
        for _ in range(2):
            again = (h * w * (q := book.nearest(w / best_d))).sum(1, keepdim=True)
            consider(again / (h * q * q).sum(1, keepdim=True).clamp_min(1e-30))
    return best_d


def uniform(w: torch.Tensor, h: torch.Tensor, scheme: Scheme) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Asymmetric grid d * (q - z), with z in sixteenths; returns a function that rounds column i of the group."""
    low, high = w.amin(1, keepdim=True).clamp_max(0), w.amax(1, keepdim=True).clamp_min(0)
    best = [torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)]
    steps = torch.linspace(0.6, 1.0, scheme.candidates).tolist() if scheme.candidates > 1 else [1.0]
    for a in steps[:: max(1, len(steps) // 6)]:
        for b in steps[:: max(1, len(steps) // 6)]:
            d = round_scale(((b * high - a * low) / 15).clamp_min(1e-12), "16")
            z = ((-a * low / d) * 16).round().clamp(0, 255) / 16
            e = (h * (w - d * ((w / d + z).round().clamp(0, 15) - z)).square()).sum(1, keepdim=True)
            better = e < best[2]
            best = [torch.where(better, new, old) for new, old in zip((d, z, e), best, strict=True)]
    d, z = best[0], best[1]
    return lambda x, i: d * ((x / d + z).round().clamp(0, 15) - z)


def group_rounder(
    w: torch.Tensor, h: torch.Tensor, book: Codebook, scheme: Scheme
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Chooses the numbers of one group (rows, group), and returns a function that rounds values of its column i."""
    if scheme.codebook == "uniform":
        return uniform(w, h, scheme)
    if scheme.scale != "sub":
        d = search_scale(w, h, book, scheme)
        return lambda x, i: d * book.nearest(x / d)
    halves = torch.stack([search_scale(w[:, s], h[s], book, scheme, "f32") for s in (slice(0, 64), slice(64, 128))], 1)
    top = round_scale(halves.abs().amax(1) / 15, "16")
    part = (halves.abs() / top[:, None]).round().clamp(1, 15) * top[:, None] * halves.sign()
    return lambda x, i: part[:, i // 64] * book.nearest(x / part[:, i // 64])


def to_seven_bits(book: torch.Tensor) -> torch.Tensor:
    """The codebook as integers -64..63, with the largest magnitude at -64 (or 63)."""
    if book.abs().max() != -book.min():
        book = -book.flip(0)
    return (book * 64 / book.abs().max()).round().clamp(-64, 63)


def learn_codebook(w: torch.Tensor, h: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Lloyd's iterations on (codebook, scales): minimizes sum h (w - d * code)^2 over some rows. w: (rows, K)."""
    book = IQ4_NL / 127
    rows = w[torch.randperm(len(w), generator=torch.Generator().manual_seed(0))[: max(1, (1 << 16) // w.shape[1])]]
    groups = rows.unflatten(1, (-1, scheme.group))
    weight = h.view(-1, scheme.group)
    for _ in range(scheme.lloyd):
        quick = replace(scheme, candidates=5, scale="f32")
        now = Codebook(book)
        d = torch.stack([search_scale(groups[:, g], weight[g], now, quick) for g in range(groups.shape[1])], 1)
        index = now.code(groups / d).flatten()
        above = torch.zeros(16).scatter_add_(0, index, (weight * d * groups).flatten())
        below = torch.zeros(16).scatter_add_(0, index, (weight * d * d).expand_as(groups).flatten())
        book = torch.where(below > 0, above / below.clamp_min(1e-30), book).sort().values
        book = book / book.abs().max()
    return book


def make_codebook(w: torch.Tensor, h: torch.Tensor, scheme: Scheme) -> Codebook:
    """The 16 values of the scheme for this tensor."""
    if scheme.codebook in ("uniform", "fixed8"):
        return Codebook(IQ4_NL)
    book = IQ4_NL / 127 if scheme.codebook == "fixed7" else learn_codebook(w, h, scheme)
    return Codebook(book if scheme.codebook == "learned" else to_seven_bits(book))


def column_order(activity: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The order (K) in which error feedback rounds columns, from the mean square of each."""
    if scheme.order == "none":
        return torch.arange(len(activity))
    if scheme.order != "groups":
        return activity.argsort(descending=True)
    parts = activity.view(-1, scheme.group)
    groups = parts.sum(1).argsort(descending=True)
    return (groups[:, None] * scheme.group + parts.argsort(1, descending=True)[groups]).flatten()


def quantize(w: torch.Tensor, hessian: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Rounds a weight (rows, K), with error feedback if the scheme has it; returns the restored weight."""
    if scheme.rotated:
        return rotated(quantize(rotated(w), rotated(rotated(hessian).T), replace(scheme, rotated=False)))
    h = hessian.diagonal().clamp_min(1e-12) if scheme.weighted else torch.ones(w.shape[1])
    book = make_codebook(w, h, scheme)
    size, count = scheme.group, w.shape[1]
    if not scheme.gptq:
        parts = []
        for k in range(0, count, size):
            part = w[:, k : k + size]
            rounder = group_rounder(part, h[k : k + size], book, scheme)
            parts.append(torch.cat([rounder(part[:, i : i + 1], i) for i in range(size)], 1))
        return torch.cat(parts, 1)
    order = column_order(hessian.diagonal(), scheme)
    group_of = order // size if scheme.order == "static" else torch.arange(count) // size
    w0, w, h, hessian = w, w[:, order].clone(), h[order], hessian[order][:, order].double()
    hessian = hessian + scheme.damp * hessian.diagonal().mean() * torch.eye(count)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    if scheme.inverse:
        h = upper.diagonal().square().reciprocal()
    static = {}
    if scheme.order == "static":
        weights = torch.empty_like(h).scatter_(0, order, h)
        for g in range(count // size):
            s = slice(g * size, (g + 1) * size)
            static[g] = group_rounder(w0[:, s], weights[s], book, scheme)
    done = torch.empty_like(w)
    for start in range(0, count, size):
        stop = start + size
        errors = torch.empty(len(w), size)
        own = None if static else group_rounder(w[:, start:stop], h[start:stop], book, scheme)
        for i in range(start, stop):
            now = own or static[int(group_of[i])]
            done[:, i] = now(w[:, i : i + 1], int(order[i]) % size if static else i - start)[:, 0]
            errors[:, i - start] = (w[:, i] - done[:, i]) / upper[i, i]
            w[:, i + 1 : stop] -= errors[:, i - start, None] * upper[i, i + 1 : stop]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return torch.empty_like(done).index_copy_(1, order, done)


def q8_0(w: torch.Tensor) -> torch.Tensor:
    """ggml's Q8_0: blocks of 32, binary16 scale."""
    x = w.unflatten(1, (-1, 32))
    d = (x.abs().amax(-1, keepdim=True) / 127).half().float().clamp_min(1e-12)
    return (d * (x / d).round()).flatten(1)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Groups of 64 columns (..., K) times the Hadamard matrix over 8, which is its own inverse."""
    matrix = torch.ones(1, 1)
    for _ in range(6):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.unflatten(-1, (-1, 64)) @ (matrix / 8)).flatten(-2)


# activations


@dataclass
class Refinement:
    """Two-refine parameters of one input: channel order (K) and exponents (K / 64)."""

    order: torch.Tensor
    exponents: torch.Tensor


def quantize_activations(x: torch.Tensor, bits: int, group: int, refinement: Refinement | None = None) -> torch.Tensor:
    """x (..., K) rounded to ``bits``, one scale per token (group 0) or per token and group of columns."""
    top = 2 ** (bits - 1) - 1
    if refinement is not None:
        factor = torch.ones_like(refinement.order, dtype=torch.float32)
        factor[refinement.order] = torch.exp2(refinement.exponents.float()).repeat_interleave(64)
        return (
            quantize_activations(x / factor, bits, 0) * factor if group == 0 else _grouped(x, factor, top, refinement)
        )
    y = x.unflatten(-1, (-1, group)) if group else x
    s = y.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
    y = (y / s).round() * s
    return y.flatten(-2) if group else y


def _grouped(x: torch.Tensor, factor: torch.Tensor, top: int, refinement: Refinement) -> torch.Tensor:
    """Per token and group of 64 columns in the refinement's channel order (exponents cancel out)."""
    y = x[..., refinement.order].unflatten(-1, (-1, 64))
    s = y.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
    back = torch.empty_like(refinement.order)
    back[refinement.order] = torch.arange(len(back))
    return ((y / s).round() * s).flatten(-2)[..., back]


def activation_error(stats: Stats, refinement: Refinement | None, bits: int, relative: bool) -> float:
    """Error of the matrix products on the calibration rows; ``relative``: mean of each row's error over its energy."""
    error = (quantize_activations(stats.rows, bits, 0, refinement) - stats.rows).square() @ stats.importance
    energy = stats.rows.square() @ stats.importance
    return float((error / energy.clamp_min(1e-12)).mean() if relative else error.sum() / energy.sum())


def refine(
    stats: Stats, exponents: tuple[int, ...], listed: tuple[int, ...], bits: int, relative: bool = True
) -> Refinement | None:
    """Best of the given exponents and numbers of listed channels (0: no reordering), or None if none helps."""
    count = len(stats.amax)
    best, least = None, activation_error(stats, None, bits, relative) * 0.98
    by_size = stats.amax.argsort(descending=True)
    for n in (n for n in listed if n < count):
        rest = torch.ones(count, dtype=torch.bool)
        rest[by_size[:n]] = False
        order = torch.cat([by_size[:n], torch.arange(count)[rest]])
        high = stats.amax[order].view(-1, 64).amax(1)
        groups = -(-n // 64) if n else 0
        for r in exponents:
            if r < 0:  # one exponent per group, from its largest value against the smallest group's
                e = (high / high.amin().clamp_min(1e-30)).log2().round().clamp(0, -r)
            elif n:
                e = torch.where(torch.arange(count // 64) < groups, r, 0)
            else:
                e = torch.where(high > high.median() * 2**r * 0.75, r, 0)
            candidate = Refinement(order, e)
            error = activation_error(stats, candidate, bits, relative)
            if error < least:
                best, least = candidate, error
    return best


def threshold_refine(stats: Stats, r: int, times: float) -> Refinement | None:
    """A simple rule: channels whose maximum exceeds ``times`` the median channel's come first, with exponent r."""
    n = int((stats.amax > times * stats.amax.median()).sum())
    if n == 0 or n >= len(stats.amax):
        return None
    by_size = stats.amax.argsort(descending=True)
    order = torch.cat([by_size[:n], by_size[n:].sort().values])
    return Refinement(order, torch.where(torch.arange(len(order) // 64) < -(-n // 64), r, 0))


def sorted_refine(stats: Stats, bits: int = 8) -> Refinement:
    """Lists all channels by energy, as ``Scheme(order="stored")`` stores weights; exponents by coordinate descent."""
    order = stats.hessian.diagonal().argsort(descending=True)
    best = Refinement(order, torch.zeros(len(order) // 64))
    least = activation_error(stats, best, bits, relative=True)
    for _ in range(3):
        before = least
        for g in range(len(best.exponents)):
            for moved in ([g], list(range(g + 1))):
                for change in (1, -1):
                    exponents = best.exponents.clone()
                    exponents[moved] += change
                    trial = Refinement(order, exponents)
                    error = activation_error(stats, trial, bits, relative=True)
                    if error < least and exponents.min() >= 0 and exponents.max() <= 15:
                        best, least = trial, error
        if least == before:
            break
    return best
