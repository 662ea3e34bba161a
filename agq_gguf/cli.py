"""The command line: arguments, progress, exit codes. With `cli_tables.py` and `cli_output.py` the only
place that prints.

Modules that load llama_cpp or torch are imported inside the commands, so that ``agq-gguf --help`` is quick.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agq_gguf import __version__, cli_import, cli_prune, cli_report, cli_serve, cli_verify, plots
from agq_gguf import cli_output as show
from agq_gguf import cli_tables as tables
from agq_gguf.errors import AgqError, FormatError, HostError, InputError

_INTERRUPTED = 130  # as shells report a process that Ctrl-C ended
_BROKEN_PIPE = 141  # as shells report a process whose reader went away


class _Commands(TyperGroup):
    """Turns errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except AgqError as e:
            if debug:
                raise
            _fail(str(e), e.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted", _INTERRUPTED)
        except BrokenPipeError:
            # Nobody reads any more: the flush at the end of the process must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_BROKEN_PIPE) from None
        except (OSError, MemoryError) as e:
            if debug:
                raise
            _fail(str(e) or "not enough memory", AgqError.exit_code)


def _fail(message: str, exit_code: int) -> None:
    show.complain(f"error: {message}")
    raise typer.Exit(exit_code) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of ``agq-gguf``."""
    # A polite request to end cleans up like Ctrl-C: half-written files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="agq-gguf")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from agq_gguf.host import ggml_version

    show.say(f"agq-gguf {__version__}")
    for package in ("llama-cpp-python", "gguf"):
        try:
            show.say(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            show.say(f"{package} not installed")
    try:
        show.say(f"ggml {ggml_version()}")
    except HostError:
        show.say("ggml not installed")
    raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log of llama.cpp.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Quantize GGUF models to AGQ4 (4.25 bits per weight) and run them in the stock llama-cpp-python."""
    if debug:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")


# options


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4G``, ``512M``, ``1.5GiB`` or ``1000000``; units are binary."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    n_bytes = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if n_bytes <= 0:
        raise typer.BadParameter(f"{text!r} is no size; wanted something like 4G or 512M")
    return n_bytes


class Quality(str, Enum):
    """Values of --quality."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Flash(str, Enum):
    """Values of --flash-attn."""

    auto = "auto"
    on = "on"
    off = "off"


ModelArgument = Annotated[Path, typer.Argument(help="GGUF file, AGQ4 or any other type.", show_default=False)]
Threads = Annotated[int, typer.Option("--threads", "-t", min=0, help="CPU threads; 0: all.")]
FlashOption = Annotated[Flash, typer.Option("--flash-attn", help="Flash attention.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Context = Annotated[int, typer.Option("--ctx", "-c", min=0, help="Context in tokens; 0: the model's, at most 4096.")]
Temperature = Annotated[float, typer.Option("--temp", min=0.0, help="Temperature; 0: always the likeliest token.")]
Seed = Annotated[int, typer.Option("--seed", "-s", min=-1, help="Seed of the random choice; -1: another each time.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Picture to draw, such as FILE.png.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


# quantize


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="GGUF model in F32, F16 or BF16.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write; replaced when all went well.", show_default=False)
    ],
    calibration: Annotated[
        Path | None, typer.Option(help="Text file, ideally like what the model will read.", show_default=False)
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix (GGUF) to use in place of a text.", show_default=False)
    ] = None,
    quality: Annotated[
        Quality, typer.Option(help="How much work: docs/quality.md has what each costs and brings.")
    ] = Quality.balanced,
    output_type: Annotated[
        str, typer.Option(help="Type of the output matrix: agq4, q6_K, q8_0, f16, f32, or auto (q8_0).")
    ] = "auto",
    embedding_type: Annotated[
        str, typer.Option(help="Type of the token embedding: as above, or auto (q8_0 below 1024 columns, else agq4).")
    ] = "auto",
    target_bpw: Annotated[
        float,
        typer.Option(min=0, help="Bits per weight of the whole model, at most; sensitive tensors get more than 4."),
    ] = 0.0,
    act_bits: Annotated[int, typer.Option("--act-bits", help="Bits of activations: 8, or 4 (far less exact).")] = 8,
    act_scale: Annotated[
        str,
        typer.Option(
            help="Activations have one scale per token, per group of 64 channels, or per group after it was rotated."
        ),
    ] = "rotated",
    keep_norms: Annotated[
        bool, typer.Option("--keep-norms", help="Do not equalize norms: for LoRA adapters made for the source.")
    ] = False,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", min=64, help="Tokens of the calibration text to use, at most.")
    ] = 32768,
    tune: Annotated[
        bool,
        typer.Option("--tune/--no-tune", help="Let best train norms and scales in the end, which takes longest."),
    ] = True,
    threads: Threads = 0,
    memory: Annotated[
        int, typer.Option(parser=parse_size, metavar="SIZE", help="Memory for calibration, such as 4G.")
    ] = "4G",  # type: ignore[assignment]  # typer parses defaults, too
    split_size: Annotated[
        int | None,
        typer.Option(
            "--split-max-size",
            parser=parse_size,
            metavar="SIZE",
            help="Write files of at most this size, such as 8G; each holds one tensor at least.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished beside OUT, and go on from there next time.")
    ] = False,
    prune: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of a long prompt's work to save by dropping tokens.")
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model to AGQ4.

    Without --calibration or --imatrix all activations count alike, which costs quality. An existing OUT is replaced
    only by a complete new file.
    """
    try:
        from agq_gguf import convert
    except ImportError as e:
        raise HostError(f"quantizing needs {e.name}: pip install 'agq-gguf[convert]'") from e
    options = convert.QuantizeOptions(
        quality=quality.value,
        resume=resume,
        output_type=output_type,
        embedding_type=embedding_type,
        target_bpw=target_bpw,
        threads=threads,
        memory=memory,
        calibration_tokens=calibration_tokens,
        tune=tune,
        split_size=split_size or 0,
        matrix=replace(convert.activation_options(act_bits, act_scale), equalize=not keep_norms),
    )
    if prune and (calibration is None or split_size):
        raise InputError("--prune needs a text, with --calibration, and one file, without --split-max-size")
    if dry_run:
        tables.show_plan(convert.plan_file(source, options, calibration=calibration, imatrix=imatrix))
        return
    with show.ProgressView(quiet=quiet or as_json) as view:
        report = convert.quantize(
            source, target, calibration=calibration, imatrix=imatrix, options=options, progress=view.update
        )
        pruned = cli_prune.prune_new(target, prune, calibration, threads, view) if prune else None
    if as_json:
        show.write_json({**asdict(report), "pruning": asdict(pruned) if pruned else None})
        return
    tables.show_report(report)
    if pruned is not None:
        cli_prune.show_calibration(pruned)


# inspect


@app.command()
def inspect(model: ModelArgument, as_json: Json = False) -> None:
    """Show what is in a GGUF file."""
    from agq_gguf.inspection import inspect_file

    info = inspect_file(model)
    if as_json:
        show.write_json(asdict(info))
    else:
        tables.show_model(info)
    if info.problems:
        raise FormatError(f"{model}: {len(info.problems)} damaged AGQ4 tensors; first: {info.problems[0]}")


# evaluate


@app.command()
def evaluate(
    model: ModelArgument,
    reference: Annotated[Path, typer.Option(help="The model to compare with, usually F16.", show_default=False)],
    text: Annotated[Path, typer.Option(help="UTF-8 text file.", show_default=False)],
    context: Annotated[
        int, typer.Option("--ctx", "-c", min=0, help="Tokens of a chunk; 0: 512, or less if the models need it.")
    ] = 0,
    chunks: Annotated[int, typer.Option(min=0, help="Use only the first chunks; 0: all.")] = 0,
    threads: Threads = 0,
    flash_attention: FlashOption = Flash.auto,
    plot: PlotOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a model with its reference: perplexity, KL divergence, agreement on the likeliest token.

    The text is cut into chunks of --ctx tokens and the second half of each is scored, as llama-perplexity does; a rest
    shorter than a chunk is left out. Both models run at the same time, chunk by chunk.
    """
    from agq_gguf.evaluate import evaluate as run
    from agq_gguf.evaluate import read_text

    content = read_text(text)
    if plot is not None:
        plots.check_target(plot)
    with show.ProgressView(quiet=quiet or as_json) as view:
        found = run(
            model,
            reference,
            content,
            context=context or None,
            chunks=chunks or None,
            threads=threads,
            flash_attention=flash_attention.value,
            progress=lambda done, total: view.update("evaluate", done, total, ""),
        )
    if plot is not None:
        plots.plot_evaluation(found, model.name, plot)
    if as_json:
        show.write_json({"model": str(model), "reference": str(reference), "text": str(text), **asdict(found)})
        return
    tables.show_evaluation(found)


# bench


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="GGUF files.", show_default=False)],
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=0, help="Tokens of the prompt; 0: none.")] = 512,
    generation: Annotated[int, typer.Option("-n", "--generate", min=0, help="Tokens to generate; 0: none.")] = 128,
    threads: Threads = 0,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Turns of each model.")] = 5,
    flash_attention: FlashOption = Flash.auto,
    depth: Annotated[int, typer.Option(min=0, help="Tokens in the cache before the generation begins.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that generate side by side.")] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Also print the time per kind of node.")] = False,
    plot: PlotOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed, memory and start, the models taking turns.

    Prints medians and quartiles of tokens/s and ratios to the first model; the memory and the time from opening the
    file to the first token are those of a fresh process for each model.
    """
    from agq_gguf.bench import bench as run
    from agq_gguf.host import default_threads

    threads = threads or default_threads()
    if plot is not None:
        plots.check_target(plot)
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
            progress=lambda done, total, what: view.update("bench", done, total, what),
        )
    if plot is not None:
        plots.plot_bench(results, plot)
    if as_json:
        setup = {"threads": threads, "flash_attention": flash_attention.value, "repetitions": repetitions}
        show.write_json({**setup, "models": [asdict(result) for result in results]})
        return
    tables.show_bench(results)
    tables.show_profiles(results)
    show.say("tokens/s: median ± half the distance of the quartiles; ratio: to the first model")
    show.say(f"{threads} threads, flash attention {flash_attention.value}, {repetitions} repetitions")


# generate, chat


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens to generate, at most.")] = 128,
    temperature: Temperature = 0.8,
    seed: Seed = -1,
    context: Context = 0,
    threads: Threads = 0,
    prune: Annotated[
        str | None,
        typer.Option(help="What to prune, such as off or 3:0.5; none: what the file says.", show_default=False),
    ] = None,
    show_pruned: Annotated[
        bool, typer.Option("--show-pruned", help="Print the prompt first, with the tokens that were dropped marked.")
    ] = False,
) -> None:
    """Continue a text."""
    from agq_gguf.host import generated_text, open_llama

    with cli_prune.pruning(prune):
        llama = open_llama(model, context=context, threads=threads)
    try:
        start = cli_prune.read_prompt(llama, model, prompt) if show_pruned else prompt
        _stream(generated_text(llama, start, tokens=tokens, temperature=temperature, seed=seed))
    finally:
        llama.close()


