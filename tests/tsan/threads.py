"""Run by tests/test_tsan.py under ThreadSanitizer: several contexts share one model, each with several threads.

threads.py PLUGIN MODEL THREADS
"""

from __future__ import annotations

import sys
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np

from agq_gguf import native
from agq_gguf.runtime.model import Batch, Model


def main() -> None:
    """Prompts and single tokens in four Python threads."""
    native.backend_path = lru_cache(lambda: Path(sys.argv[1]))
    with Model(sys.argv[2]) as model:

        def work(i: int) -> None:
            tokens = np.random.default_rng(i).integers(3, 400, 100)
            for flash in ("on", "off"):
                with model.context(
                    256, threads=int(sys.argv[3]), n_ubatch=40, flash_attention="on" if flash == "on" else "off"
                ) as context:
                    context.decode(Batch(tokens))
                    context.decode(Batch([5], first_position=100))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print("done")


if __name__ == "__main__":
    main()
