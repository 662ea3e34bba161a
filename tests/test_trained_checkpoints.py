"""Trained OPT, BLOOM and LLaMA models, from the checkpoint to text, by the commands that a user types.

The checkpoints of tests/data are made by ``train_checkpoints.py``; LLaMA is the model that the package ships, turned
back into a checkpoint.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from agq_gguf.quantization.options import QuantizeOptions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own deprecations
    import story_checkpoint
    import tiny_checkpoints as tiny
    import transformers

from transformers_logits import greedy, logits_of, pruned_logits, torch_logits

import agq_gguf
from agq_gguf.cli import app as cli
from agq_gguf.logits import compare
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.runtime.model import Model
from agq_gguf.runtime.stock_quantize import quantize_stock

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

DATA = Path(__file__).parent / "data"
STORIES = Path(agq_gguf.__file__).parent / "data"
# OPT and BLOOM have learned from an earlier examples/story_grammar.py; texts of that one lie beside them.
TEXTS = {"llama": STORIES, "opt": DATA / "stories", "bloom": DATA / "stories"}
# Family: number of AGQ4 tensors, bound of the mean KL divergence of the float file to transformers.
FAMILIES = {"llama": (56, 1e-4), "opt": (12, 1e-3), "bloom": (12, 1e-4)}


@dataclass
class Story:
    """One family's model: checkpoint, float file, quantized file, and the tokens of a text of unseen stories."""

    family: str
    checkpoint: Path
    exact: Path
    quantized: Path
    tokens: np.ndarray
    text: str


def command(*arguments: object) -> str:
    """Runs a command in this process; returns what it printed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.exception!r}\n{result.output}"
    assert "warning" not in result.output
    return result.stdout


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Story]:
    """Family -> its model, imported and quantized once."""
    made: dict[str, Story] = {}

    def make(family: str) -> Story:
        if family in made:
            return made[family]
        folder = tmp_path_factory.mktemp(family)
        checkpoint, exact, quantized = DATA / f"{family}-story", folder / "f16.gguf", folder / "agq4.gguf"
        if family == "llama":
            checkpoint = folder / "checkpoint"
            story_checkpoint.write(checkpoint, STORIES / "story-f16.gguf")
        text = (TEXTS[family] / "evaluation.txt").read_text(encoding="utf-8")[:2500]
        command("import-hf", checkpoint, exact)
        with pytest.MonkeyPatch.context() as patch:  # less calibration than a user's, to save time
            plain = MatrixOptions(learn_codebook=False)
            patch.setattr("agq_gguf.cli.quantize.QuantizeOptions", partial(QuantizeOptions, matrix=plain))
            text_of = ("--calibration", TEXTS[family] / "calibration.txt", "--calibration-tokens", 4096)
            command("quantize", exact, quantized, *text_of, "-t", 1)
        with Model(exact, vocab_only=True) as host:
            tokens = host.tokenize(text)[:250]
        made[family] = Story(family, checkpoint, exact, quantized, tokens, text)
        return made[family]

    return make


@pytest.fixture(params=FAMILIES)
def story(request: pytest.FixtureRequest, stories: Callable[[str], Story]) -> Story:
    return stories(request.param)


def original(story: Story) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(story.checkpoint, dtype=torch.float32).eval()


def test_it_has_learned_and_says_what_transformers_says(story: Story) -> None:
    model = original(story)
    wanted, found = torch_logits(model, story.tokens), logits_of(story.exact, story.tokens)
    scored = compare(wanted[:-1], found[:-1], story.tokens[1:])
    assert scored[:, 0].mean() < 1.2  # nats per token; ln(vocabulary) is above 6.6
    assert scored[:, 2].mean() < FAMILIES[story.family][1]
    told, margin = greedy(lambda t: torch_logits(model, t), story.tokens[:60], 12)
    assert margin > 1e-3
    assert greedy(lambda t: logits_of(story.exact, t), story.tokens[:60], 12)[0] == told


def test_text_is_cut_alike(story: Story) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(story.checkpoint)
    with Model(story.exact, vocab_only=True) as host:
        for text in [*tiny.NASTY, story.text]:
            assert host.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


def test_the_exported_llama_is_the_one_that_ships(stories: Callable[[str], Story]) -> None:
    story = stories("llama")
    with Model(STORIES / "story-f16.gguf") as shipped, Model(story.exact) as imported:
        for text in [*tiny.NASTY, story.text]:
            assert np.array_equal(shipped.tokenize(text), imported.tokenize(text)), text
    assert np.array_equal(logits_of(STORIES / "story-f16.gguf", story.tokens), logits_of(story.exact, story.tokens))


def test_quantized(story: Story) -> None:
    assert re.search(rf"agq\.tensors\.agq4 +{FAMILIES[story.family][0]} ", command("inspect", story.quantized))
    exact, quantized = (logits_of(path, story.tokens)[:-1] for path in (story.exact, story.quantized))
    scored = compare(exact, quantized, story.tokens[1:])
    assert 1e-6 < scored[:, 2].mean() < 0.05
    assert scored[:, 1].mean() < scored[:, 0].mean() + 0.05  # nats per token
    second, first = np.partition(exact, -2, axis=-1)[:, -2:].T
    sure = first - second > 1
    assert sure.sum() > 50 and np.array_equal(exact[sure].argmax(-1), quantized[sure].argmax(-1))


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "opt", "bloom"])
def test_best_is_better(family: str, stories: Callable[[str], Story], tmp_path: Path) -> None:
    """On as much text as there is: on 250 tokens a rounding error in the last bit decides, by up to a factor of 4."""
    story = stories(family)
    kl, evaluation = {}, (TEXTS[story.family] / "evaluation.txt").read_text(encoding="utf-8")
    for quality in ("balanced", "best"):
        out = tmp_path / f"{quality}.gguf"
        text = ("--calibration", TEXTS[story.family] / "calibration.txt", "--calibration-tokens", 4096)
        command("quantize", story.exact, out, *text, "--quality", quality, "--no-tune", "-t", 1)
        kl[quality] = evaluate(out, story.exact, evaluation, context=128, chunks=64, threads=1).mean_kl
    assert kl["best"] < 0.9 * kl["balanced"]


def test_stock_tools_take_what_was_imported(story: Story, tmp_path: Path) -> None:
    """llama.cpp's quantizer writes damaged files from sources that are not padded as it does."""
    quantize_stock(story.exact, tmp_path / "q4_0.gguf", "q4_0", threads=1)
    exact, stock = (logits_of(path, story.tokens)[:-1] for path in (story.exact, tmp_path / "q4_0.gguf"))
    assert 1e-6 < compare(exact, stock, story.tokens[1:])[:, 2].mean() < 0.2


