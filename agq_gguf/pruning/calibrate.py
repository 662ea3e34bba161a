"""Chooses which tokens a model drops, by running it on a text, and writes that into its file."""

from __future__ import annotations

import os

from agq_gguf.arguments import Progress, Text, no_progress
from agq_gguf.errors import FormatError, InputError
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.gguf_io.writer import check_writable
from agq_gguf.pruning.by_answers import by_answers
from agq_gguf.pruning.by_share import by_share
from agq_gguf.pruning.file import carriers, write_plan
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import work_of
from agq_gguf.pruning.report import PruneReport, metadata_of
from agq_gguf.text import load_text


def calibrate_pruning(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    calibration: Text | None = None,
    choice: PruneOptions | None = None,
    progress: Progress = no_progress,
) -> PruneReport | None:
    """Chooses which tokens the AGQ4 model `src` drops, and writes the result to `dst`.

    Without a share of the work to save in `choice`, it saves as much as keeps the model's answers to questions about
    facts in the text; if nothing keeps them, InputError says so. With a share of 0 the pruning is removed from the
    model; that needs no text and returns None.

    `dst` may be `src`; it is replaced only when the new file is complete. `calibration` is the path of a text file, or
    strings of text, similar to what the model will read. Raises InputError, FormatError, HostError or OutputError, and
    then leaves `dst` unchanged.
    """
    choice = choice or PruneOptions()
    check_writable(dst)
    with open_model(src) as reader:
        held_by = carriers(reader)
        if choice.share == 0:
            write_plan(reader, dst, {}, {}, progress)
            return None
        if calibration is None:
            raise InputError("calibrating pruning needs a text; give one with --calibration")
        if not held_by:
            raise FormatError(f"{src}: has no AGQ4 matrix with room for a pruning record; quantize the model first")
        sizes = {name: tensor.n_elements for name, tensor in reader.tensors.items()}
    work = work_of(sizes)
    allowed = sorted(layer for layer in held_by if layer < work.n_layer - 1)
    if choice.layers and (missing := sorted(set(choice.layers) - set(allowed))):
        known = ", ".join(map(str, allowed)) or "none"
        raise InputError(f"{src}: layer {missing[0]} cannot be a pruning layer; possible layers: {known}")
    loaded = load_text(calibration)
    if choice.share is None:
        report = by_answers(src, loaded, choice, allowed, work, progress)
    else:
        report = by_share(src, loaded, choice, allowed, work, sizes, held_by, progress)
    with open_model(src) as reader:
        write_plan(reader, dst, report.records(), metadata_of(report), progress)
    return report
