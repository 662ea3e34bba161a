"""Trains a LLaMA of about ten million parameters on text files, for benchmarks/quality_compare.py.

Its matrices have 512 or 1024 columns, so that llama.cpp's K types support them (the demo model's have 128). Training
takes an hour or two on one core; the model is not part of the package:

    export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
    python benchmarks/train_text_model.py wikitext.txt other.txt --output FOLDER --minutes 65

The last 220 kB of the first text are held out: FOLDER/calibration.txt and FOLDER/evaluation.txt. The model is written
every ``--save-minutes``, so that it can be tried before the end.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from train_story_model import Shape, StoryModel, schedule, write_gguf

HELD_OUT = 110_000  # characters, twice


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--columns", type=int, default=512, help="width of the residual stream")
    parser.add_argument("--feed-forward", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8, help="query heads; there are half as many key and value heads")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: faster on CPUs that have it")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text("utf-8") for path in args.texts]
    held = texts[0][-2 * HELD_OUT :]
    (args.output / "calibration.txt").write_text(held[:HELD_OUT], "utf-8")
    (args.output / "evaluation.txt").write_text(held[HELD_OUT:], "utf-8")
    texts[0] = texts[0][: -2 * HELD_OUT]

    shape = Shape(
        vocab=args.vocab, n_embd=args.columns, n_ff=args.feed_forward, n_layer=args.layers, n_head=args.heads,
        n_kv=args.heads // 2, context=512, rope_base=1e4,
    )  # fmt: skip
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line), model_writer=words,
        vocab_size=shape.vocab, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1, bos_id=1, eos_id=2, unk_id=0, pad_id=-1,
        minloglevel=2, max_sentence_length=20000, character_coverage=0.9999,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=words.getvalue())
    stream = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
    test = torch.tensor([1, *tokenizer.encode(held[HELD_OUT:])])[: 40 * args.window + 1]
    model = StoryModel(shape)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(stream)} tokens", flush=True)

    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    began, mean, step = time.monotonic(), 0.0, 0
    saved = began
    while (progress := (time.monotonic() - began) / 60 / args.minutes) < 1:
        starts = torch.randint(len(stream) - args.window - 1, (args.batch, 1))
        batch = stream[starts + torch.arange(args.window + 1)]
        batch[:, 0] = 1
        for group in optimizer.param_groups:
            group["lr"] = schedule(progress, args.learning_rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {step * batch[:, 1:].numel()} tokens, loss {mean:.3f}", flush=True)
        if time.monotonic() - saved > 60 * args.save_minutes:
            saved = time.monotonic()
            save(args.output / "text-f16.gguf", model, tokenizer)
    with torch.no_grad():
        rows = test[:-1].view(-1, args.window)
        loss = functional.cross_entropy(model(rows).flatten(0, 1), test[1:])
    print(f"perplexity on the evaluation text {math.exp(loss):.2f} after {step} steps")
    save(args.output / "text-f16.gguf", model, tokenizer)


def save(path: Path, model: StoryModel, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Writes the file under its name only when it is complete."""
    part = path.with_suffix(".part")
    write_gguf(part, model, tokenizer)
    part.replace(path)


if __name__ == "__main__":
    main()
