"""Reads ggml tensors of the running llama.cpp, and converts rows of its types, through ctypes.

`struct ggml_tensor` is not part of llama-cpp-python's interface, so its layout is declared here. It is checked once
against the library's own functions: a different layout raises an error before anything is misread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import HostError
from agq_gguf.gguf_io.reader import TYPE_IDS, TYPES
from agq_gguf.runtime.host import llama_cpp_python

_MAX_DIMENSIONS = 4
_MAX_SOURCES = 10
F32, I32 = 0, 26
_FAMILIES = {"UNARY": "ggml_unary_op_name", "GLU": "ggml_glu_op_name"}  # ops whose first parameter says which one
_DTYPES = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64}


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _MAX_DIMENSIONS),
    ("nb", ctypes.c_size_t * _MAX_DIMENSIONS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * _MAX_SOURCES),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    ]


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Ggml:
    """The library that llama_cpp has loaded. Raises HostError if its layout is not as expected."""

    def __init__(self) -> None:
        host = llama_cpp_python().library
        self._lib = ctypes.CDLL(host._name, handle=host._handle)
        for function in ("ggml_op_name", "ggml_type_name", *_FAMILIES.values()):
            getattr(self._lib, function).restype = ctypes.c_char_p
            getattr(self._lib, function).argtypes = [ctypes.c_int]
        self._lib.ggml_backend_buffer_is_host.restype = ctypes.c_bool
        self._lib.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
        self._lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
        ]  # fmt: skip
        self._lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
        self._lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
        self._probe()
        names = [self._lib.ggml_op_name(i) for i in range(64)]  # both are far from the end of the enum
        self.mul_mat, self.mul_mat_id = names.index(b"MUL_MAT"), names.index(b"MUL_MAT_ID")
        self.add, self.mul = names.index(b"ADD"), names.index(b"MUL")
        self.norms = (names.index(b"NORM"), names.index(b"RMS_NORM"))

    def _probe(self) -> None:
        lib = self._lib
        lib.ggml_init.restype, lib.ggml_init.argtypes = ctypes.c_void_p, [_InitParams]
        lib.ggml_free.restype, lib.ggml_free.argtypes = None, [ctypes.c_void_p]
        for name, extra in (
            ("ggml_new_tensor_2d", [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
            ("ggml_mul_mat", []),
        ):
            function = getattr(lib, name)
            pointers = [ctypes.c_void_p] if extra else [ctypes.c_void_p] * 3
            function.restype, function.argtypes = ctypes.POINTER(GgmlTensor), pointers + extra
        lib.ggml_set_name.restype = ctypes.c_void_p
        lib.ggml_set_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        context = lib.ggml_init(_InitParams(1 << 16, None, False))
        try:
            left = lib.ggml_new_tensor_2d(context, F32, 5, 7)
            right = lib.ggml_new_tensor_2d(context, F32, 5, 3)
            lib.ggml_set_name(left, b"probe")
            product = lib.ggml_mul_mat(context, left, right).contents
            t = left.contents
            fits = (
                lib.ggml_type_size(F32) == 4
                and (t.type, t.name, list(t.ne), list(t.nb)) == (F32, b"probe", [5, 7, 1, 1], [4, 20, 140, 140])
                and t.data is not None
                and not t.view_src
                and lib.ggml_op_name(product.op) == b"MUL_MAT"
                and ctypes.addressof(product.src[0].contents) == ctypes.addressof(t)
                and product.src[1].contents.data == right.contents.data
                and not product.src[2]
            )
        finally:
            lib.ggml_free(context)
        if not fits:
            raise HostError(
                "the ggml inside the installed llama-cpp-python lays out its tensors in an unknown way; "
                "install a release named in the README"
            )

    def floats(self, tensor: GgmlTensor) -> NDArray[np.float32]:
        """The data of an F32 tensor as a view, not a copy. Shape in numpy order: [ne3, ne2, ne1, ne0].

        Raises HostError if the data has another type or is not in host memory.
        """
        return self._array(tensor, F32, np.dtype(np.float32))

    def integers(self, tensor: GgmlTensor) -> NDArray[np.int32]:
        """Same as `floats`, for an I32 tensor."""
        return self._array(tensor, I32, np.dtype(np.int32))

    def op_name(self, tensor: GgmlTensor) -> str:
        """ggml's name of the operation; of one in a family with the family's name: ``UNARY.SILU``, ``GLU.SWIGLU``."""
        name: str = self._lib.ggml_op_name(tensor.op).decode()
        if name in _FAMILIES:
            name += "." + getattr(self._lib, _FAMILIES[name])(tensor.op_params[0]).decode()
        return name

    def type_name(self, tensor: GgmlTensor) -> str:
        """ggml's name of the type of a tensor that llama.cpp has computed or set; not for AGQ4 weights."""
        return self._lib.ggml_type_name(tensor.type).decode()

    def values(self, tensor: GgmlTensor) -> NDArray[Any] | None:
        """The data of a tensor of floats or integers, not copied, [ne3, ne2, ne1, ne0]; None for other types.

        Also None if it has no memory yet. Raises HostError if the memory is not the host's.
        """
        dtype = _DTYPES.get(self.type_name(tensor))
        if dtype is None or not tensor.data:
            return None
        return self._array(tensor, tensor.type, np.dtype(dtype))

    def quantize(
        self, type_id: int, rows: NDArray[np.float32], row_bytes: int, importance: NDArray[np.float32] | None
    ) -> NDArray[np.uint8]:
        """Quantizes rows [n, K] to a ggml type with `row_bytes` bytes per row. `importance` [K] weights the errors."""
        source = np.ascontiguousarray(rows, np.float32)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        made = np.empty((len(source), row_bytes), np.uint8)
        pointer = None if weights is None else weights.ctypes.data
        arguments = type_id, source.ctypes.data, made.ctypes.data, 0, len(source), source.shape[1], pointer
        if self._lib.ggml_quantize_chunk(*arguments) != made.nbytes:
            raise HostError(f"ggml makes rows of another size than {row_bytes} bytes of type {type_id}")
        return made

    def decoder(self, type_name: str) -> Callable[[bytearray], NDArray[np.float32]]:
        """A function that turns whole blocks of one of ggml's types into float32 [n].

        Raises HostError if this ggml has none for the type.
        """
        type_id = TYPE_IDS[type_name]  # at most 41, which every ggml since 0.15 knows; they do not check the number
        _, block, block_bytes = TYPES[type_id]
        traits = self._lib.ggml_get_type_traits(type_id).contents
        if (traits.name, traits.block, traits.block_bytes) != (type_name.encode(), block, block_bytes):
            raise HostError(
                f"the ggml inside the installed llama-cpp-python does not know the type {type_name} of {block} weights "
                f"in {block_bytes} bytes; install a newer release"
            )
        if not traits.to_float:
            raise HostError(f"ggml cannot turn the type {type_name} into floats")
        convert = _TO_FLOAT(traits.to_float)

        def decode(data: bytearray) -> NDArray[np.float32]:
            source = np.frombuffer(data, np.uint8)
            made = np.empty(source.size // block_bytes * block, np.float32)
            convert(source.ctypes.data, made.ctypes.data, made.size)
            return made

        return decode

    def _array(self, tensor: GgmlTensor, wanted: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        owner = tensor.view_src.contents if tensor.view_src else tensor
        if tensor.type != wanted or not tensor.data:
            name = tensor.name.decode("utf-8", "replace")
            raise HostError(f"the graph's tensor {name} is of ggml type {tensor.type}, wanted {wanted}")
        if owner.buffer and not self._lib.ggml_backend_buffer_is_host(owner.buffer):
            raise HostError("activations are not in host memory; calibrate with a CPU build of llama-cpp-python")
        shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
        n_bytes = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
        memory = (ctypes.c_uint8 * n_bytes).from_address(tensor.data)
        return np.ndarray(shape, dtype, buffer=memory, strides=strides)


@cache
def ggml() -> Ggml:
    """The library. It is checked once."""
    return Ggml()
