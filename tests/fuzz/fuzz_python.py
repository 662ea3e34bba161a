"""Mutated files for the Python readers: each is opened, or refused with an `AgqError`, in little time and memory.

    python tests/fuzz/fuzz_python.py reader --runs 500000 --seed 1
    python tests/fuzz/fuzz_python.py attributes --runs 500000 --seed 1

Inputs that fail are written to the folder given with --keep (tests/hostile).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import mutate as m

from agq_gguf.calibration.imatrix import load_imatrix
from agq_gguf.errors import AgqError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import check_source, open_gguf
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.inspection.verify import attribute_problem, verify
from agq_gguf.quantization.pipeline import plan_file
from agq_gguf.runtime.model_file import check_model_file

SECONDS = 5.0  # of processor time; longer is a hang


def use_reader(path: Path) -> None:
    """What programs of ours do with a file that somebody sent."""
    with open_gguf(path) as reader:
        for tensor in reader.tensors.values():
            assert sum(len(chunk) for chunk in reader.chunks(tensor.name)) == tensor.n_bytes
            attribute_problem(reader, tensor)
            if tensor.type_name in ("f32", "f16", "bf16"):
                assert reader.read(tensor.name).shape == tensor.shape
        with suppress(AgqError):
            check_source(reader)
        kind = reader.get("general.type")
    for function in (check_model_file, inspect_file, verify, plan_file):
        with suppress(AgqError):
            function(path)
    if kind == "imatrix":
        with suppress(AgqError):
            load_imatrix(path)


def fuzz(
    use: Callable[[bytes], None], seeds: list[bytes], runs: int, seed: int, keep: Path | None = None
) -> Counter[str]:
    """Calls `use` with mutated seeds; counts outcomes. Raises what `use` raises other than AgqError."""
    choose, outcomes, pool = random.Random(seed), Counter[str](), list(seeds)
    for i in range(runs):
        data = m.mutate(choose.choice(pool), choose, seeds)
        begun = time.process_time()
        try:
            use(data)
            outcomes["accepted"] += 1
            if len(pool) < 256 and len(data) < 65536:
                pool.append(data)  # from here mutations go deeper
        except AgqError as e:
            outcomes[type(e).__name__] += 1
        except BaseException:
            if keep is not None:
                (keep / f"fuzz-{seed}-{i}.bin").write_bytes(data)
            raise
        assert time.process_time() - begun < SECONDS, f"run {i} of seed {seed} took too long"
    return outcomes


def fuzz_reader(runs: int, seed: int, keep: Path | None = None) -> Counter[str]:
    """Mutated GGUF files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "m-00001-of-00002.gguf"

        def use(data: bytes) -> None:
            path.write_bytes(data)
            use_reader(path)

        return fuzz(use, m.gguf_seeds(Path(folder)), runs, seed, keep)


def fuzz_attributes(runs: int, seed: int, keep: Path | None = None) -> Counter[str]:
    """Mutated attribute streams."""

    def use(data: bytes) -> None:
        if len(data) >= 3:
            stream, rows, columns = m.attribute_stream(data)
            blocks._check_shape(rows, columns)
            blocks._decode_parameters(stream, columns)

    return fuzz(use, m.attribute_seeds(), runs, seed, keep)


TARGETS = {"reader": fuzz_reader, "attributes": fuzz_attributes}


def main() -> None:
    """Runs one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # an announced size must not become an allocation
    except ImportError:
        pass
    print(dict(TARGETS[arguments.target](arguments.runs, arguments.seed, arguments.keep)))


if __name__ == "__main__":
    main()
