"""What is known of one model, gathered for a page: its tensors, what its activations look like, what was measured.

`gather` collects; `report_page.render` draws. Activations are those of the model itself on a text, taken in llama.cpp
as calibration does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import Progress, no_progress
from agq_gguf.errors import InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.metadata import PRUNE_LAYERS, read_errors
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.gguf_io.tensor_names import kind_of, layer_of
from agq_gguf.inspection.inspect import ModelInfo, inspect_file
from agq_gguf.text import PACKAGED_CALIBRATION, LoadedText, load_text

_PROMPT_TOKENS = 384


@dataclass(frozen=True)
class InputRange:
    """The input of some weights over a text, channels in their original order."""

    layer: int  # -1: outside the layers, such as the output matrix
    kind: str  # name of the first weight without its layer, such as attn_q
    weights: tuple[str, ...]
    abs_max: NDArray[np.float32]  # [K]
    rms: NDArray[np.float32]  # [K]
    exponents: NDArray[np.uint8]  # [K / 64], refinement of each group of stored columns
    order: NDArray[np.int64]  # [K], channel of each stored column


@dataclass(frozen=True)
class Measured:
    """Figures of `agq-gguf bench --json` and `evaluate --json`, one entry for each model."""

    bench: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SamplePrompt:
    """What token pruning makes of a prompt."""

    pieces: list[tuple[str, int]]  # text, and the layer behind which its tokens were dropped, -1: they stayed
    first_attention: dict[int, NDArray[np.float32]]  # layer -> each token's attention to the first, mean of heads

    @property
    def layers(self) -> list[int]:
        """Layers behind which tokens were dropped."""
        return sorted({layer for _, layer in self.pieces if layer >= 0})


@dataclass(frozen=True)
class ReportData:
    """All that the page shows."""

    model: ModelInfo
    ranges: list[InputRange]
    text: str  # what the ranges were taken on, for people
    errors: dict[str, float]  # tensor -> squared output error over squared output, on calibration data
    prompt: SamplePrompt | None  # of a model that prunes tokens
    measured: Measured


def gather(
    path: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    tokens: int = 2048,
    threads: int = 0,
    bench: Sequence[str | os.PathLike[str]] = (),
    evaluations: Sequence[str | os.PathLike[str]] = (),
    progress: Progress = no_progress,
) -> ReportData:
    """Reads the model and runs `tokens` tokens of a text through it (the one in the package by default; 0: none).

    `bench` and `evaluations` are files with what those commands print with --json. Raises InputError or HostError.
    """
    model = inspect_file(path)
    measured = Measured(
        [entry for file in bench for entry in _entries(file, "models")],
        [entry for file in evaluations for entry in _entries(file, None)],
    )
    with open_model(path) as reader:
        loaded = load_text(text or PACKAGED_CALIBRATION)
        ranges = _ranges(reader, model, loaded, tokens, threads, progress) if tokens else []
        errors = read_errors(reader)
        prompt = _sample_prompt(reader, loaded, threads) if tokens else None
    source = "the text in the package" if text is None else Path(text).name
    return ReportData(model, ranges, f"{tokens} tokens of {source}" if ranges else "", errors, prompt, measured)


def _entries(path: str | os.PathLike[str], key: str | None) -> list[dict[str, Any]]:
    """Entries of a JSON file of ours: those under `key`, or the whole as one."""
    wanted = "bench" if key else "evaluate"
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        found = value[key] if key else [value]
        needed = {"prompt", "generation"} if key else {"mean_kl", "perplexity", "model"}
        if all(needed <= set(entry) for entry in found):
            return list(found)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not what `agq-gguf {wanted} --json` prints")


def _sample_prompt(reader: Reader, text: LoadedText, threads: int) -> SamplePrompt | None:
    """The beginning of a text as a prompt, if the model says behind which layers it drops tokens."""
    layers = reader.get(PRUNE_LAYERS)
    if not isinstance(layers, np.ndarray) or not layers.size or layers.dtype.kind not in "iu":
        return None
    from agq_gguf.runtime.model_file import prepare
    from agq_gguf.runtime.plugin import options
    from agq_gguf.runtime.pruned import last_importance, read_prompt
    from agq_gguf.runtime.text import open_llama

    prepare(reader.path)
    llama = open_llama(reader.path, context=_PROMPT_TOKENS, threads=threads)
    try:
        tokens = llama.tokenize(text.whole[: 16 * _PROMPT_TOKENS].encode())[:_PROMPT_TOKENS]
        pieces, _ = read_prompt(llama, tokens)
    finally:
        llama.close()
    # A threshold of 0 drops nothing, but makes the plugin work out the score of the paper at that layer.
    found = {}
    for layer in sorted({int(layer) for layer in layers}):
        with options(prune=f"{layer}:t0;score=first;keep=0;reach=0"):
            llama = open_llama(reader.path, context=_PROMPT_TOKENS, threads=threads)
        try:
            llama.eval(tokens)
            values = last_importance(layer)
        finally:
            llama.close()
        if len(values) == len(tokens):
            found[layer] = np.where(np.isfinite(values), values, np.float32(np.nan))
    return SamplePrompt(pieces, found)


def _ranges(
    reader: Reader, model: ModelInfo, text: LoadedText, tokens: int, threads: int, progress: Progress
) -> list[InputRange]:
    """What the inputs of the AGQ4 weights look like, in the order of the graph."""
    from agq_gguf.calibration.collect import Calibrator

    shapes = {t.name: tuple(t.shape) for t in model.tensors if t.agq is not None}
    if not shapes:
        return []
    found = []
    with Calibrator.open(reader.path, text, shapes, max_tokens=tokens, threads=threads) as calibrator:
        (part,) = calibrator.passes(0, hessians=False)
        total = calibrator.n_tokens

        def report(done: int) -> None:
            progress("report", done, total, "")

        for one, stats in zip(part, calibrator.collect(part, 0, report, hessians=False), strict=True):
            whole, name = stats.whole, one.weights[0]
            layer = layer_of(name)
            parameters = reader.parameters(name)
            assert whole.abs_max is not None
            found.append(
                InputRange(
                    -1 if layer is None else layer,
                    kind_of(name),
                    one.weights,
                    whole.abs_max,
                    np.sqrt(whole.mean_square),
                    parameters.exponents,
                    blocks.channel_order(parameters.listed, whole.columns),
                )
            )
    return found
