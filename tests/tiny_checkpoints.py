"""Small Hugging Face checkpoints with random weights and trained tokenizers, made with transformers itself.

Weights are spread so that logits have a clear argmax, and biases and norms are not the zeros and ones of a fresh model:
a converter that forgot one of them would be found out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n  \n\t\t\r\n \r",
    "Hello, world!",
    " leading",
    "trailing ",
    "a  b   c    d     e",
    "I'll DON'T we've 'tis it's he'd you're I'm THEY'RE",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 -5 x2y 0x1F",
    "naïve café Ünïcödé ß ﬁ e\u0301 A\u030a",
    "日本語のテキスト 中文。，、 한국어 ภาษาไทย",
    "Привет мир العربية، עברית हिन्दी। ۔",
    "😀 👩‍👩‍👧 🇩🇪 ✅🚀 😶\u200d🌫️",
    "if (x == 1) { return a[i]->b; } // #!/bin/sh $HOME `ls` ~/.x | tee",
    '...!!!??? ---___===+++*** "quoted" (a|b) [c] {d} <e> & @f #g 50% ^h \\i',
    "\u00a0non\u00a0breaking\u2003em\u200bzero\ufeffbom\u2028line",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the the the  the\nthe\tthe",
    "\x00\x01\x7f",
    "The quick brown fox jumps over the lazy dog and went to the king's house.",
]


def corpus() -> Iterator[str]:
    """Text to train tokenizers on: the package's stories, and the nasty strings so often that they have tokens, too.

    Only then does it show by which rule a text is cut.
    """
    stories = Path(__file__).parent.parent / "agq_gguf" / "data" / "calibration.txt"
    yield stories.read_text(encoding="utf-8")[:20000]
    for text in NASTY * 50:
        yield text.replace("\x00", "")


# tokenizers

LLAMA3_CUT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
BLOOM_CUT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def _byte_level(
    special: list[str],
    cut: Any,
    *,
    texts: Iterable[str] | None = None,
    vocab: int = 560,
    ignore_merges: bool = False,
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus() if texts is None else texts, trainer)
    return tokenizer


def _split(regex: str) -> Any:
    cut = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _starts_with(tokenizer: Tokenizer, text: str) -> None:
    pairs = [(text, tokenizer.token_to_id(text))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{text} $A", special_tokens=pairs)


def opt_tokenizer(texts: Iterable[str] | None = None, vocab: int = 560) -> Any:
    """Like OPT's: GPT-2's rule, every text begins with </s>."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"], cut, texts=texts, vocab=vocab)
    _starts_with(tokenizer, "</s>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def bloom_tokenizer(texts: Iterable[str] | None = None, vocab: int = 560) -> Any:
    """Like BLOOM's: a rule of its own, nothing added."""
    tokenizer = _byte_level(["<unk>", "<s>", "</s>", "<pad>"], _split(BLOOM_CUT), texts=texts, vocab=vocab)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def llama3_tokenizer() -> Any:
    """Like LLaMA 3's: its own rule, whole words skip merging, special tokens at the end of the vocabulary."""
    parts = json.loads(_byte_level([], _split(LLAMA3_CUT), vocab=540, ignore_merges=True).to_str())
    parts["model"]["vocab"]["ĠlazyCat"] = len(parts["model"]["vocab"])  # no merges lead to this word
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    _starts_with(tokenizer, "<|begin_of_text|>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    fast.chat_template = CHAT
    return fast


def sentencepiece_model(vocab: int = 570) -> bytes:
    """A SentencePiece BPE model like LLaMA's: bytes for the unknown, digits one by one."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(corpus()).splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.998,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def llama_tokenizer(*, published: bool = True, legacy: bool = True) -> Any:
    """Like LLaMA 2's, from the SentencePiece model.

    `published` as tokenizer.json was in LLaMA 2; else as the class LlamaTokenizer of transformers 5 makes it.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    vocab, merges = _merges(pieces)
    if not published:
        return transformers.LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    return sentencepiece_tokenizer(pieces, space_before=True, chat_template=CHAT)


def _merges(pieces: list[tuple[str, float]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of SentencePiece's pieces with scores: all splits of a piece in two, by its score."""
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    splits = [
        (score, -vocab[piece[:i]], -vocab[piece[i:]], piece[:i], piece[i:])
        for piece, score in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    return vocab, [split[3:] for split in sorted(splits, reverse=True)]


def sentencepiece_tokenizer(pieces: list[tuple[str, float]], *, space_before: bool, chat_template: str) -> Any:
    """tokenizer.json of pieces with scores, as it was in LLaMA 2; `space_before`: texts get a space in front."""
    vocab, merges = _merges(pieces)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_before else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_before else steps)
    special = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    _starts_with(tokenizer, "<s>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    return fast


# models


def _spread(model: Any, seed: int) -> Any:
    """Random weights of a trained model's size: outputs about as large as inputs, logits with a clear maximum."""
    generator = torch.Generator().manual_seed(seed)
    # With a tied output and normed embeddings, small layers would leave each token to predict itself.
    gain = 1.6 if model.config.model_type == "bloom" else 0.8
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name or "ln_f" in name:
                weight.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            elif "embed_positions" in name:
                weight.copy_(0.2 * noise)
            elif "embed" in name or "lm_head" in name:
                weight.copy_(noise * 3.0 / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(noise * gain / weight.shape[-1] ** 0.5)
    return model.eval()


SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 576}


def llama_config(**changes: Any) -> Any:
    values = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes}
    return transformers.LlamaConfig(**values)


def opt_config(**changes: Any) -> Any:
    values = {**SIZES, "ffn_dim": 384, "max_position_embeddings": 256, "word_embed_proj_dim": 128, **changes}
    return transformers.OPTConfig(**values)


def bloom_config(**changes: Any) -> Any:
    sizes = {"n_layer": 2, "hidden_size": 128, "n_head": 4, "vocab_size": 576, "seq_length": 256}
    return transformers.BloomConfig(**{**sizes, **changes})


def write(folder: Path, config: Any, tokenizer: Any, *, seed: int = 0, **options: Any) -> Any:
    """Writes model and tokenizer into a folder as transformers does; returns the model."""
    names = {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM", "bloom": "BloomForCausalLM"}
    names["mistral"] = "MistralForCausalLM"
    model = _spread(getattr(transformers, names[config.model_type])(config), seed)
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return model


def write_pytorch(folder: Path, model: Any, *, parts: int = 1, **options: Any) -> None:
    """Replaces the weights of a folder by pytorch_model.bin, or by parts with an index."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    state = model.state_dict()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return
    table = {}
    for i in range(parts):
        name = f"pytorch_model-{i + 1:05}-of-{parts:05}.bin"
        keys = list(state)[i::parts]
        torch.save({key: state[key].clone() for key in keys}, folder / name, **options)
        table.update(dict.fromkeys(keys, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}), encoding="utf-8")


# what the tests import

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
OWN_YARN = {**YARN, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}

# name: (config, tokenizer, bound of the mean KL divergence)
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], float]] = {
    "llama": (lambda: llama_config(), llama_tokenizer, 1e-4),
    "llama-tied-biases": (
        lambda: llama_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        llama_tokenizer,
        1e-4,
    ),
    "llama3": (
        lambda: llama_config(
            rope_scaling={**LLAMA3_ROPE, "original_max_position_embeddings": 64}, rope_theta=5e5, head_dim=64
        ),
        llama3_tokenizer,
        1e-4,
    ),
    "linear": (
        lambda: llama_config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
        llama3_tokenizer,
        1e-4,
    ),
    "yarn": (lambda: llama_config(rope_scaling=YARN, head_dim=64), llama3_tokenizer, 1e-4),
    "own-yarn": (lambda: llama_config(rope_scaling=OWN_YARN), llama3_tokenizer, 1e-4),
    "mistral": (
        lambda: transformers.MistralConfig(
            **SIZES, intermediate_size=256, num_key_value_heads=2, max_position_embeddings=256, sliding_window=None
        ),
        llama_tokenizer,
        1e-4,
    ),
    "opt": (lambda: opt_config(), opt_tokenizer, 1e-3),
    "opt-no-bias": (lambda: opt_config(enable_bias=False), opt_tokenizer, 1e-3),
    "bloom": (lambda: bloom_config(), bloom_tokenizer, 1e-4),
    "bloom-12-heads": (lambda: bloom_config(hidden_size=384, n_head=12), bloom_tokenizer, 1e-4),
}
