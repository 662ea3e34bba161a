"""llama.cpp contexts through the low-level API, with every option that matters for pruning; for tests."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray

import agq_gguf
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions

# Every matrix AGQ4, quantized in a moment.
QUICK = QuantizeOptions(
    threads=1, embedding_type="agq4", output_type="agq4", matrix=MatrixOptions(learn_codebook=False)
)
PROMPT = np.random.default_rng(5).integers(3, 400, 40).tolist()
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "iq4_nl": 20}


log: list[str] = []  # lines of level warning and above, since it was last cleared
_WARN, _ERROR = 3, 4


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _collect(level: int, text: bytes, _: Any) -> None:
    if level in (_WARN, _ERROR):
        log.append(text.decode().strip())


def quick_agq4(folder: Path, n_layer: int) -> Path:
    """A tiny model, all AGQ4."""
    from agq_gguf.quantization.pipeline import quantize  # loads torch, which processes that only read need not wait for

    source = tiny_models.write_llama(folder / "f32.gguf", dtype="f32", n_layer=n_layer, seed=3)
    quantize(source, folder / "agq4.gguf", options=QUICK)
    return folder / "agq4.gguf"


def tokens(n: int, seed: int = 0) -> list[int]:
    """Tokens that every tiny model has, at random."""
    return np.random.default_rng(seed).integers(3, 400, n).tolist()


class LowModel:
    """A loaded model, and its contexts; a context manager. While one is open, the log goes to `log`."""

    _open = 0
    _previous = (api.llama_log_callback(), ctypes.c_void_p())  # who got the log before the first one

    def __init__(self, path: Path | str):
        self.path = Path(path)
        agq_gguf.register()
        if LowModel._open == 0:
            callback, data = LowModel._previous
            api.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
            api.llama_log_set(_collect, ctypes.c_void_p())
        LowModel._open += 1
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
        assert self.model, path
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def context(self, prune: str | None = None, **options: Any) -> LowContext:
        with agq_gguf.options(prune=prune):
            return LowContext(self, **options)

    def __enter__(self) -> LowModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        api.llama_model_free(self.model)
        LowModel._open -= 1
        if LowModel._open == 0:
            api.llama_log_set(*LowModel._previous)


def float_llama(folder: Path, n_layer: int) -> LowModel:
    """A LLaMA in F32: what pruning changes in its logits is not rounding."""
    path = folder / "llama.gguf"
    return LowModel(tiny_models.write_llama(path, dtype="f32", n_layer=n_layer, n_embd=256, n_head=4, n_kv=2, seed=5))


class LowContext:
    """One context; a context manager."""

    def __init__(
        self,
        model: LowModel,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        threads: int = 1,
        flash: bool = False,
        cache: str = "f16",
        n_seq: int = 1,
        unified: bool = True,
        embeddings: bool = False,
        swa_full: bool = True,
        callback: Any = None,
    ):
        p = api.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n_ctx, n_batch, n_ubatch, n_seq
        p.n_threads = p.n_threads_batch = threads
        p.flash_attn_type = 1 if flash else 0
        p.type_k = CACHE_TYPES[cache]
        # Without flash attention values cannot be quantized.
        p.type_v = CACHE_TYPES[cache] if flash or cache in ("f32", "f16", "bf16") else CACHE_TYPES["f16"]
        p.kv_unified = unified
        p.embeddings = embeddings
        p.swa_full = swa_full
        p.no_perf = True
        if callback is not None:
            self._callback = api.ggml_backend_sched_eval_callback(callback)
            p.cb_eval = self._callback
        self.model = model
        self.context = api.llama_init_from_model(model.model, p)
        assert self.context
        self.memory = api.llama_get_memory(self.context)

    def __enter__(self) -> LowContext:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        api.llama_free(self.context)

    def decode(
        self,
        tokens: Sequence[int],
        position: int = 0,
        *,
        sequence: int | Sequence[Sequence[int]] = 0,
        positions: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Logits [outputs, vocabulary] of the tokens with these indices (None: the last)."""
        wanted = [len(tokens) - 1] if outputs is None else list(outputs)
        self.run(tokens, position, sequence=sequence, positions=positions, outputs=wanted)
        rows = [api.llama_get_logits_ith(self.context, i) for i in wanted]
        return np.array([np.ctypeslib.as_array(row, (self.model.n_vocab,)).copy() for row in rows])

    def run(
        self,
        tokens: Sequence[int],
        position: int = 0,
        *,
        sequence: int | Sequence[Sequence[int]] = 0,
        positions: Sequence[int] | None = None,
        outputs: Sequence[int] = (),
    ) -> None:
        """Computes a batch."""
        n = len(tokens)
        sequences = [[sequence]] * n if isinstance(sequence, int) else sequence
        batch = api.llama_batch_init(n, 0, max(len(s) for s in sequences))
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i] = int(token)
                batch.pos[i] = position + i if positions is None else positions[i]
                batch.n_seq_id[i] = len(sequences[i])
                for j, s in enumerate(sequences[i]):
                    batch.seq_id[i][j] = s
                batch.logits[i] = i in outputs
            status = api.llama_decode(self.context, batch)
            assert status == 0, status
        finally:
            api.llama_batch_free(batch)

    def save(self, sequence: int | None = None) -> bytes:
        if sequence is None:
            size = api.llama_state_get_size(self.context)
            buffer = (ctypes.c_uint8 * size)()
            n = api.llama_state_get_data(self.context, buffer, size)
        else:
            size = api.llama_state_seq_get_size(self.context, sequence)
            buffer = (ctypes.c_uint8 * size)()
            n = api.llama_state_seq_get_data(self.context, buffer, size, sequence)
        return bytes(buffer)[:n]

    def restore(self, state: bytes, sequence: int | None = None) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if sequence is None:
            assert api.llama_state_set_data(self.context, buffer, len(state)) == len(state)
        else:
            assert api.llama_state_seq_set_data(self.context, buffer, len(state), sequence) == len(state)


GetModel = Callable[..., LowModel]


@contextmanager
def loaded_models(folder: Path, write: Callable[[str, Path], object], usual: str) -> Iterator[GetModel]:
    """A function that loads the model of an architecture and a kind, "f32" or "agq4" (by default `usual`), once.

    `write` writes the float model of an architecture.
    """
    loaded: dict[tuple[str, str], LowModel] = {}

    def get(arch: str = "llama", kind: str = usual) -> LowModel:
        if (arch, kind) not in loaded:
            source = folder / f"{arch}-f32.gguf"
            if not source.exists():
                write(arch, source)
            path = source
            if kind == "agq4":
                from agq_gguf.quantization.pipeline import quantize  # as above

                path = folder / f"{arch}-agq4.gguf"
                quantize(source, path, options=QUICK)
            loaded[arch, kind] = LowModel(path)
        return loaded[arch, kind]

    yield get
    for model in loaded.values():
        model.close()


def models_fixture(write: Callable[[str, Path], object], usual: str) -> Any:
    """A fixture of a module: the function of `loaded_models`."""

    @pytest.fixture(scope="module")
    def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetModel]:
        with loaded_models(tmp_path_factory.mktemp("models"), write, usual) as get:
            yield get

    return model
