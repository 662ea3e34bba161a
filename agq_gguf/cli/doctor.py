"""The command `doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.errors import HostError
from agq_gguf.runtime.cpus import MAX_THREADS

if TYPE_CHECKING:
    from agq_gguf.inspection.doctor import Diagnosis
    from agq_gguf.inspection.program import Program


def doctor(
    program: Annotated[
        str | None,
        typer.Option(metavar="PROGRAM", help="Also say how this program loads the plugin.", show_default=False),
    ] = None,
    library: Annotated[
        Path | None,
        typer.Option(help="libllama or libggml to use; default: llama-cpp-python's.", show_default=False),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", "-t", min=0, max=MAX_THREADS, help="Threads to measure with; 0: all.")
    ] = 0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure the speed, for two seconds.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what decides whether AGQ4 runs here, and how fast.

    Please add the output to every bug report. With --program it says whether GGML_BACKEND_PATH or LD_PRELOAD makes that
    program load the plugin. It reads the program's files, and runs it with --version and --list-devices only.
    """
    from agq_gguf.inspection.doctor import diagnose

    found = diagnose(library=library, program=program, threads=threads, seconds=2.0 if speed else 0.0)
    if as_json:
        show.write_json(asdict(found))
    else:
        show_diagnosis(found)
    if found.plugin_problem or found.registration_problem:
        raise HostError(found.plugin_problem or found.registration_problem)


def show_diagnosis(found: Diagnosis) -> None:
    """Prints all that was found."""
    show.say("Versions")
    _rows(found.versions)
    show.say("\nProcessor")
    cpus = found.cpus
    quota = f"{cpus.quota.cpus:g} CPUs ({cpus.quota.file})" if cpus.quota else "none"
    _rows(
        {
            "name": found.processor.name,
            "features": " ".join(found.processor.features) or "unknown",
            "CPUs": f"{cpus.allowed} of {cpus.cores or 'an unknown number of'} cores, quota {quota}: "
            f"{cpus.threads} threads",
            "kernels": ", ".join(
                f"{kernel.name} ({'used' if kernel.chosen else 'can run' if kernel.supported else 'cannot run here'})"
                for kernel in found.kernels
            ),
        }
    )
    if found.environment:
        show.say("\nEnvironment")
        _rows(found.environment)
    show.say("\nHost")
    host = found.host
    if host is None:
        _rows({"not found": found.host_problem or ""})
    else:
        api = "unknown" if host.api_version is None else str(host.api_version)
        _rows(
            {"name": host.name, "library": host.library or "unknown", "ggml": f"{host.ggml_version}, backend API {api}"}
        )
    _show_registration(found)
    if found.speed is not None:
        show.say(f"\nSpeed, {found.speed.threads} threads, measured for two seconds")
        _rows(
            {
                "memory": f"{found.speed.read_bytes_per_second / 1e9:.1f} GB/s read",
                "integers": f"{found.speed.operations_per_second / 1e9:.0f} billion operations/s "
                "(the kernel's GEMM of 8-bit by 4-bit)",
            }
        )
    show.say("\nSlow here")
    for reason in found.slow or ["nothing was found"]:
        show.say(f"  {reason}")
    if found.program is not None:
        _show_program(found.program)


def _show_registration(found: Diagnosis) -> None:
    show.say("\nPlugin")
    if found.registered:
        state = "registered, AGQ4 models can be loaded"
    elif found.host is None:
        state = "not registered, because there is no host"
    else:
        state = "not registered, AGQ4 models cannot be loaded"
    _rows({"library": found.plugin or found.plugin_problem or "", "type AGQ4": state})
    if found.proofs:
        total = sum(proof.microseconds for proof in found.proofs)
        show.say(f"\nProofs of the host's ABI: {sum(p.passed for p in found.proofs)} passed, {total / 1e3:.2f} ms")
        rows = [[p.name, "passed" if p.passed else "FAILED", f"{p.microseconds:.1f}", p.found] for p in found.proofs]
        show.table(["proof", "result", ">µs", "found"], rows)


def _show_program(program: Program) -> None:
    show.say(f"\nProgram {program.path}")
    accepts = {True: "accepts the plugin", False: "refuses the plugin", None: "not tried"}[program.accepts_plugin]
    rows = {"version": program.version or "unknown"}
    if program.ggml_library:
        rows["ggml"] = f"{program.ggml_version or 'unknown version'}, {program.ggml_library}"
    if program.missing_libraries:
        rows["missing"] = ", ".join(program.missing_libraries)
    rows["its ggml"] = f"{accepts}: {program.acceptance}"
    for name, way in (("GGML_BACKEND_PATH", program.backend_path), ("LD_PRELOAD", program.preload)):
        rows[name] = f"{'works' if way.works else 'does not work'}: {way.reason}"
    _rows(rows)


def _rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        show.say(f"  {name:{width}}  {value}")
