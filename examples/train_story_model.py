"""Trains the demo model that ships with agq_gguf: a LLaMA of 1.8 million parameters that tells stories.

The text comes from ``story_grammar.py`` and is never repeated; the model is plain PyTorch; the file is GGUF (arch
``llama``, F16). Everything follows from ``--seed``. About half an hour on one core (the variables keep the C library
from giving memory back to the system after every step, which costs half of the time):

    export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
    python examples/train_story_model.py --bf16 --output agq_gguf/data/story-f16.gguf

With ``--texts FOLDER`` it writes the calibration and evaluation texts instead (other seeds than training's).
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import story_grammar
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

TRAIN_SEED, CALIBRATION_SEED, EVALUATION_SEED = 1, 1001, 2002
BOS, EOS = 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Bot: ' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ 'User: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}"
)


@dataclass
class Shape:
    """Sizes of the model. All inner sizes are multiples of 128, so every matrix can be AGQ4."""

    vocab: int = 1024
    n_embd: int = 128
    n_ff: int = 384
    n_layer: int = 8
    n_head: int = 4
    n_kv: int = 2
    context: int = 1024
    rope_base: float = 10000.0
    eps: float = 1e-5


# model


def rope_turns(shape: Shape) -> torch.Tensor:
    """Rotation of each position and pair as complex numbers, (context, head size / 2)."""
    size = shape.n_embd // shape.n_head
    frequency = shape.rope_base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(shape.context, dtype=torch.float32)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rope(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs (2i, 2i + 1), llama.cpp's order for arch ``llama``.

    x: (batch, heads, tokens, size); turns: (at least tokens, size / 2), complex.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[: x.shape[2]]).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Attention with grouped heads, then SwiGLU; both behind an RMS norm and added to the stream."""

    def __init__(self, shape: Shape):
        """Fresh weights of these sizes."""
        super().__init__()
        self.shape = shape
        n, kv = shape.n_embd, shape.n_kv * (shape.n_embd // shape.n_head)
        self.attn_norm = nn.RMSNorm(n, shape.eps)
        self.attn_q, self.attn_k = nn.Linear(n, n, bias=False), nn.Linear(n, kv, bias=False)
        self.attn_v, self.attn_output = nn.Linear(n, kv, bias=False), nn.Linear(n, n, bias=False)
        self.ffn_norm = nn.RMSNorm(n, shape.eps)
        self.ffn_gate, self.ffn_up = nn.Linear(n, shape.n_ff, bias=False), nn.Linear(n, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, n, bias=False)

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """x: (batch, tokens, n_embd); turns: see ``rope``."""
        batch, tokens, n = x.shape
        size = n // self.shape.n_head
        h = self.attn_norm(x)
        q, k, v = (
            part(h).view(batch, tokens, -1, size).transpose(1, 2) for part in (self.attn_q, self.attn_k, self.attn_v)
        )
        repeat = self.shape.n_head // self.shape.n_kv
        k, v = rope(k, turns).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        mixed = functional.scaled_dot_product_attention(rope(q, turns), k, v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, tokens, n))
        h = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))


