"""Plans for a `target_bpw`: all supported tensors are AGQ4, and those the model is most sensitive to get more bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from agq_gguf._version import __version__
from agq_gguf.arguments import Progress
from agq_gguf.calibration.imatrix import Imatrix
from agq_gguf.calibration.stats import InputStats
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.gguf_io.tensor_names import EMBEDDING, OUTPUT
from agq_gguf.graphs.support import open_graph
from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.quantization.budget import costs, knapsack
from agq_gguf.quantization.options import LARGER_TYPES, QuantizeOptions
from agq_gguf.quantization.resume import Journal, digest
from agq_gguf.quantization.type_plan import TensorPlan, plan

if TYPE_CHECKING:
    from agq_gguf.calibration.session import Session

# Number of tokens for gradients, in a few chunks. Logits are kept for all of them.
_TOKENS = 1024
_CHUNK = 256


def choose_types(
    reader: Reader,
    session: Callable[[], Session] | None,
    imatrix: Imatrix | None,
    options: QuantizeOptions,
    progress: Progress,
) -> list[TensorPlan]:
    """Plans of at most `options.target_bpw` bits per weight.

    This includes an output or embedding type of "auto". Raises InputError if the target is too small for the model.
    """
    output = OUTPUT if OUTPUT in reader.tensors else EMBEDDING
    fixed = {"output_type": options.output_type, "embedding_type": options.embedding_type}
    plans = plan(
        reader,
        keep_types=options.keep_types,
        **{key: "agq4" if value == "auto" else value for key, value in fixed.items()},
    )
    may_choose = {EMBEDDING: options.embedding_type == "auto", output: options.output_type == "auto"}
    types = knapsack.open_types(plans, may_choose, options.target_types or LARGER_TYPES)
    knapsack.choose(plans, {}, options.target_bpw)  # raises for a target that is too small, before the work begins

    def report(done: int, total: int, name: str) -> None:
        progress("sensitivity", done, total, name)

    cost = None if session is None else _by_gradients(reader, session(), options, types, report)
    if cost is None:
        stats = _mean_squares(reader, session, imatrix, options, types)
        cost = costs.by_errors(reader, output, stats, types, options.matrix, report)
    return knapsack.choose(plans, cost, options.target_bpw)


def _by_gradients(
    reader: Reader,
    session: Session,
    options: QuantizeOptions,
    types: Mapping[str, Iterable[str]],
    report: Callable[[int, int, str], None],
) -> costs.Damage | None:
    """What each tensor costs; None if the model's graph does not run in PyTorch.

    With `options.shared` the result is kept there: it does not depend on the target.
    """
    tokens = _tokens(session, options)
    chunks, journal = tokens.numpy().astype(np.int32), Journal(None)
    if options.shared:
        key = digest(reader, chunks, f"{__version__} {options.matrix} {types}")
        journal = Journal(Path(options.shared) / "costs", key, stays=True)
    kept = journal.get("costs")
    if kept is not None:
        found: costs.Damage = json.loads(str(kept["costs"]))
        return found
    try:
        run = open_graph(reader, session.model, chunks[0], options.memory // 4, options.threads, options.device)
    except Unsupported:
        return None
    found = costs.by_gradients(run, tokens, types, options.matrix, report, logits=not session.model.facts.embeds)
    journal.put("costs", {"costs": np.str_(json.dumps(found))})
    return found


def _tokens(session: Session, options: QuantizeOptions) -> torch.Tensor:
    """Some chunks of the text, [batch, n] int64."""
    chunks = session.chunks(session.chunk_size(min(_CHUNK, options.context)), _TOKENS, equal=True)
    return torch.from_numpy(np.stack(chunks).astype(np.int64))


def _mean_squares(
    reader: Reader,
    session: Callable[[], Session] | None,
    imatrix: Imatrix | None,
    options: QuantizeOptions,
    types: Iterable[str],
) -> dict[str, InputStats]:
    """Statistics of the inputs, from whichever source is given; experts are pooled."""
    if session is None:
        return {} if imatrix is None else {name: found.whole for name, found in imatrix.weights.items()}
    from agq_gguf.calibration.collect import Calibrator

    shapes = {name: reader.tensors[name].shape for name in types}
    few = {"context": options.context, "max_tokens": 4 * _TOKENS, "threads": options.threads}
    with Calibrator(session(), shapes, **few) as calibrator:
        collected = calibrator.collect(calibrator.inputs, options.memory, lambda done: None, hessians=False)
        return {
            name: stats.whole
            for found, stats in zip(calibrator.inputs, collected, strict=True)
            for name in found.weights
        }
