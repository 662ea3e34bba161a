"""A few thousand mutated inputs for every parser of untrusted bytes; tests/fuzz/README.md tells how to run millions."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import needed
import pytest
from command_line import environment

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import fuzz_python
import mutate

from agq_gguf.errors import AgqError, FormatError
from agq_gguf.format import blocks

HERE = Path(__file__).parent
HOSTILE = sorted((HERE / "hostile").glob("*.gguf"))
STREAMS = sorted((HERE / "hostile").glob("*.stream"))
SOURCES = [HERE / "fuzz" / "attributes_replay.cpp", HERE.parent / "cpp" / "format" / "attributes.cpp"]


@pytest.mark.parametrize("target", ["reader", "attributes"])
def test_python_readers(target: str) -> None:
    outcomes = fuzz_python.TARGETS[target](3000, seed=random.randrange(2**32))
    assert outcomes["accepted"] > 100  # mutations reach what lies behind the first checks
    assert sum(outcomes.values()) - outcomes["accepted"] > 100


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_hostile_files_stay_refused(path: Path) -> None:
    """Files made to hurt, and those that once did."""
    with pytest.raises(AgqError, match=path.name):
        fuzz_python.use_reader(path)


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ parser with whatever sanitizers the compiler has."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if os.name == "nt":
        pytest.skip("the flags below are those of POSIX compilers")
    if compiler is None:
        needed.missing("not installed: c++")
    program = tmp_path_factory.mktemp("replay") / "attributes_replay"
    base = [compiler, "-std=c++17", "-O1", f"-I{HERE.parent / 'cpp'}", *map(str, SOURCES), "-o", str(program)]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    for flags in (sanitizers, []):
        built = subprocess.run([*base, *flags], capture_output=True, text=True, check=False)
        if built.returncode == 0:
            return program
    pytest.fail(built.stderr)


def verdicts(program: Path, inputs: list[bytes]) -> str:
    result = subprocess.run(
        [str(program)], input=b"".join(struct.pack("<I", len(data)) + data for data in inputs),
        capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode().strip()


def python_verdict(data: bytes) -> str:
    """1, 0, or ? where Python is stricter on purpose: it sees that bytes behind the parameters are not zero."""
    if len(data) < 3:
        return "0"
    stream, rows, columns = mutate.attribute_stream(data)
    if blocks.shape_problem(rows, columns):
        return "0"
    try:
        blocks._decode_parameters(stream, columns)
    except FormatError as e:
        return "?" if "after the parameters" in str(e) else "0"
    return "1"


def test_both_parsers_agree(replay: Path) -> None:
    """Two implementations of one text: what one refuses the other refuses, too."""
    choose = random.Random()
    seeds = [bytes([s[0], s[1], fitting]) + s[3:] for s in mutate.attribute_seeds() for fitting in (0, 1)]
    pool = list(seeds)
    inputs = []
    for _ in range(5000):
        data = mutate.mutate(choose.choice(pool), choose, seeds)
        inputs.append(data)
        if len(pool) < 500 and python_verdict(data) == "1":
            pool.append(data)
    found, wanted = verdicts(replay, inputs), [python_verdict(data) for data in inputs]
    counts = Counter(wanted)
    assert counts["1"] > 200 and counts["0"] > 200
    different = [(f, w, data[:60].hex()) for f, w, data in zip(found, wanted, inputs, strict=True) if w not in ("?", f)]
    assert not different, different[:3]


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_hostile_streams_stay_refused(path: Path, replay: Path) -> None:
    data = path.read_bytes()
    assert verdicts(replay, [data]) == python_verdict(data) == "0"


@pytest.mark.slow
@pytest.mark.needs("clang++")
def test_libfuzzer(tmp_path: Path) -> None:
    sources = [HERE / "fuzz" / "attributes_fuzz.cpp", SOURCES[1]]
    command = ["clang++", "-std=c++17", "-O1", "-g", f"-I{HERE.parent / 'cpp'}", *map(str, sources)]
    sanitizers = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [*command, *sanitizers, "-o", str(tmp_path / "fuzz")], capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        needed.missing(f"this clang has no libFuzzer: {built.stderr[-200:]}")
    (tmp_path / "corpus").mkdir()
    for i, seed in enumerate(mutate.attribute_seeds()):
        (tmp_path / "corpus" / str(i)).write_bytes(seed)
    options = ["-runs=50000", "-max_len=2100", f"-artifact_prefix={tmp_path}/"]
    result = subprocess.run(
        [str(tmp_path / "fuzz"), *options, str(tmp_path / "corpus")],
        capture_output=True, text=True, check=False, env=environment(), timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
