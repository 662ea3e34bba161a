"""Trains the demo model of agq_gguf: a LLaMA of 1.9 million parameters that tells stories and answers questions.

The text comes from ``story_grammar.py`` and is never repeated. The model is plain PyTorch, the file is GGUF (arch
``llama``, F16). ``--seed`` decides everything. Training takes 2600 steps of 0.6 to 1.2 seconds on one core. Without the
variables below, the C library would return memory to the system after every step, which doubles the time:

    export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
    python examples/train_story_model.py --output agq_gguf/data/story-f16.gguf

With ``--experts N`` each layer gets a mixture of N experts, two of which read a token, as in Mixtral. No such model is
shipped.

With ``--texts FOLDER`` it writes the calibration and evaluation texts instead, from seeds that training does not use;
``--calibration-bytes`` makes the calibration text longer than the shipped one, with the same beginning.

A model this small would need very long to learn that the answers are in the story. So training guides two heads of one
layer: a second loss moves their attention from a token of an answer to the place in the story that tells it (and from
other words of an answer to the question). Its weight falls to zero during training. ``--ask-every`` prints the share of
questions about unseen stories that the model answers.

The shipped file comes from three runs, because settings changed between them. Steps 0 to 800 and 800 to 1000 used
``--guided-part 0.4`` and the full learning rate for longer (the first run marked values differently in two kinds of
answers). The rest, up to step 2195, used ``--first-step 1000 --learning-rate 0.013 --adam-rate 0.0015 --minutes 26``.
Together they took about half an hour. The defaults are the settings learned from these runs; no single run was made
with them.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import story_grammar
import torch
from muon import Muon
from story_rows import BOS, EOS, Row, Rows, Tokenizer, encode, train_tokenizer
from torch import nn
from torch.nn import functional
from tqdm import tqdm

TRAIN_SEED, CALIBRATION_SEED, EVALUATION_SEED = 1, 1001, 2002
STEADY = 0.3  # share of the training with the full learning rate
EXPERTS_USED = 2  # for each token, of a mixture
BALANCE = 0.01  # weight of the loss by which all experts of a layer get their share of the tokens
KEY_WEIGHT = 3.0  # weight in the loss of the other tokens of an answer
GUIDED = 4  # the layer whose attention is guided to answers in the first part of the training
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Bot: ' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ 'User: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}"
)


@dataclass
class Shape:
    """Sizes of the model. All inner sizes are multiples of 128, so every matrix can be AGQ4."""

    vocab: int = 1280
    n_embd: int = 128
    n_ff: int = 384
    n_layer: int = 8
    n_head: int = 4
    n_kv: int = 2
    context: int = 1024
    rope_base: float = 1000000.0
    eps: float = 1e-5
    n_expert: int = 0  # 0: no mixture
    n_ff_expert: int = 192


# model


def rope_turns(shape: Shape) -> torch.Tensor:
    """Cosine and sine of each position and pair, (2, context, head size / 2)."""
    size = shape.n_embd // shape.n_head
    frequency = shape.rope_base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(shape.context, dtype=torch.float32)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rope(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs (2i, 2i + 1), llama.cpp's order for arch ``llama``.

    x: (batch, heads, tokens, size); turns: see ``rope_turns``, for at least as many tokens.
    """
    cosine, sine = turns[:, : x.shape[2]]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


