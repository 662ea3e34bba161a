"""Quantizes to llama.cpp's own types."""

from __future__ import annotations

import ctypes
import os

from agq_gguf.errors import InputError, OutputError
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.log import last_error, quiet_log, redirect
from agq_gguf.runtime.model_file import check_model_file

_STOCK_FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_s": 14, "q4_k_m": 15}  # enum llama_ftype


def quantize_stock(src: str | os.PathLike[str], dst: str | os.PathLike[str], type_name: str, threads: int = 0) -> None:
    """Quantizes a float GGUF to one of llama.cpp's own types, as llama-quantize does without an importance matrix.

    Raises InputError or OutputError.
    """
    if type_name not in _STOCK_FILE_TYPES:
        raise InputError(f"type must be one of {', '.join(_STOCK_FILE_TYPES)}, got {type_name!r}")
    check_model_file(src)
    api = llama_api()
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = _STOCK_FILE_TYPES[type_name]
    parameters.nthread = threads or default_threads()
    with quiet_log():
        redirect.errors.clear()
        if api.llama_model_quantize(os.fsencode(src), os.fsencode(dst), ctypes.byref(parameters)) != 0:
            raise OutputError(f"{dst}: llama.cpp cannot write {type_name}: {last_error('no reason given')}")
