"""Which tensors are converted: compared with llama-quantize, for every architecture and tensor name that gguf knows."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import architectures
import gguf
import numpy as np
import pytest
import tiny_models
from llama_cpp import llama_cpp as api

from agq_gguf.gguf_io.reader import Tensor, open_gguf
from agq_gguf.quantization.guidance import unused_experts
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize
from agq_gguf.quantization.type_plan import plan_tensor

ROWS = COLUMNS = 512
EXPERTS = 4
NOT_WRITTEN_YET = ("gptj",)  # gguf knows the name, llama.cpp refuses it

# Names that llama-quantize would quantize if they were matrices. In real models they are vectors, or convolutions whose
# rows are shorter than a block of any type.
VECTORS = r"norm|\.bn\.|lerp|rope_f|ssm_[ad]\.|exp_probs|inp_shexp|time_mix_(decay|k_[ak]|r_k|ln)\."
CONVOLUTIONS = r"conv|rel_pos|pos_embd"


class Description(ctypes.Structure):
    """llama.cpp's llama_quant_model_desc (llama-ext.h): the architecture and eight sizes."""

    _fields_ = [("architecture", ctypes.c_char_p)] + [(f"size_{i}", ctypes.c_uint32) for i in range(8)]


class Memory(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class LlamaQuantize:
    """llama-quantize's own rules, which libllama exports for llama.cpp's tests, under their C++ names."""

    def __init__(self) -> None:
        self._describe = self._function(
            "_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc", ctypes.c_void_p
        )
        self._start = self._function(
            "_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params", ctypes.c_void_p
        )
        self._allows = self._function(
            "_Z38llama_quant_tensor_allows_quantizationPK19quantize_state_implPK11ggml_tensor", ctypes.c_bool
        )
        self._tensor = self._function("ggml_new_tensor", ctypes.c_void_p)
        self._name = self._function("ggml_set_name", ctypes.c_void_p)
        memory = self._function("ggml_init", ctypes.c_void_p)
        memory.argtypes = [Memory]
        self._context = memory(Memory(1 << 24, None, True))
        self._parameters = api.llama_model_quantize_default_params()

    @staticmethod
    def _function(name: str, result: Any) -> Any:
        function = getattr(api._lib, name, None)
        if function is None:
            pytest.skip(f"this libllama does not export {name}")
        function.restype = result
        return function

    def quantizes(self, arch: str, names: dict[str, tuple[int, ...]]) -> set[str]:
        """The tensors of these names and shapes that llama-quantize converts."""
        model = self._describe(ctypes.byref(Description(arch.encode(), COLUMNS, ROWS, 2, 8, 8, EXPERTS, 64, 64)))
        state = ctypes.c_void_p(self._start(ctypes.c_void_p(model), ctypes.byref(self._parameters)))
        found = set()
        for name, shape in names.items():
            sizes = (ctypes.c_int64 * len(shape))(*reversed(shape))
            tensor = ctypes.c_void_p(self._tensor(ctypes.c_void_p(self._context), 1, len(shape), sizes))
            self._name(tensor, name.encode())
            if self._allows(state, tensor):
                found.add(name)
        return found


def shapes_of(arch: gguf.MODEL_ARCH) -> dict[str, tuple[int, ...]]:
    """Every tensor that gguf knows of an architecture, as a matrix or as experts."""
    names = [gguf.TENSOR_NAMES[tensor].format(bid=0) + ".weight" for tensor in gguf.MODEL_TENSORS[arch]]
    return {
        name: (EXPERTS, ROWS, COLUMNS) if re.search(r"exps\.|attn_[kv]_b\.", name) else (ROWS, COLUMNS)
        for name in names
    }


def test_the_same_tensors_as_llama_quantize() -> None:
    rules, seen = LlamaQuantize(), 0
    for arch, name in gguf.MODEL_ARCH_NAMES.items():
        if name in NOT_WRITTEN_YET:
            continue
        shapes = shapes_of(arch)
        theirs = rules.quantizes(name, shapes)
        ours = {n for n, shape in shapes.items() if plan_tensor(Tensor(n, "f16", shape, 0, 0)).type_name != "f16"}
        missing = {n for n in theirs - ours if not re.search(f"{VECTORS}|{CONVOLUTIONS}", n)}
        assert missing == set(), f"{name}: llama-quantize converts {missing}"
        # What is ours alone must be no kind of tensor that llama-quantize keeps for its quality.
        assert ours - theirs == set(), f"{name}: llama-quantize keeps {ours - theirs}"
        seen += len(shapes)
    assert seen > 2000


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_no_infinity_is_written(dtype: str, tmp_path: Path) -> None:
    """A value that F16 cannot hold: the fallback of a matrix with odd columns, and a type that the user asks for."""
    source = tiny_models.write_llama(tmp_path / "m.gguf", dtype=dtype, n_embd=144, n_head=4, n_kv=4, n_layer=1)
    large = tmp_path / "large.gguf"
    raw = bytearray(source.read_bytes())
    with open_gguf(source) as reader:
        names = ("token_embd.weight", "blk.0.attn_q.weight")
        for name in names:
            value = np.array([1e5], np.float32).view(np.uint32)
            data = value.tobytes() if dtype == "f32" else (value >> 16).astype(np.uint16).tobytes()
            offset = reader.tensors[name].offset
            raw[offset : offset + len(data)] = data
    large.write_bytes(raw)
    options = QuantizeOptions(embedding_type="f16", output_type="f16", threads=1)
    report = quantize(large, tmp_path / "out.gguf", options=options)
    types = {tensor.name: tensor.type_name for tensor in report.tensors}
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == dtype
    assert types["output.weight"] == "f16"
    with open_gguf(tmp_path / "out.gguf") as out:
        assert all(np.isfinite(out.read(name)).all() for name in out.tensors if out.tensors[name].type_name != "agq4")


def test_a_block_for_further_tokens_is_no_layer(tmp_path: Path, words: str) -> None:
    from agq_gguf.pruning.plan import work_of

    path = architectures.write_glm4moe(tmp_path / "glm.gguf", further=True)
    plain = architectures.write_glm4moe(tmp_path / "plain.gguf", further=False)

    def work(path: Path) -> Any:
        with open_gguf(path) as reader:
            return work_of({name: tensor.n_elements for name, tensor in reader.tensors.items()})

    assert work(path) == work(plain)
    report = quantize(path, tmp_path / "o.gguf", calibration=[words], options=QuantizeOptions(threads=1))
    [warning] = [w for w in report.warnings if "calibrated on" not in w]
    assert "blk.2" in warning and "multi-token prediction" in warning


def test_experts_that_no_token_reaches(tmp_path: Path, words: str) -> None:
    """Named in a warning, and quantized with the statistics of all experts."""
    path = architectures.write_gpt_oss(tmp_path / "m.gguf", unused=3)
    report = quantize(path, tmp_path / "o.gguf", calibration=[words], options=QuantizeOptions(threads=1))
    [warning] = [w for w in report.warnings if "calibrated on" not in w]
    assert "expert 3 of blk.0, expert 3 of blk.1 were never used" in warning
    assert all(tensor.error < 0.2 for tensor in report.tensors if tensor.error is not None)
    assert unused_experts({"blk.5.ffn_up_exps.weight": [], "blk.1.ffn_up_exps.weight": [0, 1, 2, 3, 4, 5]}) == [
        "expert 0 of blk.1, expert 1 of blk.1, expert 2 of blk.1, expert 3 of blk.1 and 2 more experts were never used "
        "by the calibration data; they got the statistics of all experts; a longer text reaches more of them"
    ]


def test_an_expert_without_counts_in_an_imatrix(tmp_path: Path) -> None:
    path = architectures.write_gpt_oss(tmp_path / "m.gguf")
    name = "blk.1.ffn_up_exps.weight"
    counts = np.array([[9], [0], [9], [9]], np.float32)
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "none")
    writer.add_string("general.type", "imatrix")
    writer.add_tensor(f"{name}.in_sum2", np.ones((4, 128), np.float32) * counts)
    writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = quantize(path, tmp_path / "o.gguf", imatrix=tmp_path / "i.gguf", options=QuantizeOptions(threads=1))
    assert any("expert 1 of blk.1 was never used" in warning for warning in report.warnings)


def test_a_plan_of_a_file_names_every_tensor(tmp_path: Path) -> None:
    path = architectures.write_gemma3n(tmp_path / "m.gguf")
    with open_gguf(path) as reader:
        assert [plan.source.name for plan in plan_file(path)] == list(reader.tensors)
