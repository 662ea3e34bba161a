"""Run by tests/test_rpc.py: logits of a prompt and of greedy steps, the layers spread over RPC servers.

rpc_client.py OUT.npy MODEL [RPC-LIBRARY ENDPOINT...]
"""

from __future__ import annotations

import ctypes
import os
import sys

import numpy as np
from numpy.typing import NDArray

import agq_gguf
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.model import Batch, Model

PROMPT, STEPS = 40, 16


def use_servers(library: str, endpoints: list[str]) -> None:
    """Adds each server as devices of this process, as llama.cpp's programs do for ``--rpc``."""
    api = llama_api()._lib
    api.ggml_backend_load.restype = api.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    api.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    api.ggml_backend_register.argtypes = [ctypes.c_void_p]
    registry = api.ggml_backend_load(os.fsencode(library))
    assert registry, library
    add = api.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    for endpoint in endpoints:
        server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(add)(endpoint.encode())
        assert server, endpoint
        api.ggml_backend_register(server)


def main() -> None:
    """Writes the logits of the last prompt token and of each step."""
    agq_gguf.register()
    if len(sys.argv) > 3:
        use_servers(sys.argv[3], sys.argv[4:])
    with Model(sys.argv[2]) as model, model.context(256, threads=1, flash_attention="off") as context:
        tokens = np.random.default_rng(1).integers(3, model.n_vocab, PROMPT)

        def logits(batch: Batch) -> NDArray[np.float32]:
            context.decode(batch)
            return context.logits(batch)[-1].copy()

        rows = [logits(Batch(tokens))]
        for i in range(STEPS):
            rows.append(logits(Batch([int(rows[-1].argmax())], first_position=PROMPT + i)))
    np.save(sys.argv[1], np.stack(rows))


if __name__ == "__main__":
    main()
