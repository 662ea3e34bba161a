"""The command `evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.files import check_picture
from agq_gguf.cli.options import Flash, FlashOption, Json, ModelArgument, PlotOption, Quiet, Threads
from agq_gguf.errors import InputError
from agq_gguf.inspection import plots
from agq_gguf.runtime.model_file import check_model_file
from agq_gguf.text import read_text

if TYPE_CHECKING:
    from agq_gguf.measure.embeddings import EmbeddingEvaluation
    from agq_gguf.measure.evaluate import Evaluation


def evaluate(
    model: ModelArgument,
    reference: Annotated[Path, typer.Option(help="Model to compare with, usually F16.", show_default=False)],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to score.", show_default=False)],
    context: Annotated[
        int,
        typer.Option(
            "--ctx",
            "-c",
            min=0,
            help="Tokens per chunk; 0: 512 (for embeddings 128), or fewer if a model allows only fewer.",
        ),
    ] = 0,
    chunks: Annotated[int, typer.Option(min=0, help="Score only the first N chunks; 0: all.")] = 0,
    threads: Threads = 0,
    flash_attention: FlashOption = Flash.auto,
    plot: PlotOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a model with its reference model.

    Prints perplexity, KL divergence, and how often both models find the same token most likely. The text is cut into
    chunks of --ctx tokens. As in llama-perplexity, the second half of each chunk is scored, and a last chunk that is
    too short is left out. Both models run at the same time, chunk by chunk.

    For models that make embeddings it prints how far these turn (1 - cosine), and how often the nearest other chunk
    stays the same.
    """
    from agq_gguf.measure.embeddings import EmbeddingEvaluation, evaluate_embeddings
    from agq_gguf.measure.evaluate import evaluate as evaluate_logits

    content = read_text(text)
    embeds = check_model_file(reference).embeds
    if embeds and plot is not None:
        raise InputError(f"{reference}: makes embeddings, and there is no picture of them; leave out --plot")
    check_picture(plot, [model, reference, text])
    with show.ProgressView(quiet=quiet or as_json) as view:
        found = (evaluate_embeddings if embeds else evaluate_logits)(
            model,
            reference,
            content,
            context=context or None,
            chunks=chunks or None,
            threads=threads,
            flash_attention=flash_attention.value,
            progress=view.update,
        )
    if as_json:
        show.write_json({"model": str(model), "reference": str(reference), "text": str(text), **asdict(found)})
    if isinstance(found, EmbeddingEvaluation):
        if not as_json:
            _show_embeddings(found)
        return
    if plot is not None:
        plots.plot_evaluation(found, model.name, plot)
    if not as_json:
        show_evaluation(found)


def _show_embeddings(found: EmbeddingEvaluation) -> None:
    kept = "" if found.nearest_kept is None else f"{found.nearest_kept:.2%}"
    show.table(
        ["", ">value"],
        [
            ["1 - cosine, mean", f"{found.mean_distance:.6f} ± {found.mean_distance_error:.6f}"],
            ["1 - cosine, median", f"{found.median_distance:.6f}"],
            ["1 - cosine, maximum", f"{found.max_distance:.6f}"],
            ["same nearest chunk", kept],
        ],
    )
    show.say(f"{found.chunks} chunks of {found.context} tokens")


def show_evaluation(found: Evaluation) -> None:
    """Prints the figures of a comparison."""
    show.table(
        ["", ">value"],
        [
            ["perplexity", f"{found.perplexity:.4f}"],
            ["perplexity of the reference", f"{found.reference_perplexity:.4f}"],
            ["KL divergence, mean", f"{found.mean_kl:.6f} ± {found.mean_kl_error:.6f}"],
            ["KL divergence, median", f"{found.median_kl:.6f}"],
            ["KL divergence, 99.9th percentile", f"{found.kl_999:.6f}"],
            ["KL divergence, maximum", f"{found.max_kl:.6f}"],
            ["same most likely token", f"{found.top1_agreement:.2%}"],
        ],
    )
    show.say(f"{found.positions} positions scored, in {found.chunks} chunks of {found.context} tokens")
