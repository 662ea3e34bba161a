"""The command `bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.files import check_picture
from agq_gguf.cli.options import Flash, FlashOption, Json, PlotOption, Quiet, Threads
from agq_gguf.inspection import plots

if TYPE_CHECKING:
    from agq_gguf.measure.bench import Result, Speed
    from agq_gguf.runtime.profile import NodeTime


def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="GGUF files.", show_default=False)],
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=0, help="Tokens in the prompt; 0: no prompt.")] = 512,
    generation: Annotated[
        int, typer.Option("-n", "--generate", min=0, help="Tokens to generate; 0: no generation.")
    ] = 128,
    threads: Threads = 0,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Runs of each model.")] = 5,
    flash_attention: FlashOption = Flash.auto,
    depth: Annotated[int, typer.Option(min=0, help="Tokens in the cache before generation begins.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that generate at the same time.")] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Also print the time per kind of graph node.")] = False,
    plot: PlotOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed, memory use and load time of models.

    The models alternate in one run, so that other work on the machine slows all of them. Prints the median and the
    quartiles of tokens/s, and the ratio to the first model, which is the reference. Memory use, and the time from
    opening the file to the first token, are measured in a fresh process for each model.
    """
    from agq_gguf.measure.bench import bench as run
    from agq_gguf.runtime.cpus import default_threads

    threads = threads or default_threads()
    check_picture(plot, models)
    with show.ProgressView(quiet=quiet or as_json) as view:
        results = run(
            models,
            prompt=prompt,
            generation=generation,
            depth=depth,
            sequences=sequences,
            threads=threads,
            repetitions=repetitions,
            flash_attention=flash_attention.value,
            profile=profile,
            progress=view.update,
        )
    if plot is not None:
        plots.plot_bench(results, plot)
    if as_json:
        setup = {"threads": threads, "flash_attention": flash_attention.value, "repetitions": repetitions}
        show.write_json({**setup, "models": [asdict(result) for result in results]})
        return
    show_bench(results)
    show_profiles(results)
    show.say(f"tokens/s: median ± half the interquartile range; ratios of medians to {Path(results[0].model).name}")
    show.say(f"{threads} threads, flash attention {flash_attention.value}, {repetitions} repetitions")


def show_bench(results: list[Result]) -> None:
    """Prints speeds, one line for each model."""
    columns = ["model", ">file"]
    for part in ("prompt", "generation"):
        speed = getattr(results[0], part)
        columns += [f">{part} {speed.tokens if speed else 0}", f">to {Path(results[0].model).stem}"]
    columns += [">memory", ">first token"]
    show.table(columns, [_bench_row(result) for result in results])


def _bench_row(result: Result) -> list[str]:
    start = result.start
    memory = show.size(start.resident_bytes) if start and start.resident_bytes is not None else "-"
    first = f"{start.first_token_seconds:.3f} s" if start else "-"
    speeds = [cell for speed in (result.prompt, result.generation) for cell in _speed(speed)]
    return [Path(result.model).name, show.size(result.file_bytes), *speeds, memory, first]


def _speed(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return "-", "-"
    low, high = speed.quartiles
    spread = (high - low) / 2 / speed.median
    return f"{speed.median:.{0 if speed.median >= 1000 else 1}f} ± {spread:.0%}", f"{speed.ratio:.2f}"


def show_profiles(results: list[Result]) -> None:
    """Prints the time per kind of node, for results that have it."""
    for result in results:
        for part, times in (("prompt", result.prompt_profile), ("generation", result.generation_profile)):
            if times:
                show.say(f"\n{Path(result.model).name}, {part}")
                show.table(["node", ">nodes", ">ms", ">share"], _profile_rows(times))


def _profile_rows(times: list[NodeTime]) -> list[list[str]]:
    total = sum(time.seconds for time in times)
    rows = [[t.kind, str(t.nodes), f"{t.seconds * 1e3:.1f}", f"{t.seconds / total:.1%}"] for t in times]
    return [*rows, ["all", str(sum(t.nodes for t in times)), f"{total * 1e3:.1f}", "100.0%"]]
