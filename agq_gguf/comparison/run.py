"""Makes the files of a comparison, and measures their quality and speed. What is finished is kept in the folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf._version import __version__
from agq_gguf.arguments import PathName, Progress, no_progress
from agq_gguf.calibration.importance import importance
from agq_gguf.comparison.candidates import Candidate
from agq_gguf.comparison.result import Comparison
from agq_gguf.errors import OutputError
from agq_gguf.gguf_io.reader import check_source
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.gguf_io.writer import check_writable
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.measure.bench import Result, bench
from agq_gguf.measure.evaluate import Evaluation, check_length, evaluate
from agq_gguf.measure.row import Row
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.machine import processor
from agq_gguf.runtime.model import FlashAttention, Model
from agq_gguf.text import LoadedText

STATE = "comparison.json"
SHARED = ".matrices"  # what the AGQ4 files have in common, as long as some are missing


@dataclass(frozen=True)
class Setup:
    """What is compared, and how."""

    candidates: Sequence[Candidate]
    calibration: LoadedText | None  # for AGQ4 and for the importance matrix; None: none
    text: LoadedText  # to measure on
    chunks: int | None = None  # of the text; None: all
    prompt: int = 512  # tokens of the speed measurement
    generation: int = 128
    repetitions: int = 5  # 0: no speed is measured
    threads: int = 0
    flash_attention: FlashAttention = "auto"
    keep_files: bool = True  # else the files are removed at the end


def compare(source: PathName, folder: PathName, setup: Setup, progress: Progress = no_progress) -> Comparison:
    """Makes the files of all candidates in `folder`, evaluates them against `source`, and measures their speed.

    Quality that was measured before, with the same source, texts and options, is read from the folder. Files that are
    there already are used again if they belong to that measurement. Raises InputError, HostError or OutputError.
    """
    source, folder = Path(source), Path(folder)
    with open_model(source) as reader:
        check_source(reader)
    with Model(source) as model:
        model.require_logits()
        check_length(model, setup.text)
        options = next((c.options for c in setup.candidates if c.options), QuantizeOptions())
        tokens = options.tokens_for(model.n_params)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder}: cannot be made: {e.strerror}") from e
    check_writable(folder / STATE)
    state = _State(folder / STATE, _identity(source, setup))

    @cache
    def weights_importance() -> dict[str, NDArray[np.float32]]:
        if setup.calibration is None:
            return {}
        return importance(source, setup.calibration, max_tokens=tokens, threads=setup.threads, progress=progress)

    judged: list[tuple[Candidate, Path, Evaluation]] = []
    needs_files = setup.keep_files or setup.repetitions > 0
    for done, candidate in enumerate(setup.candidates):
        progress("compare", done, len(setup.candidates), candidate.name)
        path = folder / candidate.file_name
        found = state.evaluation(candidate)
        if found is None or (needs_files and not path.is_file()):
            data = weights_importance() if candidate.options is None else {}
            candidate.make(source, path, setup.calibration, data, folder / SHARED, setup.threads, progress)
        if found is None:
            found = evaluate(
                path, source, setup.text, chunks=setup.chunks, threads=setup.threads,
                flash_attention=setup.flash_attention, progress=progress,
            )  # fmt: skip
            state.keep(candidate, found, path)
        judged.append((candidate, path, found))
    shutil.rmtree(folder / SHARED, ignore_errors=True)
    progress("compare", len(setup.candidates), len(setup.candidates), "")
    rows = [_source_row(source, judged), *(state.row(c, path, found) for c, path, found in judged)]
    if setup.repetitions:
        paths = [source, *(path for _, path, _ in judged)]
        rows = [_with_speed(row, speed) for row, speed in zip(rows, _speeds(paths, setup, progress), strict=True)]
    if not setup.keep_files:
        for _, path, _ in judged:
            path.unlink(missing_ok=True)
    return Comparison(
        source=str(source),
        calibration=setup.calibration.name if setup.calibration else "none",
        text=setup.text.name,
        positions=judged[0][2].positions if judged else 0,
        processor=processor().name,
        threads=setup.threads or default_threads(),
        prompt=setup.prompt,
        generation=setup.generation,
        rows=rows,
    )


def _source_row(source: Path, judged: list[tuple[Candidate, Path, Evaluation]]) -> Row:
    info = inspect_file(source)
    perplexity = judged[0][2].reference_perplexity if judged else float("nan")
    return Row("source", str(source), info.file_bytes, info.bits_per_weight, 0.0, 0.0, perplexity, 1.0)


def _with_speed(row: Row, speed: Result) -> Row:
    assert speed.prompt is not None and speed.generation is not None
    return Row(**{**asdict(row), "prompt_speed": speed.prompt.median, "generation_speed": speed.generation.median})


def _speeds(paths: Sequence[Path], setup: Setup, progress: Progress) -> list[Result]:
    return bench(
        paths, prompt=setup.prompt, generation=setup.generation, threads=setup.threads, starts=False,
        repetitions=setup.repetitions, flash_attention=setup.flash_attention, progress=progress,
    )  # fmt: skip


def _identity(source: Path, setup: Setup) -> str:
    """A digest of everything that decides the quality of a candidate, apart from its own options."""
    status = source.stat()
    digest = hashlib.sha256(f"{__version__} {source.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for text in (setup.calibration, setup.text):
        digest.update(b"\0" if text is None else text.whole.encode())
    digest.update(f"{setup.chunks} {setup.flash_attention}".encode())
    return digest.hexdigest()


class _State:
    """What is finished, in a JSON file of the folder."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._found: dict[str, dict[str, Any]] = {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["identity"] == identity:
                self._found = value["found"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing finished, or of another comparison

    def evaluation(self, candidate: Candidate) -> Evaluation | None:
        """The evaluation of a candidate, if it was kept."""
        try:
            return Evaluation(**self._found[candidate.key]["evaluation"])
        except (KeyError, TypeError):  # nothing, or of a version with other fields
            return None

    def keep(self, candidate: Candidate, found: Evaluation, path: Path) -> None:
        """Keeps an evaluation, with the size of its file. Raises OutputError."""
        info = inspect_file(path)
        sizes = {"file_bytes": info.file_bytes, "bits_per_weight": info.bits_per_weight}
        self._found[candidate.key] = {"evaluation": asdict(found), **sizes}
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            new.write_text(json.dumps({"identity": self._identity, "found": self._found}, indent=1), encoding="utf-8")
            new.replace(self._path)
        except OSError as e:
            raise OutputError(f"{self._path}: cannot be written: {e.strerror}") from e

    def row(self, candidate: Candidate, path: Path, found: Evaluation) -> Row:
        """The row of a candidate whose evaluation was kept."""
        kept = self._found[candidate.key]
        return Row(
            candidate.name, str(path), kept["file_bytes"], kept["bits_per_weight"], found.mean_kl, found.mean_kl_error,
            found.perplexity, found.top1_agreement,
        )  # fmt: skip
