"""Collects the facts about one model for its page: tensors, activations, and measurements.

`gather` collects them; `report_page.render` makes the page. Activations are those of the model on a text, read from
llama.cpp as in calibration.
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
    """The range of one input of weights over a text; channels in their original order."""

    layer: int  # -1: outside the layers, such as for the output matrix
    kind: str  # name of the first weight without its layer, such as attn_q
    weights: tuple[str, ...]
    abs_max: NDArray[np.float32]  # [K]
    rms: NDArray[np.float32]  # [K]
    exponents: NDArray[np.uint8]  # [K / 64], refinement of each group of stored columns
    order: NDArray[np.int64]  # [K], channel of each stored column


@dataclass(frozen=True)
class Measured:
    """Results of `agq-gguf bench --json` and `evaluate --json`, one entry for each model."""

    bench: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SamplePrompt:
    """The result of token pruning for a prompt."""

    pieces: list[tuple[str, int]]  # text, and the layer after which its tokens were dropped (-1: kept)
    first_attention: dict[int, NDArray[np.float32]]  # layer -> attention of each token to the first, mean of heads

    @property
    def layers(self) -> list[int]:
        """Layers after which tokens were dropped."""
        return sorted({layer for _, layer in self.pieces if layer >= 0})


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows."""

    model: ModelInfo
    ranges: list[InputRange]
    text: str  # description of the text behind `ranges`
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
    """Reads the model and runs `tokens` tokens of a text through it (0: none; default text: the one in the package).

    `bench` and `evaluations` are files with the output of those commands with --json. Raises InputError or HostError.
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
    """Entries of a JSON file that bench or evaluate printed: those under `key`, or the whole file as one entry."""
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
    raise InputError(f"{path}: expected the output of `agq-gguf {wanted} --json`, not of an encoder")


def _sample_prompt(reader: Reader, text: LoadedText, threads: int) -> SamplePrompt | None:
    """Runs the beginning of a text as a prompt, if the model prunes; else None."""
    layers = reader.get(PRUNE_LAYERS)
    if not isinstance(layers, np.ndarray) or not layers.size or layers.dtype.kind not in "iu":
        return None
    from agq_gguf.runtime.model_file import prepare
    from agq_gguf.runtime.plugin import options
    from agq_gguf.runtime.pruned import last_importance, pieces_of
    from agq_gguf.runtime.text import TextModel

    prepare(reader.path)
    with TextModel(reader.path, context=_PROMPT_TOKENS, threads=threads) as model:
        tokens = model.tokenize(text.whole[: 16 * _PROMPT_TOKENS])[:_PROMPT_TOKENS]
        model.read(tokens)
        pieces, _ = pieces_of(tokens.tolist(), model.detokenize)
    # A threshold of 0 drops nothing, but makes the plugin compute the score of the Agile-Quant paper at that layer.
    found = {}
    for layer in sorted({int(layer) for layer in layers}):
        with (
            options(prune=f"{layer}:t0;score=first;keep=0;reach=0"),
            TextModel(reader.path, context=_PROMPT_TOKENS, threads=threads) as model,
        ):
            model.read(tokens)
            values = last_importance(layer)
        if len(values) == len(tokens):
            found[layer] = np.where(np.isfinite(values), values, np.float32(np.nan))
    return SamplePrompt(pieces, found)


def _ranges(
    reader: Reader, model: ModelInfo, text: LoadedText, tokens: int, threads: int, progress: Progress
) -> list[InputRange]:
    """Ranges of the inputs of the AGQ4 weights, in graph order."""
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