@app.command()
def chat(
    model: ModelArgument,
    system: Annotated[str, typer.Option(help="What the model is told first.", show_default=False)] = "",
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Temperature = 0.8,
    seed: Seed = -1,
    context: Context = 0,
    threads: Threads = 0,
) -> None:
    """Talk with a model, line by line; end with Ctrl-D. Lines may also come from a pipe."""
    from agq_gguf.host import chat_answer, open_llama

    llama = open_llama(model, context=context, threads=threads)
    messages = [{"role": "system", "content": system}] if system else []
    try:
        while True:
            if sys.stdin.isatty():
                sys.stdout.write("> ")
                sys.stdout.flush()
            line = sys.stdin.readline()
            if not line:
                break
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.strip()})
            answer = _stream(chat_answer(llama, messages, tokens=tokens, temperature=temperature, seed=seed))
            messages.append({"role": "assistant", "content": answer})
    finally:
        llama.close()


def _stream(pieces: Any) -> str:
    """Prints pieces of text as they come, and a line end; returns the whole."""
    whole = []
    for piece in pieces:
        whole.append(piece)
        sys.stdout.write(show.safe(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(whole)


# the rest


@app.command()
def backend_path() -> None:
    """Print the path of the plugin, for GGML_BACKEND_PATH of llama-bench, llama-cli, llama-server."""
    from agq_gguf.plugin import backend_path as locate

    show.say(str(locate()))


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option(help="Folder for the models made.", show_default=False)] = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the small model in this package, run it, and compare it with stock Q4_0."""
    from agq_gguf import demo as demonstration

    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"{keep}: cannot be used as a folder: {e.strerror}") from e
    with (
        tempfile.TemporaryDirectory(prefix="agq-gguf-") if keep is None else nullcontext(str(keep)) as folder,
        show.ProgressView(quiet=quiet or as_json) as view,
    ):
        shown = demonstration.run(Path(folder), threads=threads, progress=view.update)
    if as_json:
        show.write_json(asdict(shown))
        return
    tables.show_demonstration(shown)
    if keep is not None:
        show.say(f"the models are in {keep}")


app.command()(cli_prune.calibrate_pruning)
app.command()(cli_serve.serve)
app.command()(cli_verify.verify)
app.command()(cli_report.report)
app.command()(cli_import.import_hf)


if __name__ == "__main__":
    main()
