"""Fixtures shared by all tests: tiny models made once, and the ``slow`` marker."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A second thread of PyTorch or BLAS waits for the first in a busy loop: with tensors as small as these, that costs
# several times the work. They read this when they are loaded; llama.cpp is told how many threads to use.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import needed
import pytest
import tiny_models

PACKAGED = Path(__file__).parent.parent / "agq_gguf" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed.check(item)


def pytest_unconfigure() -> None:
    # llama_cpp opens the null device twice and never closes it, of which Python would complain at its end.
    if llama_utils := sys.modules.get("llama_cpp._utils"):
        llama_utils.outnull_file.close()
        llama_utils.errnull_file.close()


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    """What llama.cpp said in earlier tests is no answer in this one."""
    if low_level := sys.modules.get("low_level"):
        low_level.log.clear()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the fixtures below write to; read only for tests."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def words() -> str:
    """About 3000 tokens of text for the tiny models."""
    choose = random.Random(7)
    return " ".join(choose.choices(tiny_models.WORDS, k=3000))


@pytest.fixture(scope="session")
def words_file(models: Path, words: str) -> Path:
    path = models / "words.txt"
    path.write_text(words, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama_f16(models: Path) -> Path:
    return tiny_models.write_llama(models / "llama-f16.gguf")


@pytest.fixture(scope="session")
def small(models: Path) -> Path:
    """A model that quantizes in a moment."""
    return tiny_models.write_llama(models / "small.gguf", n_layer=1, n_ff=128)


@pytest.fixture(scope="session")
def gpt2_f16(models: Path) -> Path:
    return tiny_models.write_gpt2(models / "gpt2-f16.gguf")


@pytest.fixture(scope="session")
def bert_f16(models: Path) -> Path:
    return tiny_models.write_bert(models / "bert-f16.gguf")


def _stock(source: Path, type_name: str) -> Path:
    from agq_gguf.runtime.stock_quantize import quantize_stock

    path = source.with_name(f"{source.stem}-{type_name}.gguf")
    quantize_stock(source, path, type_name, threads=1)
    return path


@pytest.fixture(scope="session")
def llama_q8(llama_f16: Path) -> Path:
    return _stock(llama_f16, "q8_0")


@pytest.fixture(scope="session")
def llama_q4(llama_f16: Path) -> Path:
    return _stock(llama_f16, "q4_0")


@pytest.fixture(scope="session")
def llama_agq(llama_f16: Path, words_file: Path) -> Path:
    from agq_gguf.matrix.options import MatrixOptions
    from agq_gguf.quantization.options import QuantizeOptions
    from agq_gguf.quantization.pipeline import quantize

    path = llama_f16.with_name("llama-agq4.gguf")
    # Learning a codebook takes most of the time, and these tests do not need it.
    options = QuantizeOptions(threads=1, calibration_tokens=1024, matrix=MatrixOptions(learn_codebook=False))
    quantize(llama_f16, path, calibration=words_file, options=options)
    return path


@pytest.fixture(scope="session")
def ggml_sources() -> Path:
    """Folder of the sources of llama.cpp that the installed llama-cpp-python holds."""
    return needed.ggml_sources()


@pytest.fixture(scope="session")
def packaged_model() -> Path:
    """The trained model that the package ships."""
    return PACKAGED / "story-f16.gguf"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Any]]:
    """Name of one of `tiny_checkpoints.CASES` -> folder, model, tokenizer; made once, not to be changed."""
    import tiny_checkpoints  # loads transformers, which takes seconds

    made: dict[str, tuple[Path, Any, Any]] = {}

    def make(name: str) -> tuple[Path, Any, Any]:
        if name not in made:
            config, tokenizer, _ = tiny_checkpoints.CASES[name]
            folder, cut = tmp_path_factory.mktemp(name), tokenizer()
            made[name] = (folder, tiny_checkpoints.write(folder, config(), cut), cut)
        return made[name]

    return make


@pytest.fixture
def own_checkpoint(checkpoints: Callable[[str], tuple[Path, Any, Any]], tmp_path: Path) -> Callable[[str], Path]:
    """Name of a case -> a copy of its folder that may be changed."""
    return lambda name: Path(shutil.copytree(checkpoints(name)[0], tmp_path / "checkpoint"))
