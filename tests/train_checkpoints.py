"""Trains the OPT and BLOOM checkpoints of tests/data: two thirds of a million parameters each, on generated stories.

    python tests/train_checkpoints.py opt tests/data/opt-story --steps 1000
    python tests/train_checkpoints.py bloom tests/data/bloom-story --steps 300 --batch-tokens 1024

Model and tokenizer are transformers' own classes, the text comes from ``examples/story_grammar.py`` and is never
repeated. (The files in tests/data are of an earlier version of that grammar; ``stories`` there has texts of it.)
Everything follows from the seed. Some ten minutes on one core (the variables of
``examples/train_story_model.py`` help).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tiny_checkpoints as tiny
import torch
import transformers
from torch.nn import functional
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import story_grammar

# Inner sizes are multiples of 128, so every matrix can be AGQ4; one layer must follow the one that is pruned.
VOCAB, CONTEXT, LAYERS = 768, 256, 3
TEXT_SEED, CHECK_SEED = 11, 12


def stories(seed: int) -> Iterator[str]:
    return (story_grammar.as_text(talk) + "\n\n" for talk in story_grammar.texts(seed))


def fresh(family: str) -> tuple[Any, Any]:
    """Model with random weights, tokenizer."""
    # The nasty strings are a small part of the tokenizer's text, so that some merges cross the borders its rule sets.
    texts = [*islice(stories(TEXT_SEED), 2000), *tiny.NASTY * 20]
    sizes = {"vocab_size": VOCAB}
    if family == "opt":
        tokenizer = tiny.opt_tokenizer(texts, VOCAB)
        config = tiny.opt_config(**sizes, num_hidden_layers=LAYERS, ffn_dim=512, max_position_embeddings=CONTEXT)
        model: transformers.PreTrainedModel = transformers.OPTForCausalLM(config)
    else:
        tokenizer = tiny.bloom_tokenizer(texts, VOCAB)
        config = tiny.bloom_config(**sizes, n_layer=LAYERS, seq_length=CONTEXT)
        model = transformers.BloomForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            residual = name.endswith(("out_proj.weight", "fc2.weight", "dense.weight", "dense_4h_to_h.weight"))
            torch.nn.init.normal_(weight, std=0.05 / math.sqrt(2 * LAYERS) if residual else 0.05)
    return model, tokenizer


def windows(tokenizer: Any, seed: int, length: int) -> Iterator[list[int]]:
    """Pieces of one endless text, each with what the tokenizer puts in front of a text."""
    start = tokenizer("").input_ids
    tokens: list[int] = []
    for story in stories(seed):
        tokens += tokenizer(story, add_special_tokens=False).input_ids
        while len(tokens) >= length:
            yield start + tokens[: length - len(start)]
            tokens = tokens[length - len(start) :]


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def train(model: Any, tokenizer: Any, steps: int, rate: float, batch_tokens: int) -> None:
    """Short windows first, which is faster, whole contexts in the last quarter."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    short, whole = (windows(tokenizer, TEXT_SEED + i, length) for i, length in ((2, CONTEXT // 2), (3, CONTEXT)))
    bar = tqdm(range(steps), desc="training", unit="step")
    for step in bar:
        progress = step / steps
        source, length = (short, CONTEXT // 2) if progress < 0.75 else (whole, CONTEXT)
        batch = torch.tensor(list(islice(source, batch_tokens // length)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, progress / 0.02) * (1.0 - progress)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("opt", "bloom"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model, tokenizer = fresh(args.family)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, args.steps, args.learning_rate, args.batch_tokens)
    model = model.eval().half()
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    with torch.no_grad():
        batch = torch.tensor(list(islice(windows(tokenizer, CHECK_SEED, CONTEXT), 32)))
        print(f"perplexity on unseen stories {math.exp(loss_of(model.float(), batch).item()):.3f} per token")


if __name__ == "__main__":
    main()
