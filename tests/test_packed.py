"""Checkpoints of packed integers: what is read equals a slow reference, written from the formats' descriptions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own deprecations
    import tiny_checkpoints as tiny  # noqa: F401

from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.import_hf import import_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Ints = NDArray[np.int64]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(values: list[int], bits: int) -> int:
    """One word of 32 bits, signed, with the first value in its lowest bits."""
    word = 0
    for i, value in enumerate(values):
        assert 0 <= value < 1 << bits
        word |= int(value) << (bits * i)
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_columns(q: Ints, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """[n, m] -> [n, m * bits / 32]; value i of each word is column `order[i]` of the word's columns."""
    n = 32 // bits
    order = order or list(range(n))
    padded = np.pad(q, ((0, 0), (0, -q.shape[1] % n)))
    rows = [[words([int(row[at + place]) for place in order], bits) for at in range(0, len(row), n)] for row in padded]
    return torch.tensor(rows, dtype=torch.int32)


class Packer:
    """Makes integers, zero points and scales for a matrix, and the tensors of one format from them."""

    def __init__(self, bits: int, group: int, symmetric: bool, shuffled: bool) -> None:
        self.bits, self.group, self.symmetric, self.shuffled = bits, group, symmetric, shuffled
        self.rng = np.random.default_rng(bits + group)

    def draw(self, rows: int, columns: int) -> None:
        size = columns if self.group == -1 else self.group
        groups = -(-columns // size)
        self.groups_of = np.arange(columns) // size
        if self.shuffled:
            self.rng.shuffle(self.groups_of)
        high = 1 << self.bits
        self.q = self.rng.integers(0, high, (rows, columns))
        self.z = np.full((rows, groups), high // 2) if self.symmetric else self.rng.integers(0, high, (rows, groups))
        self.s = (self.rng.uniform(0.5, 1.5, (rows, groups)) / high / columns**0.5).astype(np.float16)

    def weight(self) -> NDArray[np.float32]:
        """The matrix: scale times integer less zero point, each those of the column's group."""
        each = self.groups_of
        return self.s[:, each].astype(np.float32) * (self.q - self.z[:, each]).astype(np.float32)

    def gptq(self, stem: str, offset: int = 1) -> dict[str, torch.Tensor]:
        zeros = (self.z - offset) % (1 << self.bits)
        return {
            f"{stem}.qweight": pack_columns(self.q, self.bits).T.contiguous(),
            f"{stem}.qzeros": pack_columns(zeros.T, self.bits),
            f"{stem}.scales": torch.from_numpy(self.s.T.copy()),
            f"{stem}.g_idx": torch.from_numpy(self.groups_of.astype(np.int32)),
        }

    def awq(self, stem: str) -> dict[str, torch.Tensor]:
        return {
            f"{stem}.qweight": pack_columns(self.q.T, 4, AWQ_ORDER),
            f"{stem}.qzeros": pack_columns(self.z.T, 4, AWQ_ORDER),
            f"{stem}.scales": torch.from_numpy(self.s.T.copy()),
        }

    def compressed(self, stem: str) -> dict[str, torch.Tensor]:
        tensors = {
            f"{stem}.weight_packed": pack_columns(self.q, self.bits),
            f"{stem}.weight_scale": torch.from_numpy(self.s),
            f"{stem}.weight_shape": torch.tensor(self.q.shape),
        }
        if not self.symmetric:  # packed along the rows
            tensors[f"{stem}.weight_zero_point"] = pack_columns(self.z.T, self.bits).T.contiguous()
        if self.shuffled:
            tensors[f"{stem}.weight_g_idx"] = torch.from_numpy(self.groups_of.astype(np.int32))
        return tensors


def gptq_config(packer: Packer, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": packer.bits, "group_size": packer.group, "desc_act": packer.shuffled,
        "sym": packer.symmetric, **changes,
    }  # fmt: skip


def config_of(kind: str, packer: Packer) -> dict[str, Any]:
    if kind == "gptq":
        return gptq_config(packer)
    if kind == "gptq_v2":
        return gptq_config(packer, checkpoint_format="gptq_v2")
    if kind == "auto-gptq":
        return gptq_config(packer, quant_method="auto-round", packing_format="auto_round:auto_gptq")
    if kind == "auto-awq":
        return gptq_config(packer, quant_method="auto-round", packing_format="auto_round:auto_awq")
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": packer.group, "zero_point": True, "version": "gemm"}
    weights = {"num_bits": packer.bits, "type": "int", "symmetric": packer.symmetric, "strategy": "group"}
    weights["group_size"] = packer.group if packer.group > 0 else None
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def pack(folder: Path, kind: str, packer: Packer) -> dict[str, NDArray[np.float32]]:
    """Replaces the matrices of the layers in a checkpoint by packed ones; returns what they stand for."""
    tensors, wanted = load_file(folder / "model.safetensors"), {}
    for name in list(tensors):
        if tensors[name].ndim == 2 and "layers." in name:
            stem = name.removesuffix(".weight")
            packer.draw(*tensors.pop(name).shape)
            if kind in ("awq", "auto-awq"):
                tensors.update(packer.awq(stem))
            elif kind == "compressed":
                tensors.update(packer.compressed(stem))
            else:
                tensors.update(packer.gptq(stem, 0 if kind == "gptq_v2" else 1))
            wanted[name] = packer.weight()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, quantization_config=config_of(kind, packer))
    return wanted


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


@pytest.mark.parametrize(
    ("kind", "bits", "group", "symmetric", "shuffled"),
    [
        ("gptq", 4, 128, True, False),
        ("gptq", 4, 64, False, False),
        ("gptq", 4, 32, False, True),
        ("gptq", 4, -1, True, False),
        ("gptq", 8, 128, True, False),
        ("gptq_v2", 4, 128, False, False),
        ("auto-gptq", 4, 128, True, False),
        ("auto-gptq", 4, 32, False, False),
        ("auto-awq", 4, 128, True, False),
        ("awq", 4, 128, False, False),
        ("awq", 4, 32, False, False),
        ("compressed", 4, 128, True, False),
        ("compressed", 4, 32, False, False),
        ("compressed", 4, 64, True, True),
        ("compressed", 8, -1, True, False),
    ],
)
def test_packed_weights_are_read_exactly(
    kind: str, bits: int, group: int, symmetric: bool, shuffled: bool, own_checkpoint: Any, tmp_path: Path
) -> None:
    folder = own_checkpoint("opt")  # whose import changes the place and name of matrices, but not their values
    wanted = pack(folder, kind, Packer(bits, group, symmetric, shuffled))
    report = import_checkpoint(folder, tmp_path / "out.gguf", outtype="f32")
    name = {"g": "GPTQ", "c": "compressed-tensors"}.get(kind[0], "AutoRound" if kind.startswith("auto") else "AWQ")
    groups = "a scale per row" if group == -1 else f"groups of {group}"
    assert report.packed == f"{name}, {bits} bits, {groups}"
    places = {"self_attn.out_proj": "attn_output", "fc2": "ffn_down"}
    with open_gguf(tmp_path / "out.gguf") as reader:
        for layer in range(2):
            for part, place in places.items():
                found = reader.read(f"blk.{layer}.{place}.weight")
                np.testing.assert_array_equal(found, wanted[f"model.decoder.layers.{layer}.{part}.weight"])
            parts = [wanted[f"model.decoder.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
            np.testing.assert_array_equal(reader.read(f"blk.{layer}.attn_qkv.weight"), np.concatenate(parts))


def test_the_config_of_older_releases(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    packer = Packer(4, 128, True, False)
    pack(folder, "gptq", packer)
    import_checkpoint(folder, tmp_path / "a.gguf")
    change(folder, quantization_config=None)
    old = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    (folder / "quantize_config.json").write_text(json.dumps(old), "utf-8")
    import_checkpoint(folder, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


FIRST = "model.decoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        ({"quantization_config": None}, {}, r"packed integers .*qweight.* there is no quantize_config"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, {}, "must have 4 or 8 bits, got 3"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}}, {}, "group size must be"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "marlin"}}, {}, "awq, marlin"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8, "group_size": 128}}, {}, "must have 4 bits"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}}, {}, "gptq, marlin"),
        ({"quantization_config": {"quant_method": "auto-round", "bits": 4}}, {}, "auto-round, not named"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}, {}, "float-qua"),
        ({"quantization_config": "gptq"}, {}, "must be an object"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}, {}, r"must have .*\[2, 384\]"),
        ({}, {"scales": None}, r"fc1\.scales is missing"),
        ({}, {"qzeros": torch.zeros(1, 3, dtype=torch.int32)}, r"qzeros must have the shape \[1, 48\] .* got \[1, 3\]"),
        ({}, {"g_idx": torch.full((128,), 7, dtype=torch.int32)}, "g_idx must name one of 1 groups"),
        ({}, {"g_idx": torch.zeros(100, dtype=torch.int32)}, "g_idx must name"),
        ({}, {"weight": torch.zeros(384, 128)}, r"has both .*fc1\.weight and .*fc1\.qweight"),
        ({}, {"scales": torch.full((1, 384), float("nan"))}, "not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], damage: dict[str, torch.Tensor | None], message: str, own_checkpoint: Any, tmp_path: Path
) -> None:
    folder = own_checkpoint("opt")
    pack(folder, "gptq", Packer(4, 128, True, False))
    if damage:
        tensors = load_file(folder / "model.safetensors")
        for part, value in damage.items():
            tensors.pop(f"{FIRST}.{part}", None)
            if value is not None:
                tensors[f"{FIRST}.{part}"] = value
        save_file(tensors, folder / "model.safetensors")
    change(folder, **changes)
    with pytest.raises(InputError, match=message):
        import_checkpoint(folder, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_config_that_says_packed_of_floats(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("opt")
    change(folder, quantization_config=gptq_config(Packer(4, 128, True, False)))
    with pytest.raises(InputError, match=r"says GPTQ, 4 bits, groups of 128, but no tensor ends in \.qweight"):
        import_checkpoint(folder, tmp_path / "out.gguf")
