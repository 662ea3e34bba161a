"""Quantizes to llama.cpp's own types, as llama-quantize does."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError, OutputError
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.log import last_error, quiet_log, redirect
from agq_gguf.runtime.model_file import check_model_file

# enum llama_ftype
STOCK_FILE_TYPES = {
    "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25,
    "iq4_xs": 30,
}  # fmt: skip
_Q8_0 = 8  # enum ggml_type


def quantize_stock(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    type_name: str,
    threads: int = 0,
    *,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    tables_q8_0: bool = False,
) -> None:
    """Quantizes a float GGUF to one of llama.cpp's own types, as llama-quantize does.

    `importance` is an importance matrix: for each weight the mean squares of its input, [K], or [experts * K] for
    experts. With `tables_q8_0`, token embedding and output matrix become Q8_0. Raises InputError or OutputError.
    """
    if type_name not in STOCK_FILE_TYPES:
        raise InputError(f"type must be one of {', '.join(STOCK_FILE_TYPES)}, got {type_name!r}")
    check_model_file(src)
    api = llama_api()
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = STOCK_FILE_TYPES[type_name]
    parameters.nthread = threads or default_threads()
    if tables_q8_0:
        parameters.output_tensor_type = parameters.token_embedding_type = _Q8_0
    held = {name: np.ascontiguousarray(values, np.float32) for name, values in (importance or {}).items()}
    if held:
        entry, floats = api.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
        rows = [entry(name.encode(), values.ctypes.data_as(floats), values.size) for name, values in held.items()]
        array = (entry * (len(rows) + 1))(*rows)  # an entry of zeros ends the list
        parameters.imatrix = ctypes.cast(array, type(parameters.imatrix))
    with quiet_log(warnings=False):  # it warns of every tensor that falls back to another type
        redirect.errors.clear()
        if api.llama_model_quantize(os.fsencode(src), os.fsencode(dst), ctypes.byref(parameters)) != 0:
            raise OutputError(f"{dst}: llama.cpp cannot write {type_name}: {last_error('no reason given')}")
