"""One place decides what a model can do, and every command asks there: no abort, no empty answer with exit code 0."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import tiny_models
from command_line import run, run_all

from agq_gguf.errors import InputError
from agq_gguf.runtime.model import Model
from agq_gguf.runtime.text import TextModel

SILENT = {**architectures.ENCODERS, **architectures.DIFFUSION}


@pytest.fixture(scope="module", params=SILENT)
def silent(request: pytest.FixtureRequest, models: Path) -> Path:
    path = models / f"silent-{request.param}.gguf"
    SILENT[request.param](path)
    return path


def test_models_that_predict_nothing(silent: Path, words_file: Path) -> None:
    commands: list[list[object]] = [
        ["generate", silent, "-p", "the", "-n", 4],
        ["chat", silent, "--chat-format", "chatml"],
        ["bench", silent, "-p", 8, "-n", 8],
        ["serve", silent, "--port", 0],
    ]
    if silent.stem.removeprefix("silent-") not in architectures.EMBEDDERS:  # else its embeddings are compared
        commands.append(["evaluate", silent, "--reference", silent, "--text", words_file])
    for name, shown in run_all(commands).items():
        assert (shown.code, shown.stdout, shown.exception) == (2, "", ""), (name, shown)
        [line] = [line for line in shown.stderr.splitlines() if not line.startswith("bench: ")]  # progress
        assert line.startswith("error: ") and "predicts no next token" in line, name


@pytest.mark.parametrize("name", [*architectures.DECODERS])
def test_decoders_predict(name: str, tmp_path: Path) -> None:
    with Model(architectures.DECODERS[name](tmp_path / "m.gguf")) as model:
        assert model.abilities.problem == ""


def test_learned_positions_end(tmp_path: Path, words: str) -> None:
    """GPT-2 has 256 positions here; llama.cpp would abort behind them. A context is rounded up to 256 tokens."""
    path = tiny_models.write_gpt2(tmp_path / "m.gguf")
    with Model(path) as model:
        assert model.facts.positions == model.n_ctx_train == 256
    commands: list[list[object]] = [
        ["generate", path, "-p", "the", "-c", 1024],
        ["chat", path, "-c", 1024],
        ["serve", path, "-c", 1024, "--port", 0],
    ]
    for name, refused in run_all(commands).items():
        assert "at most 256 tokens" in refused.stderr, name
    shown = run("generate", path, "-p", "the", "-n", 1000, "-t", 1, "--temp", 0)
    assert len(shown.stdout) > 100
    with TextModel(path, threads=1) as text:
        for _ in text.continued("the", tokens=1000, temperature=0):
            pass
        assert len(text._read) == 256
        with pytest.raises(InputError, match="expected 1 to 256"):
            list(text.continued(words * 3, tokens=1, temperature=0))
    encoder = tiny_models.write_bert(tmp_path / "bert.gguf")
    with Model(encoder) as model:
        limit = model.facts.positions
    refusal = run_all([["serve", encoder, "--set", "embedding=1", "-c", 1024, "--port", 0]])["serve"].stderr
    assert f"at most {limit} tokens" in refusal


def test_few_positions_without_any_option(tmp_path: Path) -> None:
    path = tiny_models.write_gpt2(tmp_path / "m.gguf", context=100)
    with TextModel(path, threads=1) as text:
        assert text.limit == 100
        said = "".join(text.continued("the", tokens=1000, temperature=0))
        assert len(text._read) == 100 and len(said) > 50
