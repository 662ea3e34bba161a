"""Runs a model in any host through libllama's C interface, without packages: inside the host's own Python, if need be.

driver.py LIBRARY PLUGIN JOB: LIBRARY is the host's libllama (or what exports its functions), PLUGIN the plugin or
"none", JOB a JSON file with {"model", "prompt", "runs": [{"flash", "prune", "cache", "outputs"}, ...]}. For each run
the driver prints one line of JSON: "logits" of the prompt's last token (or of all, with outputs "all"); the "tokens"
that follow greedily; "restored": whether a saved state went on the same way here and in a new context; and "log": what
the plugin said.

Releases of llama.cpp differ in their parameter structs. They are handed over by value, in memory, so that a longer one
does no harm; fields are found by the defaults beside them.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_WORDS = 256  # 32-bit words of a parameter struct, more than any release has
_FLASH = {"off": 0, "on": 1, "auto": -1}
_CACHE = {"f32": 0, "f16": 1, "q8_0": 8}
_WARN, _ERROR = 3, 4
_PRUNE = 0  # option of agq_set_option
N_NEW = 16


class Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params of any release."""

    _fields_ = (("words", ctypes.c_int32 * _WORDS),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Host:
    """The C functions."""

    def __init__(self, library: str, plugin: str) -> None:
        self.log: list[str] = []
        self.lib = lib = ctypes.CDLL(library)
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        declared: dict[str, tuple[Any, list[Any]]] = {
            "llama_backend_init": (None, []),
            "llama_log_set": (None, [pointer, pointer]),
            "llama_model_default_params": (Parameters, []),
            "llama_context_default_params": (Parameters, []),
            "llama_model_load_from_file": (pointer, [text, Parameters]),
            "llama_init_from_model": (pointer, [pointer, Parameters]),
            "llama_model_get_vocab": (pointer, [pointer]),
            "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
            "llama_tokenize": (
                ctypes.c_int32,
                [pointer, text, ctypes.c_int32, pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
            ),
            "llama_token_to_piece": (
                ctypes.c_int32,
                [pointer, ctypes.c_int32, text, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool],
            ),
            "llama_batch_init": (Batch, [ctypes.c_int32] * 3),
            "llama_batch_free": (None, [Batch]),
            "llama_decode": (ctypes.c_int32, [pointer, Batch]),
            "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
            "llama_state_get_size": (ctypes.c_size_t, [pointer]),
            "llama_state_get_data": (ctypes.c_size_t, [pointer, pointer, ctypes.c_size_t]),
            "llama_state_set_data": (ctypes.c_size_t, [pointer, pointer, ctypes.c_size_t]),
            "llama_free": (None, [pointer]),
            "llama_model_free": (None, [pointer]),
            "ggml_backend_dev_count": (ctypes.c_size_t, []),
            "ggml_backend_load_all_from_path": (None, [text]),
            "ggml_backend_load": (pointer, [text]),
            "ggml_version": (text, []),
        }
        for name, (result, arguments) in declared.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_int, text, pointer)(self._receive)
        lib.llama_log_set(self._callback, None)
        if not lib.ggml_backend_dev_count():
            lib.ggml_backend_load_all_from_path(os.fsencode(Path(library).parent))
        lib.llama_backend_init()
        self.set_option: Any = None
        if plugin != "none":
            if not lib.ggml_backend_load(os.fsencode(plugin)):
                raise SystemExit(f"the plugin was refused: {self.log}")
            self.set_option = ctypes.CDLL(plugin).agq_set_option
            self.set_option.restype, self.set_option.argtypes = text, [ctypes.c_int32, text]

    def _receive(self, level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level in (_WARN, _ERROR) and (line.startswith("agq:") or level == _ERROR):
            self.log.append(line)


def context_parameters(host: Host, flash: str, cache: str) -> Parameters:
    """A context of 512 tokens in one piece, on two threads."""
    p = host.lib.llama_context_default_params()
    words = p.words
    if list(words[:4]) != [512, 2048, 512, 1]:
        raise SystemExit(
            f"llama_context_params begins with {list(words[:4])}, expected n_ctx, n_batch, n_ubatch, n_seq_max"
        )
    # rope scaling, pooling, attention, flash attention: all "auto" or "unspecified"
    first = next(i for i in range(4, 40) if list(words[i : i + 4]) == [-1] * 4)
    threads = next(i for i in range(first - 1, 4, -1) if list(words[i - 1 : i + 1]) == [4, 4])
    types = next(i for i in range(first + 4, 60) if list(words[i : i + 2]) == [1, 1])  # F16
    words[0] = words[1] = words[2] = 512
    words[threads - 1] = words[threads] = 2
    words[first + 3] = _FLASH[flash]
    words[types] = words[types + 1] = _CACHE[cache]
    return p


class Context:
    """One sequence."""

    def __init__(self, host: Host, model: int, flash: str, cache: str) -> None:
        self.host, self.lib = host, host.lib
        self.context = self.lib.llama_init_from_model(model, context_parameters(host, flash, cache))
        if not self.context:
            raise SystemExit(f"no context: {host.log}")
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(model))

    def decode(self, tokens: list[int], position: int, *, every: bool = False) -> list[array.array[float]]:
        """Logits of the last token, or of all."""
        n = len(tokens)
        batch = self.lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position + i, 1, 0
            batch.logits[i] = every or i == n - 1
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if status != 0:
            raise SystemExit(f"llama_decode failed with {status}: {self.host.log}")
        rows = range(n) if every else [n - 1]
        return [array.array("f", self.lib.llama_get_logits_ith(self.context, i)[: self.n_vocab]) for i in rows]

    def generate(self, logits: array.array[float], position: int) -> list[int]:
        """Greedy tokens."""
        found = []
        for i in range(N_NEW):
            found.append(max(range(self.n_vocab), key=logits.__getitem__))
            [logits] = self.decode(found[-1:], position + i)
        return found

    def save(self) -> bytes:
        """Its state."""
        size = self.lib.llama_state_get_size(self.context)
        data = ctypes.create_string_buffer(size)
        written = self.lib.llama_state_get_data(self.context, data, size)
        return data.raw[:written]

    def restore(self, state: bytes) -> None:
        """Continues from a saved state."""
        if self.lib.llama_state_set_data(self.context, state, len(state)) != len(state):
            raise SystemExit(f"the state was not restored: {self.host.log}")

    def close(self) -> None:
        """Frees it."""
        self.lib.llama_free(self.context)


def run(
    host: Host, model: int, prompt: list[int], *, flash: str, prune: str, cache: str, outputs: str
) -> dict[str, Any]:
    """One run of the job."""
    host.log.clear()
    if host.set_option is not None:
        problem = host.set_option(_PRUNE, prune.encode())
        if problem:
            raise SystemExit(problem.decode())
    context, n = Context(host, model, flash, cache), len(prompt)
    logits = context.decode(prompt, 0, every=outputs == "all")
    state = context.save()
    tokens = context.generate(logits[-1], n)
    context.restore(state)
    again = context.generate(logits[-1], n)
    context.close()
    other = Context(host, model, flash, cache)
    other.restore(state)
    elsewhere = other.generate(logits[-1], n)
    other.close()
    return {
        "logits": [list(row) for row in logits],
        "tokens": tokens,
        "restored": tokens == again == elsewhere,
        "log": list(host.log),
    }


def main() -> None:
    """See above."""
    library, plugin, job_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    host = Host(library, plugin)
    print(json.dumps({"ggml": host.lib.ggml_version().decode(), "log": host.log}))
    model = host.lib.llama_model_load_from_file(os.fsencode(job["model"]), host.lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"no model: {host.log}")
    prompt = job["prompt"]
    vocabulary = host.lib.llama_model_get_vocab(model)
    if isinstance(prompt, str):
        raw, room = prompt.encode(), (ctypes.c_int32 * 512)()
        n = host.lib.llama_tokenize(vocabulary, raw, len(raw), room, 512, True, False)
        prompt = list(room[:n])
    for settings in job["runs"]:
        found = run(host, model, prompt, **settings)
        text = b""
        for token in found["tokens"]:
            piece = ctypes.create_string_buffer(128)
            written = host.lib.llama_token_to_piece(vocabulary, token, piece, 128, 0, False)
            text += piece.raw[:written]
        print(json.dumps({**found, "prompt": prompt, "text": text.decode("utf-8", "replace")}))
    host.lib.llama_model_free(model)


if __name__ == "__main__":
    main()
