"""Checkpoints whose matrices are packed integers: GPTQ, AWQ, AutoRound, compressed-tensors. Turns them into floats.

All of them store, for a weight W [M, K] in groups of columns, integers q, zero points z and scales s:

    W[m, k] = s[m, g(k)] * (q[m, k] - z[m, g(k)])

They differ in where a word of 32 bits takes its integers from, and in what is added to z. g(k) is k / group size,
unless a tensor `g_idx` [K] says otherwise (GPTQ with desc_act, "activation order").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agq_gguf.errors import InputError
from agq_gguf.import_hf.checkpoint import Checkpoint, Config, read_object

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of 8, that each 4 bits of a word belong to
_GPTQ, _AWQ, _COMPRESSED = "GPTQ", "AWQ", "compressed-tensors"
_WORDS_OF = {_GPTQ: ".qweight", _AWQ: ".qweight", _COMPRESSED: ".weight_packed"}
_PARTS = {
    _GPTQ: (".qweight", ".qzeros", ".scales", ".g_idx"),
    _AWQ: (".qweight", ".qzeros", ".scales"),
    _COMPRESSED: (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
}


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint packs its matrices."""

    name: str  # for messages, such as "AutoRound"
    layout: str  # one of the keys of `_PARTS`
    bits: int
    group: int  # columns; -1: all
    zero_offset: int  # is added to stored zero points

    def __str__(self) -> str:
        groups = f"groups of {self.group}" if self.group > 0 else "a scale per row"
        return f"{self.name}, {self.bits} bits, {groups}"


def scheme_of(config: Config, folder: Path) -> Scheme | None:
    """How the checkpoint is packed; None if its config does not say that it is quantized.

    Raises InputError for other ways of quantizing.
    """
    found, path = config.get("quantization_config"), config.path
    for name in ("quantize_config.json", "quant_config.json"):  # older releases of AutoGPTQ and of AutoAWQ
        if found is None and (folder / name).is_file():
            path = folder / name
            found = {"quant_method": "gptq" if name.startswith("quantize") else "awq", **read_object(path)}
    if found is None:
        return None
    if not isinstance(found, dict):
        raise InputError(f"{path}: quantization_config must be an object, got {found!r}")
    settings = Config(found, path)
    method = str(settings.get("quant_method", "unknown")).lower()
    if method == "compressed-tensors":
        return _compressed(settings)
    layout, offset, kind, name = _layout(method, settings)
    if not layout:
        raise InputError(
            f"{path}: the weights are already quantized ({method}, {kind}); only GPTQ, AWQ (gemm), AutoRound (packed "
            "like these two) and compressed-tensors (pack-quantized) are read; start from the float checkpoint"
        )
    bits = settings.get("bits", settings.get("w_bit"))
    group = settings.get("group_size", settings.get("q_group_size", -1))
    sizes = _sizes(path, bits, group)
    if layout == _AWQ and bits != 4:
        raise InputError(f"{path}: the weights must have 4 bits for {name} (gemm), got {bits}")
    return Scheme(name, layout, *sizes, offset)


def _layout(method: str, settings: Config) -> tuple[str, int, str, str]:
    """Layout ('' if unknown), what is added to zero points, the kind for messages, and the name."""
    if method == "gptq":
        kind = str(settings.get("checkpoint_format", "gptq")).lower()
        return (*{"gptq": (_GPTQ, 1), "gptq_v2": (_GPTQ, 0)}.get(kind, ("", 0)), kind, "GPTQ")
    if method == "awq":
        kind = str(settings.get("version", "gemm")).lower()
        return (_AWQ if kind == "gemm" else "", 0, kind, "AWQ")
    if method in ("auto-round", "intel/auto-round"):
        kind = str(settings.get("packing_format", "not named")).lower()
        table = {"auto_round:auto_gptq": (_GPTQ, 1), "auto_round:auto_awq": (_AWQ, 0)}
        return (*table.get(kind, ("", 0)), kind, "AutoRound")
    return "", 0, "not supported", ""


