"""Adds the type AGQ4 to the `gguf` package (PyPI), so that GGUFReader, gguf-dump and scripts read AGQ4 files."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import FormatError, HostError
from agq_gguf.format import blocks, reference

_NAME = "AGQ4"


class _Agq4:
    """The type for `gguf.quants`. It supports whole matrices only, because all rows share a matrix's parameters."""

    block_size = blocks.GROUP_COLUMNS
    type_size = blocks.BLOCK_BYTES

    @classmethod
    def can_quantize(cls, tensor: NDArray[Any]) -> bool:
        return blocks.shape_problem(*tensor.shape[-2:]) is None if tensor.ndim >= 2 else False

    @classmethod
    def quantize(cls, tensor: NDArray[Any]) -> NDArray[np.uint8]:
        """Quantizes without activation statistics; `agq_gguf.pack_agq4` can use them."""
        from agq_gguf.quantization.packing import pack_agq4

        return pack_agq4(tensor)

    @classmethod
    def dequantize(cls, tensor: NDArray[Any]) -> NDArray[np.float32]:
        rows = tensor.view(np.uint8)
        if rows.ndim < 2:
            raise FormatError(f"AGQ4 data must be a whole matrix, got one row of shape {rows.shape}")
        matrices = [reference.dequantize(blocks.unpack(m)) for m in rows.reshape(-1, *rows.shape[-2:])]
        return np.stack(matrices).reshape(*rows.shape[:-1], -1)


def extend() -> bool:
    """Adds AGQ4 to the enum, the size table and the quantizers of `gguf`. Returns False if `gguf` is not installed.

    May be called any number of times. Raises HostError if `gguf` uses the type number of AGQ4 for another type.
    """
    if importlib.util.find_spec("gguf") is None:
        return False
    from gguf import constants, quants

    types: Any = constants.GGMLQuantizationType
    member = types._value2member_map_.get(blocks.TYPE_ID)
    if member is None:
        # An enum has no function to add a member; these are the steps that the enum module itself takes for each.
        member = int.__new__(types, blocks.TYPE_ID)
        member._name_, member._value_, member._sort_order_ = _NAME, blocks.TYPE_ID, len(types)
        member.__objclass__ = types
        setattr(types, _NAME, member)
        types._member_map_[_NAME] = member
        types._member_names_.append(_NAME)
        types._value2member_map_[blocks.TYPE_ID] = member
    elif member.name != _NAME:
        raise HostError(
            f"the installed gguf package uses type number {blocks.TYPE_ID}, which is AGQ4's, for {member.name}; "
            "install an older release of gguf"
        )
    constants.GGML_QUANT_SIZES[member] = (blocks.GROUP_COLUMNS, blocks.BLOCK_BYTES)
    registered: dict[Any, Any] = quants._type_traits
    registered[member] = _Agq4
    return True
