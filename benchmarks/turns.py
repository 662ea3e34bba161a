"""Runs a model in its own process, step by step on request, so that processes with different libraries can alternate.

`Runner` starts it as ``python benchmarks/turns.py MODEL ...``. It answers each line "prompt" or "generation" on its
standard input with the seconds of one run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_WARM_UP = 32


class Runner:
    """A process with a loaded model; a context manager."""

    def __init__(
        self, model: Path, *, threads: int, flash: str, prompt: int, generation: int = 0, register: bool = False,
        environment: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """`register` loads the plugin even if the model does not need it."""
        command = [sys.executable, __file__, model, "--threads", threads, "--flash", flash]
        command += ["--prompt", prompt, "--generation", generation, *(["--register"] if register else [])]
        self._command = [str(part) for part in command]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.resident_bytes = int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._command[2]} ended")
        return line

    def seconds(self, part: str) -> float:
        """Runs "prompt" or "generation" once."""
        assert self._process.stdin is not None
        self._process.stdin.write(part + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def _serve(arguments: argparse.Namespace) -> None:
    """The child process: answers until its input ends."""
    import numpy as np

    from agq_gguf.measure.bench import resident_bytes
    from agq_gguf.runtime.model import Batch, Model
    from agq_gguf.runtime.plugin import register

    if arguments.register:
        register()
    size = max(arguments.prompt, _WARM_UP + arguments.generation)
    with (
        Model(arguments.model) as model,
        model.context(size, n_ubatch=512, threads=arguments.threads, flash_attention=arguments.flash) as context,
    ):
        tokens = np.random.default_rng(0).integers(model.n_vocab, size=size).astype(np.int32)
        warm_up, prompt = Batch(tokens[:_WARM_UP]), Batch(tokens[: arguments.prompt])
        steps = [Batch(tokens[:1], first_position=_WARM_UP + i) for i in range(arguments.generation)]
        for batch in (warm_up, *steps[:8]):
            context.decode(batch)
        print(resident_bytes(), flush=True)
        for line in sys.stdin:
            context.clear()
            if line.strip() == "generation":
                context.decode(warm_up)
            begin = time.perf_counter()
            for batch in steps if line.strip() == "generation" else [prompt]:
                context.decode(batch)
            print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--flash", choices=["on", "off", "auto"], required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--generation", type=int, default=0)
    parser.add_argument("--register", action="store_true")
    _serve(parser.parse_args())
