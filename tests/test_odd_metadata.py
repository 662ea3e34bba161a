"""Metadata of any type under every key that is read: a model is used, or refused with an `AgqError`, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from command_line import run

from agq_gguf.calibration.imatrix import load_imatrix
from agq_gguf.errors import AgqError, InputError
from agq_gguf.gguf_io.reader import Reader, check_source, open_gguf
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.gguf_io.writer import Value, Writer
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.inspection.report import gather
from agq_gguf.inspection.verify import verify
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize
from agq_gguf.runtime.model_file import check_model_file

INFINITE = np.array([float("inf"), 0.0], np.float32)
ODD: list[Value] = [
    "text", "", True, 0, -1.0, float("inf"), float("nan"), 2**32 - 1, np.uint64(2**64 - 1), np.int64(-1),
    INFINITE, np.array([1, 2], np.int32), np.array([], np.int32), ["a", "b"],
]  # fmt: skip
PRUNING: dict[str, Value] = {
    "score": "recent", "keep": 64, "reach": 2, "reuse": 1, "layers": np.array([0], np.int32), "saving": 0.3,
    "calibration": "text", "nll": 0.5, "curve.saving": np.array([0.3], np.float32),
    "curve.kl": np.array([0.1], np.float32), "curve.nll": np.array([0.5], np.float32),
    "curve.thresholds": np.array([0.25], np.float32),
}  # fmt: skip


def copy(source: Path, target: Path, added: dict[str, Value]) -> Path:
    """The model with other metadata."""
    with (
        open_gguf(source) as reader,
        Writer(target, reader.metadata, added, list(reader.tensors.values())) as writer,
    ):
        for name in reader.tensors:
            writer.write(name, reader.chunks(name))
    return target


@pytest.fixture(scope="module")
def models_here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float model, and an AGQ4 one that says how it was pruned."""
    folder = tmp_path_factory.mktemp("odd")
    source = tiny_models.write_llama(folder / "f16.gguf", n_layer=1, n_ff=128, vocab=500)
    quantize(
        source, folder / "plain.gguf", options=QuantizeOptions(threads=1, matrix=MatrixOptions(learn_codebook=False))
    )
    pruning = {f"agq.prune.{key}": value for key, value in PRUNING.items()}
    return source, copy(folder / "plain.gguf", folder / "agq4.gguf", pruning)


def use(path: Path) -> None:
    """Whatever reads metadata, without running the model."""

    def attempt(function: Callable[..., Any], *arguments: Any) -> None:
        with suppress(AgqError):
            function(*arguments)

    for function in (check_model_file, inspect_file, verify, plan_file):
        attempt(function, path)
    attempt(partial(gather, tokens=0), path)
    with suppress(AgqError), open_model(path) as reader:
        attempt(check_source, reader)


def test_every_key_that_is_read(
    models_here: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    get = Reader.get

    def noting(self: Reader, key: str, default: Any = None) -> Any:
        asked.add(key)
        return get(self, key, default)

    monkeypatch.setattr(Reader, "get", noting)
    for path in models_here:
        use(path)
    keys = sorted(asked)
    assert len(keys) > 20 and {"llama.context_length", "split.count", "agq.prune.keep"} <= asked
    for key in keys:
        for value in ODD:
            odd = copy(models_here[key.startswith("agq.")], tmp_path / "odd.gguf", {key: value})
            try:
                use(odd)
            except Exception as e:
                raise AssertionError(f"{key} = {value!r}") from e


@pytest.mark.parametrize(
    ("key", "value"),
    [("general.name", ["a", "b"]), ("agq.prune.keep", float("inf")), ("agq.error.values", INFINITE)],
)
def test_inspect_shows_it(key: str, value: Value, models_here: tuple[Path, Path], tmp_path: Path) -> None:
    odd = copy(models_here[1], tmp_path / "odd.gguf", {key: value})
    for arguments in ([], ["--json"]):
        assert "agq4" in run("inspect", odd, *arguments).stdout


@pytest.mark.parametrize(
    ("sums", "counts"),
    [
        ([1, 1], [np.inf]), ([1, 1], [np.nan]), ([1, 1], [-1]), ([1, 1], [1e-40]), ([np.inf, 1], [1]), ([-1, 1], [1]),
        ([3e38, 1, 3e38, 1], [0, 0]),
    ],
)  # fmt: skip
def test_imatrix_of_odd_numbers(sums: list[float], counts: list[float], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "none")
    writer.add_type("imatrix")
    writer.add_tensor("w.in_sum2", np.array(sums, np.float32).reshape(len(counts), -1))
    writer.add_tensor("w.counts", np.array(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="the entry of w is damaged"):
        load_imatrix(tmp_path / "i.gguf")
