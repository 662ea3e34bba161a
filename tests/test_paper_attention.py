"""AGQ_ATTENTION=paper inside the stock library, against the numpy reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from low_level import PROMPT, LowModel, log, quick_agq4
from reference_attention import PaperAttentionReference, log2_grid, quantize


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_agq4(tmp_path_factory.mktemp("paper"), n_layer=1)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LowModel]:
    with LowModel(path) as loaded:
        yield loaded


def logits(
    model: LowModel, monkeypatch: pytest.MonkeyPatch, setting: str, *, flash: bool, pieces: tuple[int, ...] = (40,)
) -> np.ndarray:
    """Of all tokens of the prompt, handed over in pieces of so many tokens."""
    monkeypatch.setenv("AGQ_ATTENTION", setting)
    found, done = [], 0
    with model.context("off", flash=flash, cache="f32") as context:
        for n in pieces:
            found.append(context.decode(PROMPT[done : done + n], done, outputs=range(n)))
            done += n
    return np.concatenate(found)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of the typical token: a weight next to the border of two powers of two may fall either way."""
    return float(np.median(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("setting", ["paper", "paper-normalized"])
def test_logits_follow_the_reference(
    model: LowModel, path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, flash: bool
) -> None:
    reference = PaperAttentionReference(path)
    reference.normalized = setting == "paper-normalized"
    want = reference.logits(PROMPT)
    plain = logits(model, monkeypatch, "", flash=flash)
    for pieces in ((40,), (33, 3, 1, 1, 2)):  # a prompt, and one that is continued by short calls and single tokens
        got = logits(model, monkeypatch, setting, flash=flash, pieces=pieces)
        # With flash attention llama.cpp rounds keys and values to binary16 on the way.
        assert distance(got, want) < (0.4 * distance(plain, want) if flash else 1e-5)
        # The first token attends to itself alone, with a weight of exactly 1.
        assert distance(got[:1], want[:1]) < (5e-3 if flash else 1e-5)


def test_the_grids() -> None:
    codes, scale = quantize(np.array([[1.0, -127.0, 63.4], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[1, -127, 63], [0, 0, 0]]
    assert scale.ravel().tolist() == [1.0, 0.0]
    weights = np.array([1.0, 0.7, 0.72, 0.25, 2.0**-14.4, 2.0**-14.6, 0.0])
    assert log2_grid(weights).tolist() == [1.0, 0.5, 1.0, 0.25, 2.0**-14, 0.0, 0.0]


@pytest.mark.parametrize("text", ["Paper", "paper ", "int8"])
def test_mistakes_are_refused(model: LowModel, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("AGQ_ATTENTION", text)
    log.clear()
    with pytest.raises(AssertionError), model.context("off"):  # llama.cpp returns no context
        pass
    assert any(
        f"AGQ_ATTENTION must be paper or paper-normalized, in a build by GCC or Clang, got '{text}'" in line
        for line in log
    )