def _compressed(settings: Config) -> Scheme:
    path, kind = settings.path, settings.get("format")
    groups = settings.get("config_groups", {})
    if kind != "pack-quantized" or not isinstance(groups, dict) or len(groups) != 1:
        raise InputError(
            f"{path}: the weights are already quantized (compressed-tensors, {kind}); only the format pack-quantized "
            "with one group of layers is read; start from the float checkpoint"
        )
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("type", "int") != "int":
        raise InputError(f"{path}: the weights of config_groups must be integers, got {weights!r}")
    size = weights.get("group_size")
    return Scheme(
        "compressed-tensors", _COMPRESSED, *_sizes(path, weights.get("num_bits"), -1 if size is None else size), 0
    )


def _sizes(path: Path, bits: Any, group: Any) -> tuple[int, int]:
    if type(bits) is not int or bits not in (4, 8):
        raise InputError(f"{path}: the weights must have 4 or 8 bits, got {bits!r}; start from the float checkpoint")
    if type(group) is not int or (group != -1 and not 0 < group <= 1 << 20):
        raise InputError(f"{path}: the group size must be -1 or a number of columns, got {group!r}")
    return bits, group


def refuse_unnamed(checkpoint: Checkpoint) -> None:
    """Raises InputError if the matrices are packed although no config says how."""
    words = next((name for name in checkpoint.sizes if name.endswith(tuple(_WORDS_OF.values()))), None)
    if words is not None:
        raise InputError(
            f"{checkpoint.folder}: the weights are packed integers (tensor {words}), but config.json has no "
            "quantization_config and there is no quantize_config.json; download the config that belongs to them"
        )