class StoryModel(nn.Module):
    """LLaMA; the names of the parameters are those of the GGUF tensors."""

    def __init__(self, shape: Shape):
        """Fresh weights, normal, smaller where they write into the residual stream."""
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.n_embd)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, shape.eps)
        self.output = nn.Linear(shape.n_embd, shape.vocab, bias=False)
        self.turns = rope_turns(shape)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.05 / math.sqrt(2 * shape.n_layer) if residual else 0.05)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocab) of token numbers (batch, tokens)."""
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, self.turns)
        return self.output(self.output_norm(x))


# tokenizer and text


def train_tokenizer(vocab: int, seed: int, documents: int = 6000) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece BPE with bytes for what it does not know; no space is added before a text."""
    talks = story_grammar.texts(seed)
    lines = (line for _ in range(documents) for line in story_grammar.as_text(next(talks)).split("\n"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=vocab, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False, num_threads=1,
        remove_extra_whitespaces=False, bos_id=BOS, eos_id=EOS, unk_id=0, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def encode(talk: list[str], tokenizer: sentencepiece.SentencePieceProcessor, chat: bool) -> list[int]:
    """Tokens of a document: as the chat template writes it, with an end token behind each answer, or as plain text."""
    if not chat:
        return tokenizer.encode(story_grammar.as_text(talk) + "\n\n")
    if len(talk) == 1:
        return [BOS, *tokenizer.encode(talk[0]), EOS]
    tokens = [BOS]
    for i in range(0, len(talk), 2):
        start = "\n" if i else ""
        tokens += [*tokenizer.encode(f"{start}User: {talk[i]}\nBot: {talk[i + 1]}"), EOS]
    return tokens


def token_stream(tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> Iterator[int]:
    """Tokens of documents without end, three in ten of them as plain text."""
    for number, talk in enumerate(story_grammar.texts(seed)):
        yield from encode(talk, tokenizer, chat=number % 10 >= 3)


def write_texts(folder: Path) -> None:
    """Writes ``calibration.txt`` (about 80 kB) and ``evaluation.txt`` (about 160 kB), of unseen seeds."""
    for name, seed, size in (("calibration", CALIBRATION_SEED, 80_000), ("evaluation", EVALUATION_SEED, 160_000)):
        talks, text = story_grammar.texts(seed), ""
        while len(text) < size:
            text += story_grammar.as_text(next(talks)) + "\n\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


# training


def schedule(progress: float, peak: float) -> float:
    """Learning rate at 0..1 of the way: short warm-up, then down to zero in a straight line."""
    return peak * min(1.0, progress / 0.02) * (1.0 - progress)


def window_size(progress: float, first: int, context: int) -> int:
    """Tokens per window: short ones first, which is faster, whole contexts at the end."""
    return first if progress < 0.6 else min(2 * first, context) if progress < 0.85 else context


def train(model: StoryModel, stream: Iterator[int], args: argparse.Namespace) -> None:
    """Trains in place for ``args.steps`` steps of ``args.batch_tokens`` tokens, or until ``args.minutes`` are over."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    began, mean = time.monotonic(), 0.0
    bar = tqdm(range(args.steps), desc="training", unit="step")
    for step in bar:
        progress = step / args.steps
        if args.minutes:
            progress = max(progress, (time.monotonic() - began) / 60 / args.minutes)
        if progress >= 1:
            break
        window = window_size(progress, args.first_window, model.shape.context)
        count = args.batch_tokens // window
        batch = torch.tensor([[next(stream) for _ in range(window + 1)] for _ in range(count)])
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
        bar.set_postfix(loss=f"{mean:.3f}", window=window)


# file


def write_gguf(path: Path, model: StoryModel, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Writes the model: matrices in F16, norms in F32."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("agq_gguf story model")
    writer.add_description(
        "Tells and remembers small stories; trained by examples/train_story_model.py on generated text"
    )
    writer.add_license("MIT")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_kv)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.eps)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE if tokenizer.is_byte(i) else gguf.TokenType.NORMAL for i in range(3, shape.vocab)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([tokenizer.id_to_piece(i) for i in range(shape.vocab)])
    writer.add_token_scores([tokenizer.get_score(i) for i in range(shape.vocab)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.named_parameters():
        kind = np.float16 if weight.dim() == 2 else np.float32
        writer.add_tensor(name, weight.detach().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# check


def check(path: Path, model: StoryModel, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Compares the file in llama.cpp with PyTorch on unseen text: same tokens, KL divergence below 1e-5."""
    import llama_cpp

    for weight in model.parameters():
        weight.data = weight.data.half().float() if weight.dim() == 2 else weight.data
    stream = token_stream(tokenizer, EVALUATION_SEED)
    window = [next(stream) for _ in range(model.shape.context)]
    with torch.no_grad():
        logits = model(torch.tensor([window]))[0]
    wanted = torch.log_softmax(logits, -1)
    host = llama_cpp.Llama(
        str(path), n_ctx=model.shape.context, logits_all=True, verbose=False, n_batch=512, type_k=0, type_v=0
    )
    host.eval(window)
    got = torch.log_softmax(torch.tensor(np.array(host.scores)), -1)
    divergence = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
    loss = -wanted[:-1].gather(1, torch.tensor(window[1:])[:, None]).mean().item()
    text = "".join(
        story_grammar.as_text(talk) + "\n\n" for talk, _ in zip(story_grammar.texts(5), range(9), strict=False)
    )
    same = host.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
    print(f"{path}: {path.stat().st_size} bytes, perplexity {math.exp(loss):.3f}, KL to PyTorch {divergence:.2e}")
    print(f"tokens as in SentencePiece: {same}")
    if divergence > 1e-5 or not same:
        raise SystemExit("llama.cpp and PyTorch disagree")


def main() -> None:
    """Trains, writes and checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("story-f16.gguf"))
    parser.add_argument("--texts", type=Path, help="only write the calibration and evaluation text into this folder")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many minutes (then not reproducible)")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--first-window", type=int, default=256, help="tokens per window in the first part")
    parser.add_argument("--continue-from", type=Path, help="a model written by this script, to be trained further")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    parser.add_argument("--threads", type=int, default=1, help="more than one rarely helps matrices this small")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: faster on CPUs that have it")
    args = parser.parse_args()
    if args.texts:
        write_texts(args.texts)
        return
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    shape = Shape()
    tokenizer = train_tokenizer(shape.vocab, TRAIN_SEED)
    model = StoryModel(shape)
    if args.continue_from:
        tensors = gguf.GGUFReader(args.continue_from).tensors
        model.load_state_dict({t.name: torch.tensor(t.data).float() for t in tensors})
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {asdict(shape)}")
    train(model, token_stream(tokenizer, args.seed), args)
    write_gguf(args.output, model, tokenizer)
    check(args.output, model, tokenizer)


if __name__ == "__main__":
    main()
