"""The demo: quantizes the packaged model to AGQ4, and compares it with stock Q4_0 made from the same file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agq_gguf.arguments import Progress, no_progress
from agq_gguf.errors import HostError, missing_package
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.measure.bench import bench
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.measure.row import Row
from agq_gguf.runtime.stock_quantize import quantize_stock
from agq_gguf.runtime.text import TextModel
from agq_gguf.text import DATA, PACKAGED_CALIBRATION, PACKAGED_EVALUATION, read_text

MODEL, CALIBRATION, EVALUATION = DATA / "story-f16.gguf", PACKAGED_CALIBRATION, PACKAGED_EVALUATION
PROMPT = "Once upon a time"
_CHUNKS = 40  # of the evaluation text
_PROMPT_TOKENS, _GENERATED_TOKENS, _REPETITIONS = 256, 64, 5
_TEXT_TOKENS, _TEMPERATURE, _SEED = 96, 0.7, 4


@dataclass(frozen=True)
class Demonstration:
    """Results of the demo."""

    prompt: str
    text: str  # written by the AGQ4 model
    rows: list[Row]  # the source is F16


def run(folder: Path, *, threads: int = 0, progress: Progress = no_progress) -> Demonstration:
    """Makes the AGQ4 and the Q4_0 model in `folder`, which must exist, and compares them. Raises AgqError."""
    try:
        from agq_gguf.quantization.options import QuantizeOptions
        from agq_gguf.quantization.pipeline import quantize
    except ImportError as e:
        raise missing_package("the demo", e, "convert") from e
    missing = [path.name for path in (MODEL, CALIBRATION, EVALUATION) if not path.is_file()]
    if missing:
        raise HostError(f"this package has no {', '.join(missing)} in {DATA}; install it again")
    paths = {"F16": MODEL, "Q4_0": folder / "story-q4_0.gguf", "AGQ4": folder / "story-agq4.gguf"}

    quantize(MODEL, paths["AGQ4"], calibration=CALIBRATION, options=QuantizeOptions(threads=threads), progress=progress)
    quantize_stock(MODEL, paths["Q4_0"], "q4_0", threads)

    text = read_text(EVALUATION)
    judged = {
        name: evaluate(
            paths[name],
            MODEL,
            text,
            chunks=_CHUNKS,
            threads=threads,
            progress=_renamed(progress, f"evaluate {name}"),
        )
        for name in ("Q4_0", "AGQ4")
    }

    speeds = bench(
        list(paths.values()),
        prompt=_PROMPT_TOKENS,
        generation=_GENERATED_TOKENS,
        repetitions=_REPETITIONS,
        threads=threads,
        starts=False,
        progress=progress,
    )
    rows = []
    for (name, path), speed in zip(paths.items(), speeds, strict=True):
        assert speed.prompt is not None and speed.generation is not None
        found = judged.get(name)
        rows.append(
            Row(
                name=name,
                path=str(path),
                file_bytes=speed.file_bytes,
                bits_per_weight=inspect_file(path).bits_per_weight,
                mean_kl=found.mean_kl if found else 0.0,
                mean_kl_error=found.mean_kl_error if found else 0.0,
                perplexity=found.perplexity if found else judged["AGQ4"].reference_perplexity,
                top1_agreement=found.top1_agreement if found else 1.0,
                prompt_speed=speed.prompt.median,
                generation_speed=speed.generation.median,
            )
        )
    return Demonstration(PROMPT, _generate(paths["AGQ4"], threads), rows)


def _renamed(progress: Progress, phase: str) -> Progress:
    """Progress shown under another name, so that each of two evaluations has its own line."""
    return lambda _, done, total, what: progress(phase, done, total, what)


def _generate(path: Path, threads: int) -> str:
    """A text that starts with PROMPT."""
    with TextModel(path, threads=threads) as model:
        return PROMPT + "".join(model.continued(PROMPT, tokens=_TEXT_TOKENS, temperature=_TEMPERATURE, seed=_SEED))