class Unpacked:
    """The tensors of a packed checkpoint as floats. `shapes` and `load` are those of `Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme) -> None:
        """Checks the shapes of all packed tensors. Raises InputError, which names the tensor."""
        self.folder, self._checkpoint, self._scheme = checkpoint.folder, checkpoint, scheme
        words = _WORDS_OF[scheme.layout]
        packed = [name.removesuffix(words) for name in checkpoint.sizes if name.endswith(words)]
        parts = {stem + part for stem in packed for part in _PARTS[scheme.layout]}
        self.shapes = {name: shape for name, shape in checkpoint.shapes.items() if name not in parts}
        self._packed = {f"{stem}.weight": stem for stem in packed}
        for name, stem in self._packed.items():
            if name in self.shapes:
                raise InputError(f"{self.folder}: has both {name} and {stem}{words}, which name the same matrix")
            self.shapes[name] = self._shape(stem)
        if not packed:
            raise InputError(f"{self.folder}: config.json says {scheme}, but no tensor ends in {words}")

    def packed(self, name: str) -> bool:
        """Whether a tensor was packed integers."""
        return name in self._packed

    def _size(self, name: str) -> tuple[int, ...]:
        size = self._checkpoint.sizes.get(name)
        if size is None:
            raise InputError(f"{self.folder}: tensor {name} is missing; its download is incomplete")
        return size

    def _shape(self, stem: str) -> tuple[int, int]:
        """Rows and columns of a matrix. Raises InputError if its parts do not fit together."""
        scheme, per_word = self._scheme, _WORD // self._scheme.bits
        words = self._size(stem + _WORDS_OF[scheme.layout])
        scales = self._size(stem + (".weight_scale" if scheme.layout == _COMPRESSED else ".scales"))
        if len(words) != 2 or len(scales) != 2 or 0 in words + scales:
            raise InputError(f"{self.folder}: tensor {stem} must be matrices, got shapes {list(words)}, {list(scales)}")
        if scheme.layout == _GPTQ:
            rows, columns = words[1], words[0] * per_word
            wanted = {".scales": (-1, rows), ".qzeros": (-1, -(-rows // per_word))}
        elif scheme.layout == _AWQ:
            rows, columns = words[1] * per_word, words[0]
            wanted = {".scales": (-1, rows), ".qzeros": (-1, words[1])}
        else:
            rows, columns = words[0], self._columns(stem, words[1] * per_word)
            wanted = {".weight_scale": (rows, -1)}
        groups = 1 if scheme.group == -1 else -(-columns // scheme.group)
        for part, pattern in wanted.items():
            expected = tuple(groups if n == -1 else n for n in pattern)
            if self._size(stem + part) != expected:
                raise InputError(
                    f"{self.folder}: tensor {stem}{part} must have the shape {list(expected)} for {scheme}, got "
                    f"{list(self._size(stem + part))}"
                )
        return rows, columns

    def _columns(self, stem: str, most: int) -> int:
        """The columns of a compressed-tensors matrix, whose last word may be filled in part."""
        found = self._checkpoint.load(stem + ".weight_shape").tolist() if self._size(stem + ".weight_shape") else []
        if len(found) != 2 or not most - _WORD // self._scheme.bits < found[1] <= most:
            raise InputError(f"{self.folder}: tensor {stem}.weight_shape says {found}, which its words do not hold")
        return int(found[1])

    def load(self, name: str) -> torch.Tensor:
        """One tensor; a matrix that was packed is F32. Raises InputError."""
        stem = self._packed.get(name)
        if stem is None:
            return self._checkpoint.load(name)
        scheme, (rows, columns) = self._scheme, self.shapes[name]
        read = {part: self._checkpoint.load(stem + part) for part in _PARTS[scheme.layout] if self._has(stem + part)}
        if scheme.layout == _COMPRESSED:
            codes, zeros = self._signed(read, rows, columns)
            scales = read[".weight_scale"].float()
        else:
            order = _AWQ_ORDER if scheme.layout == _AWQ else None
            if scheme.layout == _GPTQ:
                codes = spread(read[".qweight"].T, scheme.bits)
            else:
                codes = spread(read[".qweight"], scheme.bits, order).T
            stored = spread(read[".qzeros"], scheme.bits, order)[:, :rows].T + scheme.zero_offset
            zeros = (stored & ((1 << scheme.bits) - 1)).float()
            scales = read[".scales"].T.float()
        groups = self._groups(stem, read, columns, scales.shape[1])
        return (codes.float() - zeros[:, groups]) * scales[:, groups]

    def _has(self, name: str) -> bool:
        return name in self._checkpoint.sizes

    def _signed(self, read: dict[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [M, K] and zero points [M, groups] of compressed-tensors, which packs them plus half of their range."""
        bits, half = self._scheme.bits, 1 << (self._scheme.bits - 1)
        codes = spread(read[".weight_packed"], bits)[:, :columns] - half
        zeros = read.get(".weight_zero_point")
        if zeros is None:
            return codes, torch.zeros(read[".weight_scale"].shape)
        if zeros.dtype == torch.int32:  # packed along the rows; older releases store them as they are
            zeros = spread(zeros.T, bits).T[:rows] - half
        return codes, zeros.float()

    def _groups(self, stem: str, read: dict[str, torch.Tensor], columns: int, n: int) -> torch.Tensor:
        """The group of each column [K]."""
        listed = read.get(".g_idx", read.get(".weight_g_idx"))
        # Without activation order compressed-tensors stores -1 everywhere.
        if listed is None or (listed < 0).all():
            return torch.arange(columns) // (self._scheme.group if self._scheme.group > 0 else columns)
        if listed.shape != (columns,) or listed.min() < 0 or listed.max() >= n:
            raise InputError(f"{self.folder}: tensor {stem}: g_idx must name one of {n} groups for {columns} columns")
        return listed.long()


def spread(words: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The unsigned integers in words of 32 bits: [n, w] -> int32 [n, w * 32 / bits], lowest bits first.

    With `order` the integer i of each word belongs to place `order[i]`.
    """
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    found = (words.to(torch.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    if order is not None:
        found = found[..., torch.argsort(torch.tensor(order))]
    return found.flatten(1)