class Dense(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape):
        """Initial weights of these sizes."""
        super().__init__()
        n = shape.n_embd
        self.ffn_gate, self.ffn_up = nn.Linear(n, shape.n_ff, bias=False), nn.Linear(n, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, n, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h: (batch, tokens, n_embd)."""
        return self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Experts(nn.Module):
    """One matrix of each expert, (experts, rows, columns)."""

    def __init__(self, *sizes: int):
        """Initial weights of these sizes."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sizes))


class Mixture(nn.Module):
    """SwiGLU of the likeliest EXPERTS_USED experts for each token, weighted by their probabilities, whose sum is 1."""

    def __init__(self, shape: Shape):
        """Initial weights of these sizes."""
        super().__init__()
        n, experts, ff = shape.n_embd, shape.n_expert, shape.n_ff_expert
        self.ffn_gate_inp = nn.Linear(n, experts, bias=False)
        self.ffn_gate_exps, self.ffn_up_exps = Experts(experts, ff, n), Experts(experts, ff, n)
        self.ffn_down_exps = Experts(experts, n, ff)
        self.imbalance = torch.zeros(())  # of the last call: 1 if each expert had its share of tokens and probability

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h: (batch, tokens, n_embd)."""
        x = h.flatten(0, 1)
        probabilities = self.ffn_gate_inp(x).softmax(-1)
        weights, chosen = probabilities.topk(EXPERTS_USED)
        weights = weights / weights.sum(-1, keepdim=True)
        parts = (self.ffn_gate_exps, self.ffn_up_exps, self.ffn_down_exps)
        mixed, shares = torch.zeros_like(x), []
        for number in range(probabilities.shape[1]):
            token, place = (chosen == number).nonzero(as_tuple=True)
            read = x[token]
            gate, up, down = (part.weight[number] for part in parts)
            made = (functional.silu(read @ gate.T) * (read @ up.T)) @ down.T
            mixed = mixed.index_add(0, token, made * weights[token, place, None])
            shares.append(len(token) / chosen.numel())
        self.imbalance = len(shares) * (torch.tensor(shares) * probabilities.mean(0)).sum()
        return mixed.view_as(h)


class Block(nn.Module):
    """Attention with grouped heads, then SwiGLU; each has an RMS norm before it and is added to the residual stream."""

    def __init__(self, shape: Shape):
        """Initial weights of these sizes."""
        super().__init__()
        self.shape = shape
        n, kv = shape.n_embd, shape.n_kv * (shape.n_embd // shape.n_head)
        self.attn_norm = nn.RMSNorm(n, shape.eps)
        self.attn_q, self.attn_k = nn.Linear(n, n, bias=False), nn.Linear(n, kv, bias=False)
        self.attn_v, self.attn_output = nn.Linear(n, kv, bias=False), nn.Linear(n, n, bias=False)
        self.ffn_norm = nn.RMSNorm(n, shape.eps)
        self.feed_forward = Mixture(shape) if shape.n_expert else Dense(shape)

    def astray(self, x: torch.Tensor, turns: torch.Tensor, lead: torch.Tensor) -> torch.Tensor:
        """Cross entropy between the attention of guided heads and the places they should attend to.

        lead: (4, many) with row, number of a head in its group (for all groups), position, and the earlier position to
        attend to.
        """
        tokens, size = x.shape[1], self.shape.n_embd // self.shape.n_head
        h = self.attn_norm(x)
        q, k = (rope(part(h).unflatten(-1, (-1, size)).transpose(1, 2), turns) for part in (self.attn_q, self.attn_k))
        row, head, at, source = lead
        q = q.unflatten(1, (self.shape.n_kv, -1))[row, :, head, at]
        scores = torch.einsum("ngs,ngts->ngt", q, k[row]) / math.sqrt(size)
        scores = scores.masked_fill(torch.arange(tokens) > at[:, None, None], -math.inf)
        return functional.cross_entropy(scores.flatten(0, 1), source.repeat_interleave(self.shape.n_kv))

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
        return x + self.feed_forward(self.ffn_norm(x))


class StoryModel(nn.Module):
    """LLaMA; the names of the parameters, without ``feed_forward.``, are those of the GGUF tensors."""

    def __init__(self, shape: Shape):
        """Initial weights, normal, smaller where they write into the residual stream."""
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.n_embd)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, shape.eps)
        self.output = nn.Linear(shape.n_embd, shape.vocab, bias=False)
        self.turns = rope_turns(shape)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = name.endswith(("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight"))
                nn.init.normal_(weight, std=0.05 / math.sqrt(2 * shape.n_layer) if residual else 0.05)

    def prepare_to_copy(self) -> None:
        """Large embeddings and an equal output matrix, so that at first the model says what attention copies."""
        nn.init.normal_(self.token_embd.weight)
        self.output.weight.data.copy_(0.05 * self.token_embd.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocab) of token numbers (batch, tokens)."""
        return self.guided(tokens, None)[0]

    def guided(self, tokens: torch.Tensor, lead: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the loss ``astray`` of layer GUIDED."""
        x, astray = self.token_embd(tokens), torch.zeros(())
        for number, block in enumerate(self.blk):
            if lead is not None and number == GUIDED:
                assert isinstance(block, Block)
                astray = block.astray(x, self.turns, lead)
            x = block(x, self.turns)
        return self.output(self.output_norm(x)), astray


# texts


def write_texts(folder: Path, calibration_bytes: int) -> None:
    """Writes ``calibration.txt`` and ``evaluation.txt`` (about 160 kB), of unseen seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = ("calibration", CALIBRATION_SEED, calibration_bytes), ("evaluation", EVALUATION_SEED, 160_000)
    for name, seed, size in sizes:
        talks, text = story_grammar.texts(seed), ""
        while len(text) < size:
            text += story_grammar.as_text(next(talks)) + "\n\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


# training


def schedule(progress: float, peak: float, steady: float = 0.0) -> float:
    """Learning rate at progress 0..1: a short warm-up, constant for a while, then linear to zero."""
    return peak * min(1.0, progress / 0.02) * min(1.0, (1.0 - progress) / (1.0 - steady))


def window_size(progress: float, context: int) -> int:
    """Tokens per row: short rows first, which is faster, whole contexts at the end."""
    return context // (4 if progress < 0.1 else 2 if progress < 0.45 else 1)


def answered(model: StoryModel, tokenizer: Tokenizer, facts: int, count: int) -> tuple[float, float]:
    """Share of right answers, and of right values in answers, to questions about unseen stories with `facts` facts.

    An answer is right if each of its tokens is the most likely one.
    """
    rng = random.Random(EVALUATION_SEED)
    right: list[bool] = []
    known: list[bool] = []
    while len(right) < count:
        world = story_grammar.tell(rng, facts, 0.5, 0.0)
        asked = rng.sample(world.facts, len(world.facts))
        row = encode(story_grammar.Talk("Tell me a story.", " ".join(world.lines), asked), tokenizer)
        row.cut(model.shape.context)
        with torch.no_grad():
            found = model(torch.tensor([row.tokens[:-1]]))[0].argmax(-1).tolist()
        good = {at: found[at - 1] == row.tokens[at] for at in row.values.keys() | row.keys.keys()}
        start = min(good)
        for end in sorted(good):
            if row.tokens[end] == EOS:
                answer = [at for at in good if start <= at <= end]
                right.append(all(good[at] for at in answer))
                known.append(all(good[at] for at in answer if at in row.values))
                start = end + 1
    return sum(right) / len(right), sum(known) / len(known)


def train(model: StoryModel, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Trains in place for ``args.steps`` steps of about ``args.batch_tokens`` tokens."""
    rows = Rows(tokenizer, args.seed + args.first_step)
    inner = [p for name, p in model.named_parameters() if is_matrix(name, p) and name.startswith("blk.")]
    known = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(inner, args.learning_rate, decay=args.decay),
        torch.optim.AdamW(others, args.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    start = args.first_step / args.steps
    began, means = time.monotonic(), torch.zeros(4)
    bar = tqdm(range(args.first_step, args.steps), desc="training", unit="step", mininterval=5)
    for step in bar:
        progress = step / args.steps
        if args.minutes:
            progress = max(progress, start + (1 - start) * (time.monotonic() - began) / 60 / args.minutes)
        if progress >= 1:
            break
        window = window_size(progress, model.shape.context)
        batch = [rows.next(window + 1) for _ in range(args.batch_tokens // window)]
        tokens, weights, lead = tensors(batch, args.value_weight)
        guidance = args.guidance * max(0.0, 1 - progress / args.guided_part)
        for optimizer, peak in zip(optimizers, (args.learning_rate, args.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = schedule(progress, peak, STEADY)
        logits, astray = model.guided(tokens[:, :-1], lead if guidance and lead.shape[1] else None)
        losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights).sum() / weights.sum() + guidance * astray
        loss = loss + BALANCE * sum(part.imbalance for part in model.modules() if isinstance(part, Mixture))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        kinds = [losses[weights == weight].mean() for weight in (1.0, KEY_WEIGHT, args.value_weight)]
        now = torch.stack([*kinds, astray]).detach().nan_to_num()
        means = now if step == args.first_step else means.lerp(now, 0.05)
        shown = dict(zip(("loss", "keys", "values", "astray"), (f"{mean:.3f}" for mean in means), strict=True))
        bar.set_postfix(shown, window=window, refresh=False)
        if args.ask_every and step % args.ask_every == args.ask_every - 1:
            shares = " ".join(
                f"{n}: {'/'.join(f'{s:.0%}' for s in answered(model, tokenizer, n, 60))}" for n in (4, 10, 18)
            )
            write_gguf(args.output, model, tokenizer)
            tqdm.write(f"step {step + 1}, {shown}, answered by number of facts: {shares}")


def tensors(rows: list[Row], value_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of rows, the loss weight after each token except the last (flat), and the lead for ``Block.astray``."""
    tokens = torch.tensor([row.tokens for row in rows])
    weights = torch.ones_like(tokens, dtype=torch.float32)
    lead = []
    for number, row in enumerate(rows):
        weights[number, list(row.keys)] = KEY_WEIGHT
        weights[number, list(row.values)] = value_weight
        for head, places in enumerate((row.values, row.keys)):
            lead += [(number, head, at - 1, source) for at, source in places.items() if source >= 0]
    return tokens, weights[:, 1:].flatten(), torch.tensor(lead, dtype=torch.long).reshape(-1, 4).T


# file


def is_matrix(name: str, weight: torch.Tensor) -> bool:
    """Whether a parameter is a matrix, or one for each expert; what chooses experts stays as exact as norms."""
    return weight.dim() > 1 and "gate_inp" not in name


def write_gguf(path: Path, model: StoryModel, tokenizer: Tokenizer) -> None:
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
    writer.add_feed_forward_length(shape.n_ff_expert if shape.n_expert else shape.n_ff)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(EXPERTS_USED)
        writer.add_expert_feed_forward_length(shape.n_ff_expert)
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
        kind = np.float16 if is_matrix(name, weight) else np.float32
        writer.add_tensor(name.replace("feed_forward.", ""), weight.detach().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# check


def check(path: Path, model: StoryModel, tokenizer: Tokenizer) -> None:
    """Compares the file in llama.cpp with PyTorch on unseen text: same tokens, KL divergence below 1e-5."""
    import llama_cpp

    for name, weight in model.named_parameters():
        weight.data = weight.data.half().float() if is_matrix(name, weight) else weight.data
    window = Rows(tokenizer, EVALUATION_SEED).next(model.shape.context).tokens
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
    parser.add_argument("--calibration-bytes", type=int, default=80_000, help="length of the calibration text")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--first-step", type=int, default=0, help="first step with --continue-from")
    parser.add_argument(
        "--minutes", type=float, default=0, help="shorten the training to this time (then not reproducible)"
    )
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument(
        "--learning-rate", type=float, default=0.02, help="rate of Muon, for the matrices of the layers"
    )
    parser.add_argument(
        "--adam-rate", type=float, default=2e-3, help="rate of AdamW, for embedding, output matrix and norms"
    )
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices of the layers")
    parser.add_argument(
        "--value-weight",
        type=float,
        default=10.0,
        help="weight in the loss of the part of an answer that only the story tells",
    )
    parser.add_argument(
        "--guidance", type=float, default=0.3, help="weight of the loss that guides attention to answers"
    )
    parser.add_argument(
        "--guided-part", type=float, default=0.8, help="share of the training after which guidance ends"
    )
    parser.add_argument("--experts", type=int, default=0, help="of a mixture in each layer; 0: none")
    parser.add_argument("--ask-every", type=int, default=100, help="steps between two counts of right answers")
    parser.add_argument("--continue-from", type=Path, help="model written by this script, to train further")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    parser.add_argument("--threads", type=int, default=1, help="more than one rarely helps matrices this small")
    args = parser.parse_args()
    if args.texts:
        write_texts(args.texts, args.calibration_bytes)
        return
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    shape = Shape(n_expert=args.experts)
    tokenizer = train_tokenizer(shape.vocab, TRAIN_SEED)
    model = StoryModel(shape)
    model.prepare_to_copy()
    if args.continue_from:
        tensors = gguf.GGUFReader(args.continue_from).tensors
        named = {name.replace("feed_forward.", ""): name for name in model.state_dict()}
        model.load_state_dict({named[t.name]: torch.tensor(t.data).float() for t in tensors})
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {asdict(shape)}")
    train(model, tokenizer, args)
    write_gguf(args.output, model, tokenizer)
    check(args.output, model, tokenizer)


if __name__ == "__main__":
    main()