def test_pruned(story: Story) -> None:
    whole, _ = pruned_logits(story.quantized, story.tokens, "off")
    masked, _ = pruned_logits(story.quantized, story.tokens, "mask,1:0.3")
    pruned, dropped = pruned_logits(story.quantized, story.tokens, "1:0.3")
    assert dropped == 75
    # The same tokens are dropped. Hidden cells are left out of a sequence's blocks, so both runs round alike.
    assert np.linalg.norm(pruned - masked) < 0.01 * np.linalg.norm(pruned - whole)
    assert compare(whole[None], pruned[None], story.tokens[:1])[0, 2] < 0.5


def test_it_tells_a_story(story: Story) -> None:
    """The quantized model answers as the float one does, and all speak in words they know, with tokens dropped, too."""
    # LLaMA answers a question; how stories go on is a free choice, which quantization may change.
    end = story.text.index("Bot:", 400) + 4 if story.family == "llama" else 400
    options = ("-p", story.text[:end], "-n", 24, "--temp", 0, "-t", 1)
    exact, told = (command("generate", path, *options) for path in (story.exact, story.quantized))
    assert told.split()[:2] == exact.split()[:2] or story.family != "llama"
    pruned = command("generate", story.quantized, *options, "--prune", "1:0.3", "--show-pruned")
    assert "{1:" in pruned
    known = set((TEXTS[story.family] / "calibration.txt").read_text(encoding="utf-8").split())
    for text in (exact, told, pruned.rsplit("}", 1)[-1]):
        words = text.split()[1:-1]  # the first and the last may be parts
        assert len(words) >= 4
        assert sum(word in known for word in words) > 0.8 * len(words), text
