"""`evaluate` for encoders: distances of embeddings, and nearest neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run

from agq_gguf.errors import InputError
from agq_gguf.measure.embeddings import evaluate_embeddings, summarize
from agq_gguf.runtime.stock_quantize import quantize_stock


def test_figures_agree_with_their_definitions() -> None:
    """Also of tokens that are not pooled, whose mean is the text."""
    rng = np.random.default_rng(1)
    references = tuple(rng.normal(size=(3, 8)) for _ in range(5))
    ours = tuple(vectors + rng.normal(size=(3, 8)) * 0.7 for vectors in references)
    found = summarize(references, ours, 64)
    distances = [
        1 - a @ b / np.sqrt(a @ a * (b @ b))
        for one, other in zip(references, ours, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    assert found.mean_distance == pytest.approx(np.mean(distances))
    assert found.mean_distance_error == pytest.approx(np.std(distances, ddof=1) / np.sqrt(15))
    assert found.median_distance == pytest.approx(np.median(distances))
    assert found.max_distance == pytest.approx(max(distances))

    def nearest(vectors: tuple[np.ndarray, ...]) -> list[int]:
        means = [v.mean(0) / np.linalg.norm(v.mean(0)) for v in vectors]
        others = [[-2.0 if i == j else float(a @ b) for j, b in enumerate(means)] for i, a in enumerate(means)]
        return [int(np.argmax(row)) for row in others]

    same = [a == b for a, b in zip(nearest(references), nearest(ours), strict=True)]
    assert found.nearest_kept == pytest.approx(np.mean(same)) and 0 < np.mean(same) < 1
    assert summarize(references[:2], ours[:2], 64).nearest_kept is None
    with pytest.raises(InputError, match="embeddings of the model hold a NaN"):
        summarize(references, tuple(x * np.nan for x in ours), 64)


def test_an_encoder_equals_itself(bert_f16: Path, words: str) -> None:
    found = evaluate_embeddings(bert_f16, bert_f16, words, context=32, chunks=6, threads=1)
    assert (found.context, found.chunks, found.nearest_kept) == (32, 6, 1.0)
    assert abs(found.mean_distance) < 1e-12 and abs(found.max_distance) < 1e-12


def test_coarser_types_are_farther(bert_f16: Path, words: str, tmp_path: Path) -> None:
    means = []
    for name in ("q8_0", "q4_0"):
        quantize_stock(bert_f16, tmp_path / name, name, 1)
        found = evaluate_embeddings(tmp_path / name, bert_f16, words, context=32, chunks=6, threads=1)
        assert 0 < found.median_distance <= found.max_distance
        means.append(found.mean_distance)
    assert means[1] > 10 * means[0]


def test_the_command(bert_f16: Path, llama_f16: Path, words: str, tmp_path: Path) -> None:
    text, q = tmp_path / "text.txt", tmp_path / "q.gguf"
    text.write_text(words)
    quantize_stock(bert_f16, q, "q4_0", 1)
    arguments = ["evaluate", q, "--reference", bert_f16, "--text", text, "--ctx", 32, "--chunks", 5, "-t", 1]
    shown = run(*arguments, "-q").stdout
    assert "1 - cosine, mean" in shown and "same nearest chunk" in shown and "5 chunks of 32 tokens" in shown
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["model"] == str(q) and found["chunks"] == 5 and 0 < found["mean_distance"] < 0.5
    assert "there is no picture" in run(*arguments, "--plot", tmp_path / "p.svg", code=2).stderr
    with pytest.raises(InputError, match="generates text; embeddings are compared"):
        evaluate_embeddings(llama_f16, llama_f16, words)
    with pytest.raises(InputError, match="texts must have at least 3 tokens, got 2"):
        evaluate_embeddings(bert_f16, bert_f16, words, context=2)
    with pytest.raises(InputError, match="the text must have at least 126 tokens"):
        evaluate_embeddings(bert_f16, bert_f16, "a b c")
