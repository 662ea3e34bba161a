"""`agq-gguf doctor`: what it finds out, and what it says where something is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from command_line import environment, run

from agq_gguf import native
from agq_gguf.errors import HostError, InputError
from agq_gguf.inspection import doctor
from agq_gguf.inspection.program import Program, Way
from agq_gguf.runtime.cpus import AvailableCpus, Quota
from agq_gguf.runtime.machine import Kernel, Speed


def diagnosis(*arguments: object, code: int = 0) -> dict[str, Any]:
    return json.loads(run("doctor", "--no-speed", "--json", *arguments, code=code).stdout)


def in_a_process(before: str = "", code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """`agq-gguf doctor --no-speed` after some Python."""
    program = (
        f"import sys\n{before}\nfrom agq_gguf.cli.app import main\nsys.argv = ['x', 'doctor', '--no-speed']\nmain()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment(**variables)
    )
    assert shown.returncode == code, shown.stdout + shown.stderr
    return shown


def test_everything_is_shown() -> None:
    shown = run("doctor", "-t", 1).stdout
    parts = re.findall(r"^(\w[^\n:,]*)", shown, re.MULTILINE)
    wanted = ["Versions", "Processor", "Host", "Plugin", "Proofs of the host's ABI", "Speed", "Slow here"]
    assert [part for part in parts if part in wanted] == wanted
    assert re.search(rf"name +llama-cpp-python {re.escape(llama_cpp.__version__)}\n", shown)
    assert re.search(r"library +/\S*ggml\S*\n", shown) or sys.platform != "linux"
    assert re.search(r"ggml +\d+\.\d+\.\d+, backend API [23]\n", shown)
    assert re.search(r"kernels +.*\w+ \(used\)", shown)
    assert re.search(r"memory +[\d.]+ GB/s read\n", shown)
    assert re.search(r"integers +\d+ billion operations/s \(the kernel's GEMM of 8-bit by 4-bit\)", shown)
    assert "registered, AGQ4 models can be loaded" in shown and "FAILED" not in shown


def test_the_proofs_are_those_of_the_plugin() -> None:
    proofs = diagnosis()["proofs"]
    assert len(proofs) >= 12 and all(proof["passed"] for proof in proofs)
    assert proofs[-1]["name"] == "registered type" and proofs[-1]["found"] == "type 38 is agq4"
    assert 0 < sum(proof["microseconds"] for proof in proofs) < 1e6


def test_json() -> None:
    found = diagnosis()
    assert set(found) == {
        "versions", "processor", "cpus", "threads", "environment", "plugin", "plugin_problem", "kernels", "host",
        "host_problem", "proofs", "registered", "registration_problem", "speed", "slow", "program",
    }  # fmt: skip
    assert found["registered"] and found["speed"] is None and found["program"] is None
    assert found["plugin"] == str(native.backend_path())
    assert found["versions"]["llama-cpp-python"] == llama_cpp.__version__


def test_without_llama_cpp_python() -> None:
    shown = in_a_process("sys.modules['llama_cpp'] = None").stdout
    assert "not found  llama-cpp-python cannot be imported" in shown
    assert "not registered, because there is no host" in shown
    assert "(used)" in shown


def test_a_plugin_that_cannot_load() -> None:
    """The proofs stay, though the plugin is gone."""
    shown = in_a_process(AGQ_FORCE_ISA="perhaps", code=HostError.exit_code)
    assert "error: the plugin" in shown.stderr and "AGQ_FORCE_ISA is 'perhaps'" in shown.stderr
    assert "AGQ_FORCE_ISA  perhaps" in shown.stdout and "not registered, AGQ4 models cannot be loaded" in shown.stdout
    assert "Proofs of the host's ABI: 11 passed" in shown.stdout
    assert "AGQ_FORCE_ISA is 'perhaps', which cannot run here" in shown.stdout


def test_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise HostError("the plugin library is not built; install the package with pip install .")

    monkeypatch.setattr(native, "backend_path", missing)
    shown = run("doctor", code=HostError.exit_code)
    assert "is not built" in shown.stderr and re.search(r"library +the plugin library is not built", shown.stdout)


def test_another_library() -> None:
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = next(path for path in folder.iterdir() if path.name.startswith(("libllama.", "llama.")))
    assert diagnosis("--library", library)["host"]["name"] == str(library)
    assert "cannot be loaded" in diagnosis("--library", "none.so")["host_problem"]


def test_secrets_are_not_shown() -> None:
    shown = in_a_process(AGQ_API_KEY="abc123", AGQ_PRUNE="off").stdout
    assert "abc123" not in shown and "AGQ_API_KEY  (not shown)" in shown and "AGQ_PRUNE    off" in shown


def test_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Program(
        path="/bin/llama-server", version="version: 7", ggml_version="0.26.0", ggml_library="/lib/libggml-base.so",
        missing_libraries=["libx.so"], accepts_plugin=True, acceptance="AGQ: kernels",
        backend_path=Way(False, "it never looks"), preload=Way(True, "it calls"),
    )  # fmt: skip
    monkeypatch.setattr(doctor, "examine", lambda name, plugin: made)
    shown = run("doctor", "--no-speed", "--program", "llama-server").stdout.split("\nProgram ")[1]
    assert [re.sub(" +", " ", line.strip()) for line in shown.splitlines()] == [
        "/bin/llama-server", "version version: 7", "ggml 0.26.0, /lib/libggml-base.so", "missing libx.so",
        "its ggml accepts the plugin: AGQ: kernels", "GGML_BACKEND_PATH does not work: it never looks",
        "LD_PRELOAD works: it calls",
    ]  # fmt: skip


def test_no_such_program() -> None:
    assert "no such program" in run("doctor", "--program", "llama-nothing", code=InputError.exit_code).stderr


GOOD = [Kernel("avx512vnni", True, True), Kernel("avx2", True, False), Kernel("scalar", True, False)]
OLD = [Kernel("avx512vnni", False, False), Kernel("avx2", True, True), Kernel("scalar", True, False)]
FORCED = [Kernel("avx512vnni", True, False), Kernel("avx2", True, True), Kernel("scalar", True, False)]
CPUS = AvailableCpus(8, None, cores=8)


@pytest.mark.parametrize(
    ("cpus", "kernels", "threads", "share", "reasons"),
    [
        (CPUS, GOOD, 8, 1.0, []),
        (CPUS, OLD, 8, 1.0, [r"cannot run the fastest kernel, avx512vnni"]),
        (CPUS, FORCED, 8, 1.0, [r"kernel avx2; unset it to use avx512vnni"]),
        (CPUS, GOOD, 9, 0.5, [r"9 threads, but this process may use 8 CPUs"]),
        (CPUS, GOOD, 8, 0.5, [r"other work uses the CPUs: the threads ran 50% of the time"]),
        (AvailableCpus(8, Quota(1.5, Path("/cpu.max")), 8), GOOD, 1, 1.0, [r"a quota of 1\.5 CPUs \(/cpu\.max\)"]),
        (AvailableCpus(8, Quota(8.0, Path("/cpu.max")), 8), GOOD, 8, 1.0, []),
        (AvailableCpus(8, None, 4), GOOD, 8, 1.0, [r"8 CPUs are threads of 4 cores; try 4 threads"]),
        (AvailableCpus(8, None, 4), GOOD, 4, 1.0, []),
        (AvailableCpus(8, None, None), GOOD, 8, 1.0, []),
    ],
)
def test_what_is_slow(
    cpus: AvailableCpus, kernels: list[Kernel], threads: int, share: float, reasons: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(doctor, "available_cpus", lambda: cpus)
    monkeypatch.setattr(doctor, "kernels", lambda: kernels)
    monkeypatch.setattr(doctor, "measure_speed", lambda n, seconds: Speed(n, 1e9, 1e9, share))
    monkeypatch.setattr(doctor, "_has_huge_pages", lambda: True)
    monkeypatch.delenv("AGQ_HUGE_PAGES", raising=False)
    found = doctor.diagnose(threads=threads).slow
    assert len(found) == len(reasons)
    assert all(re.search(wanted, text) for wanted, text in zip(reasons, found, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has transparent huge pages")
def test_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.setattr(doctor, "_HUGE_PAGES", setting)

    def about_pages() -> list[str]:
        return [reason for reason in doctor.diagnose(seconds=0).slow if "huge pages" in reason]

    missing = about_pages()
    assert len(missing) == 1 and str(setting) in missing[0]
    setting.write_text("always madvise [never]\n")
    assert about_pages() == missing
    setting.write_text("always [madvise] never\n")
    assert about_pages() == []
    monkeypatch.setenv("AGQ_HUGE_PAGES", "off")
    assert len(about_pages()) == 1
