"""Models, contexts and batches of the installed llama.cpp, with clear errors and without log output.

A file is checked before llama.cpp opens it, and the plugin is registered if the file holds AGQ4 tensors. So a model
either opens or fails with a clear message. While a model is open, llama.cpp's log goes to the Python logger
``agq_gguf.llama``.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agq_gguf.errors import HostError, InputError
from agq_gguf.runtime.abilities import Abilities, abilities_of
from agq_gguf.runtime.cpus import MAX_THREADS, default_threads
from agq_gguf.runtime.interrupts import Interrupts
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.log import last_error, redirect
from agq_gguf.runtime.machine import free_memory
from agq_gguf.runtime.model_file import POOLING_NONE, prepare

if TYPE_CHECKING:
    from typing_extensions import Self

FlashAttention = Literal["auto", "on", "off"]
CacheType = Literal["f16", "f32"]  # of keys and values
Embeddings = Literal["none", "pooled", "tokens"]
EvalCallback = Callable[[int, bool], bool]  # address of a ggml_tensor; True before it is computed, False after

_FLASH = {"auto": -1, "off": 0, "on": 1}
_CACHE_TYPES = {"f16": 1, "f32": 0}  # ggml's types
_CACHE_BYTES = {"f16": 2, "f32": 4}
_MAX_CONTEXT = 2**31 - 1  # llama.cpp counts in 32 bits
_LARGE_CACHE = 4 << 30  # bytes, which llama.cpp fills with zeros in about ten seconds

logging.getLogger("agq_gguf").addHandler(logging.NullHandler())


class _Closable:
    """Base class of context managers with `close`."""

    def close(self) -> None:
        """Frees the object; may be called more than once."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Returns the object, which is already open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        """Closes the object."""
        self.close()


class Model(_Closable):
    """A loaded model; a context manager. Its contexts must be closed before it."""

    def __init__(self, path: str | os.PathLike[str], *, use_mmap: bool = True, vocab_only: bool = False) -> None:
        """Opens the file. Raises InputError if the file cannot be used, HostError if llama-cpp-python cannot."""
        self.path = Path(path)
        self.facts = prepare(path)
        self._api = api = llama_api()
        self._model: Any = None
        redirect.acquire()
        try:
            api.llama_backend_init()
            parameters = api.llama_model_default_params()
            if hasattr(parameters, "load_mode"):  # since llama-cpp-python 0.3.35; earlier releases have use_mmap
                parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if use_mmap else api.LLAMA_LOAD_MODE_NONE
            else:
                parameters.use_mmap = use_mmap
            parameters.vocab_only = vocab_only
            redirect.errors.clear()
            with Interrupts().deferred():  # llama.cpp calls the log's callback
                self._model = api.llama_model_load_from_file(os.fsencode(self.path), parameters)
            if not self._model:
                raise InputError(f"{path}: llama.cpp cannot load this model: {last_error('no reason given')}")
        except BaseException:
            if self._model:
                api.llama_model_free(self._model)
                self._model = None
            redirect.release()
            raise
        self.vocabulary = api.llama_model_get_vocab(self._model)
        self.n_vocab = int(api.llama_vocab_n_tokens(self.vocabulary))
        self.n_ctx_train = int(api.llama_model_n_ctx_train(self._model))
        self.n_layer = int(api.llama_model_n_layer(self._model))
        self.n_params = int(api.llama_model_n_params(self._model))
        self.size = int(api.llama_model_size(self._model))  # bytes of all tensors
        self.add_bos = bool(api.llama_vocab_get_add_bos(self.vocabulary))
        self.bos = int(api.llama_vocab_bos(self.vocabulary))
        self.has_encoder = bool(api.llama_model_has_encoder(self._model))
        self.has_decoder = bool(api.llama_model_has_decoder(self._model))
        self.eos = int(api.llama_vocab_eos(self.vocabulary))
        self.is_recurrent = any(  # or hybrid: some layers have a state instead of a cache
            getattr(api, f"llama_model_is_{kind}", lambda _: False)(self._model) for kind in ("recurrent", "hybrid")
        )
        self.is_diffusion = bool(getattr(api, "llama_model_is_diffusion", lambda _: False)(self._model))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> NDArray[np.int32]:
        """Token ids of the text."""
        raw = text.encode("utf-8", "surrogateescape")
        room = len(raw) + 8
        while True:
            tokens = np.empty(room, np.int32)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            n = self._api.llama_tokenize(self.vocabulary, raw, len(raw), pointer, room, add_special, parse_special)
            if n >= 0:
                return tokens[:n]
            if -n <= room:
                raise InputError(f"{self.path}: its tokenizer cannot tokenize this text ({len(raw)} bytes)")
            room = -n

    def special_ends(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The special tokens that the model wants in front of a text and behind it."""
        around = self.tokenize("")
        first, last = np.split(around, [int(self.add_bos and len(around) > 0)])
        return first, last

    @property
    def decoder_start(self) -> int:
        """The first token for the decoder of an encoder-decoder model."""
        start = int(self._api.llama_model_decoder_start_token(self._model))
        return start if start >= 0 else self.bos

    @property
    def handle(self) -> Any:
        """llama.cpp's pointer to the model."""
        return self._model

    def ends(self, token: int) -> bool:
        """Whether the token ends a text."""
        return bool(self._api.llama_vocab_is_eog(self.vocabulary, token))

    def bytes_of(self, token: int, *, special: bool = True) -> bytes:
        """The bytes of a token; of special ones, such as the end of a text, only if `special`."""
        room = 32
        while True:
            raw = ctypes.create_string_buffer(room)
            n = self._api.llama_token_to_piece(self.vocabulary, token, raw, room, 0, special)
            if n >= 0:
                return raw.raw[:n]
            room = -n

    def text_of(self, token: int) -> str:
        """The text of a special token; empty if the vocabulary has none (its number is negative then)."""
        return "" if token < 0 else self.bytes_of(token).decode("utf-8", "replace")

    def detokenize(self, tokens: ArrayLike) -> str:
        """Text of token ids; bytes that are not UTF-8 are replaced."""
        ids = np.ascontiguousarray(tokens, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        room = 8 * len(ids) + 16
        while True:
            raw = ctypes.create_string_buffer(room)
            n = self._api.llama_detokenize(self.vocabulary, pointer, len(ids), raw, room, False, True)
            if n >= 0:
                return raw.raw[:n].decode("utf-8", "replace")
            room = -n

    @cached_property
    def abilities(self) -> Abilities:
        """What the model can do; found at the first call by running it on a few tokens."""
        return abilities_of(self)

    def require_logits(self) -> None:
        """Raises InputError unless the model predicts a next token."""
        if self.abilities.problem:
            raise InputError(
                f"{self.path}: predicts no next token: {self.abilities.problem}; use a model that generates text"
            )

    def context(
        self,
        n_ctx: int,
        *,
        n_batch: int = 0,
        n_ubatch: int = 512,
        threads: int = 0,
        flash_attention: FlashAttention = "auto",
        sequences: int = 1,
        eval_callback: EvalCallback | None = None,
        cache: CacheType = "f16",
        embeddings: Embeddings = "none",
        tell: Callable[[str], None] | None = None,
    ) -> Context:
        """A context of `n_ctx` tokens for each sequence. `n_batch` 0 means n_ctx; `threads` 0 means all CPUs.

        With `embeddings` the model computes them in place of logits: one of each text, if its file says how they are
        `pooled`, or one of each of its `tokens`. `tell` gets a line about a
        cache that takes long to make.

        Raises InputError if the model does not support so many tokens or llama.cpp so many threads, HostError if
        llama.cpp cannot create it.
        """
        if not 0 <= threads <= MAX_THREADS:
            raise InputError(f"threads must be 0 to {MAX_THREADS}, got {threads}")
        limit = self.facts.positions
        if limit and n_ctx > limit:
            # llama.cpp would read past the end of the position table, and abort.
            raise InputError(f"{self.path}: the context must be at most {limit} tokens for this model, got {n_ctx}")
        if n_ctx * sequences > _MAX_CONTEXT:
            raise InputError(f"{self.path}: the context must be at most {_MAX_CONTEXT} tokens, got {n_ctx * sequences}")
        self._check_memory(n_ctx * sequences, cache, tell)
        return Context(
            self,
            n_ctx,
            n_batch or n_ctx,
            n_ubatch,
            threads,
            flash_attention,
            sequences,
            eval_callback,
            cache,
            embeddings,
        )

    def _check_memory(self, tokens: int, cache: CacheType, tell: Callable[[str], None] | None) -> None:
        """Raises InputError for a cache that does not fit: llama.cpp fills it with zeros, so the machine would swap."""
        windows = int(getattr(self._api, "llama_model_n_swa", lambda _: 1)(self._model))
        if windows or not self.facts.causal:
            return  # some layers keep fewer keys, or there is no cache
        needed, free = self.facts.cache_bytes * tokens * _CACHE_BYTES[cache] // 2, free_memory()
        said = f"the keys and values of {tokens} tokens need {needed / 2**30:.1f} GiB of memory"
        if free is not None and needed > free:
            raise InputError(f"{self.path}: {said}, {free / 2**30:.1f} GiB are free; use a smaller context")
        if tell is not None and needed >= _LARGE_CACHE:
            tell(f"note: {said}, which takes a while to fill; a smaller context begins sooner")

    def close(self) -> None:
        """Frees the model and restores the log."""
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None
            redirect.release()


class Batch:
    """Tokens in llama.cpp's layout, which can be decoded many times."""

    def __init__(
        self, tokens: ArrayLike, *, first_position: int = 0, first_logits: int | None = None, sequence: int = 0,
        one_each: bool = False,
    ) -> None:  # fmt: skip
        """Logits are computed from the token with index `first_logits` on; None: only for the last token.

        The tokens are consecutive tokens of the sequence with the number `sequence`. With `one_each` they are instead
        the next tokens of the sequences 0, 1, 2, ..., one each, all at the same position and all with logits.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        n = len(ids)
        self._tokens = ids.copy()
        self._positions = first_position + np.arange(n, dtype=np.int32) * np.int32(not one_each)
        self._n_sequences = np.ones(n, np.int32)
        numbers = [ctypes.c_int32(i if one_each else sequence) for i in range(n)]
        self._sequences = (ctypes.POINTER(ctypes.c_int32) * n)(*[ctypes.pointer(number) for number in numbers])
        self._logits = np.zeros(n, np.int8)
        self._logits[0 if one_each else n - 1 if first_logits is None else first_logits :] = 1
        self.n_outputs = int(self._logits.sum())
        self.raw: Any = llama_api().llama_batch(
            n_tokens=n,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._n_sequences.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequences,
            logits=self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )


class Context(_Closable):
    """State of running sequences; made by `Model.context`; a context manager."""

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        threads: int,
        flash_attention: FlashAttention,
        sequences: int,
        eval_callback: EvalCallback | None,
        cache: CacheType,
        embeddings: Embeddings,
    ) -> None:
        """Called by `Model.context`."""
        self.model = model
        self._api = api = model._api
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = n_ctx * sequences, sequences
        parameters.n_batch, parameters.n_ubatch = n_batch, min(n_ubatch, n_batch)
        parameters.n_threads = parameters.n_threads_batch = threads or default_threads()
        parameters.flash_attn_type = _FLASH[flash_attention]
        parameters.type_k = parameters.type_v = _CACHE_TYPES[cache]
        parameters.embeddings = embeddings != "none"
        if embeddings == "tokens":
            parameters.pooling_type = POOLING_NONE
        parameters.no_perf = True
        self._interrupts = Interrupts()
        self._calls_back = eval_callback is not None
        if eval_callback is not None:
            self._eval_callback = api.ggml_backend_sched_eval_callback(
                lambda tensor, ask, _: self._interrupts.asked is None and eval_callback(tensor, ask)
            )
            parameters.cb_eval = self._eval_callback
        redirect.errors.clear()
        redirect.warnings.clear()
        self._context: Any = None
        try:
            with self._interrupts.deferred():  # llama.cpp calls the log's callback
                self._context = api.llama_init_from_model(model._model, parameters)
        except BaseException:
            self.close()
            raise
        if not self._context:
            reason = last_error("not enough memory, or the model does not support it")
            raise HostError(f"{model.path}: llama.cpp cannot create a context of {n_ctx} tokens: {reason}")
        self._memory = api.llama_get_memory(self._context)
        self._decode, self._synchronize = api.llama_decode, api.llama_synchronize

    def clear(self, *, zero: bool = False) -> None:
        """Removes all tokens from the cache; with `zero`, its memory is set to zeros, as in a new context."""
        if self._memory:
            self._api.llama_memory_clear(self._memory, zero)

    @property
    def handle(self) -> Any:
        """llama.cpp's pointer to the context."""
        return self._context

    def forget(self, first_position: int) -> bool:
        """Removes the tokens of all sequences from this position on from the cache; False if it cannot."""
        return bool(self._memory and self._api.llama_memory_seq_rm(self._memory, -1, first_position, -1))

    def decode(self, batch: Batch) -> None:
        """Runs the batch and waits for the result. Raises HostError if llama.cpp fails."""
        self._run(self._decode, batch)

    def encode(self, batch: Batch) -> None:
        """Runs the batch, of at most n_ubatch tokens, through the encoder. Raises HostError if llama.cpp fails."""
        self._run(self._api.llama_encode, batch)

    def run(self, batch: Batch) -> None:
        """Runs the batch through the encoder if the model has one, else through the decoder. Raises HostError."""
        if self.model.has_encoder:
            self.encode(batch)
        else:
            self.decode(batch)

    def _run(self, function: Any, batch: Batch) -> None:
        with self._interrupts.deferred() if self._calls_back else nullcontext():
            status = function(self._context, batch.raw)
        if status != 0:
            raise HostError(self._failure(status))
        self._synchronize(self._context)

    def _failure(self, status: int) -> str:
        reason = {
            -2: "not enough memory for so many tokens at a time; use a smaller n_ubatch",
            1: "the context is full",
            2: "the computation was aborted",
        }.get(status) or last_error(f"status {status}")
        return f"{self.model.path}: llama.cpp cannot run this model: {reason}"

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [batch.n_outputs, n_vocab] of the last decoded batch; a view that the next decode overwrites."""
        pointer = self._api.llama_get_logits(self._context)
        if not pointer:
            raise InputError(f"{self.model.path}: llama.cpp computes no logits for this model")
        return np.ctypeslib.as_array(pointer, (batch.n_outputs, self.model.n_vocab))

    def embeddings(self, batch: Batch) -> NDArray[np.float32]:
        """What a context made with `embeddings` has computed of the last batch, which held one sequence.

        [1, n_embd] if the model pools the tokens, else [batch.n_outputs, n_embd]. A view that the next run overwrites.
        """
        pooled = self._api.llama_pooling_type(self._context) != POOLING_NONE
        pointer = (
            self._api.llama_get_embeddings_seq(self._context, 0)
            if pooled
            else self._api.llama_get_embeddings(self._context)
        )
        if not pointer:
            raise HostError(f"{self.model.path}: this model computes no embeddings")
        width = int(self._api.llama_model_n_embd(self.model._model))
        return np.ctypeslib.as_array(pointer, (1 if pooled else batch.n_outputs, width))

    def close(self) -> None:
        """Frees the context."""
        if self._context:
            self._api.llama_free(self._context)
            self._context = None


def check_same_tokens(models: Sequence[Model]) -> None:
    """Raises InputError unless all models have the same vocabulary."""
    for model in models[1:]:
        if model.n_vocab != models[0].n_vocab or model.facts.tokens != models[0].facts.tokens:
            raise InputError(
                f"{model.path} and {models[0].path} have different tokenizers, so their logits cannot be compared"
            )
