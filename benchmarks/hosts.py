"""Runs the host check (tests/hosts/check.py) in several hosts and prints the rows of the table in docs/releases.md.

    python benchmarks/hosts.py WORK                        installs every host of the list below into the folder WORK
    python benchmarks/hosts.py WORK --only xllamacpp       one of them
    python benchmarks/hosts.py WORK --host NAME=LIBRARY    a host that is on this machine; repeat it for more
    python benchmarks/hosts.py WORK --host NAME=LIBRARY --python COMMAND   ... whose library needs another interpreter

LIBRARY is the host's libllama, or what exports its functions. With --write the rows replace those of the table.
llama-cpp-python is compiled, in about 6 minutes for each release.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import subprocess
import sys
from pathlib import Path

import agq_gguf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from check import HostModels, HostReport, HostUnderTest, check_host  # noqa: E402  # found by the line above

# What pip installs, and where its library is: the tested releases of llama-cpp-python, and the newest xllamacpp.
_TESTED = re.findall(
    r'X\("[^"]+", "llama-cpp-python", "([^"]+)"\)', (ROOT / "cpp/host/tested_hosts.h").read_text("utf-8")
)
PACKAGES = {
    **{f"llama-cpp-python {v}": (f"llama-cpp-python=={v}", "llama_cpp/lib/libllama.so") for v in _TESTED},
    "xllamacpp": ("xllamacpp", "xllamacpp/xllamacpp*.so"),
}
TABLE = ROOT / "docs" / "releases.md"
_BEGIN, _END = "<!-- hosts -->", "<!-- end of hosts -->"


def installed(name: str, work: Path) -> Path:
    """The library of a host of the list, installed if it is not there yet. Raises CalledProcessError."""
    requirement, pattern = PACKAGES[name]
    folder = work / requirement.replace("==", "-")
    if not list(folder.glob(pattern)):
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), requirement], check=True
        )
    [library] = folder.glob(pattern)
    return library


def row(name: str, report: HostReport) -> str:
    """A row of the table."""
    today = datetime.date.today().isoformat()
    result = "passes" if not report.failed else "; ".join(report.failed).replace("|", "/")[:200]
    return f"| {name} | {report.ggml} | {len(report.passed)} | {len(report.failed)} | {result} | {today} |"


def write(rows: list[str]) -> None:
    """Puts the rows into the table; hosts that were not checked now keep theirs."""
    page = TABLE.read_text(encoding="utf-8")
    before, _, rest = page.partition(_BEGIN)
    old, _, after = rest.partition(_END)
    kept = {re.split(r"\s*\|\s*", line)[1]: line for line in old.splitlines() if re.match(r"\| [^h-]", line)}
    kept |= {re.split(r"\s*\|\s*", line)[1]: line for line in rows}
    head = "| host | ggml | checks passed | failed | result | date |\n|---|---|---|---|---|---|"
    TABLE.write_text(f"{before}{_BEGIN}\n{head}\n" + "\n".join(kept.values()) + f"\n{_END}{after}", encoding="utf-8")


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=PACKAGES, action="append")
    parser.add_argument("--host", action="append", default=[], metavar="NAME=LIBRARY")
    parser.add_argument("--python", default=sys.executable, help="interpreter for --host")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    hosts: dict[str, Path] = {}
    if arguments.host:
        hosts = {name: Path(library) for name, library in (entry.split("=", 1) for entry in arguments.host)}
    else:
        hosts = {name: installed(name, arguments.work) for name in arguments.only or PACKAGES}
    models = HostModels.make(arguments.work)
    rows = []
    for name, library in hosts.items():
        python = shlex.split(arguments.python) if arguments.host else [sys.executable]
        report = check_host(HostUnderTest(python, library, agq_gguf.backend_path(), arguments.work), models)
        rows.append(row(name, report))
        print(rows[-1], flush=True)
    if arguments.write:
        write(rows)


if __name__ == "__main__":
    main()
