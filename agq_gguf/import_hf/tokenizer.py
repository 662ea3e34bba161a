"""Converts the checkpoint's tokenizer to llama.cpp's form.

That form has tokens, their kinds, scores or merges, and the name of the rule that splits text before merging. Two kinds
of tokenizers are supported: byte-level BPE (GPT-2, LLaMA 3, OPT, BLOOM) and SentencePiece's BPE (LLaMA 1 and 2).
`gguf.SpecialVocab` finds the special tokens and the chat template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from agq_gguf.errors import InputError, missing_package
from agq_gguf.import_hf.checkpoint import read_json, read_object

_SPACE = "\u2581"  # SentencePiece's character for a space
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_TOKENS = 1 << 24
_SPECIAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# Rules that split text before merging. Key: the steps of the pre-tokenizer in tokenizer.json, and whether words that
# are tokens skip merging. Value: llama.cpp's name of the rule.
_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (("words",), False): "gpt-2",
    ((f"split {_GPT2}", "bytes"), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((f"split {_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}", "bytes"), True): "llama-bpe",
    ((f"split {_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}", "bytes"), False): "dbrx",
    ((f"split {_CONTRACTIONS}\\p{{N}}{_REST}", "bytes"), False): "qwen2",
    ((f"split {_BLOOM}", "bytes"), False): "bloom",
}


@dataclass
class Vocabulary:
    """The content of `tokenizer.ggml.*`."""

    model: str  # "llama": SentencePiece, "gpt2": byte-level BPE
    pre: str
    tokens: list[str]
    kinds: list[TokenType]
    special: gguf.SpecialVocab
    scores: list[float] | None = None  # SentencePiece: higher scores are merged first
    add_space_prefix: bool | None = None
    warnings: list[str] = field(default_factory=list)

    def add_to(self, writer: Any) -> None:
        """Adds it to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, n_vocab: int, config: dict[str, Any]) -> Vocabulary:
    """The tokenizer in a checkpoint folder, for a model of `n_vocab` tokens.

    Looks for tokenizer.json, then tokenizer.model (SentencePiece), then vocab.json with merges.txt. Raises InputError
    if there is none, or if it is damaged or not supported.
    """
    builder = _Builder(folder, n_vocab)
    if builder.fast.is_file():
        found = _guarded(builder.fast, builder.from_json)
    elif (folder / "tokenizer.model").is_file():
        found = _guarded(folder / "tokenizer.model", builder.from_sentencepiece)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        found = _guarded(folder / "vocab.json", builder.from_vocab)
    else:
        raise InputError(
            f"{folder}: has no tokenizer; expected tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
        )
    _check_texts(found, folder)
    _complete_special(found, folder, config)
    return found


def _guarded(path: Path, build: Any) -> Vocabulary:
    """Runs `build`, and turns exceptions caused by a malformed file into an InputError that names the file."""
    try:
        found: Vocabulary = build()
        return found
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as e:
        raise InputError(f"{path}: not a valid tokenizer ({type(e).__name__}: {e})") from e


class _Builder:
    """Collects tokens by number; numbers without a token get a placeholder."""

    def __init__(self, folder: Path, n_vocab: int) -> None:
        self.folder, self.n_vocab = folder, n_vocab
        self.fast = folder / "tokenizer.json"
        self.tokens = [f"[PAD{i}]" for i in range(n_vocab)]
        self.kinds = [TokenType.UNUSED] * n_vocab
        self.scores = [0.0] * n_vocab
        self.warnings: list[str] = []
        self._beyond = 0

    def put(self, number: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Adds one token; tokens beyond the model's vocabulary are counted and left out."""
        if not isinstance(number, int) or not isinstance(text, str) or not 0 <= number < _MAX_TOKENS:
            raise ValueError(f"token {text!r} has the number {number!r}")
        if number >= self.n_vocab:
            self._beyond += 1
            return
        self.tokens[number], self.kinds[number], self.scores[number] = text, kind, score

    def put_added(self, number: int, text: str, special: bool) -> None:
        """Adds a token that is matched before the text is split."""
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        known = 0 <= number < self.n_vocab and self.tokens[number] == text
        if known and self.kinds[number] in (TokenType.UNKNOWN, TokenType.BYTE):
            return  # keeps its kind
        self.put(
            number, text if special else text.replace(_SPACE, " "), kind, self.scores[number] if known else -1000.0
        )

    def done(self, model: str, pre: str, *, merges: bool) -> Vocabulary:
        if (
            not merges and self.kinds.count(TokenType.BYTE) != 256
        ):  # llama.cpp would end the process at the first other character
            raise ValueError(f"{self.kinds.count(TokenType.BYTE)} of the 256 byte tokens <0x00> to <0xFF> are there")
        if self._beyond:
            self.warnings.append(f"left out {self._beyond} tokens of the tokenizer: the model has only {self.n_vocab}")
        special = gguf.SpecialVocab(self.folder, load_merges=merges, n_vocab=self.n_vocab)
        if merges and not special.merges:
            raise ValueError("there are no merges")
        scores = None if merges else self.scores
        return Vocabulary(model, pre, self.tokens, self.kinds, special, scores, warnings=self.warnings)

    # tokenizer.json

    def from_json(self) -> Vocabulary:
        """From tokenizer.json, the file of the library `tokenizers`."""
        data = read_object(self.fast)
        model = data["model"]
        if model.get("type", "BPE") != "BPE" or not isinstance(model["vocab"], dict):
            raise InputError(f"{self.fast}: only BPE tokenizers are supported, got type {model.get('type')!r}")
        if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise InputError(f"{self.fast}: llama.cpp does not support dropout, prefixes or suffixes of BPE tokens")
        for text, number in model["vocab"].items():
            self.put(number, text, TokenType.NORMAL)
        sentencepiece = bool(model.get("byte_fallback"))
        if sentencepiece:
            self._score_by_rank(model)
            space = self._check_sentencepiece(data)
        added = data.get("added_tokens") or []
        for token in added:
            self.put_added(token["id"], token["content"], bool(token["special"]))
        if any(token.get("lstrip") or token.get("rstrip") or token.get("single_word") for token in added):
            self.warnings.append("some special tokens remove the spaces around them, which llama.cpp does not support")
        if not sentencepiece:
            return self.done("gpt2", self._cut(data), merges=True)
        found = self.done("llama", "default", merges=False)
        found.add_space_prefix = space
        return found

    def _score_by_rank(self, model: dict[str, Any]) -> None:
        """Sets SentencePiece's scores of tokens from the ranks of merges; the first merge of a token counts."""
        numbers = model["vocab"]
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            number = numbers.get(left + right)
            if number is not None and number < self.n_vocab and self.scores[number] == 0:
                self.scores[number] = -1.0 - rank
        unknown = model.get("unk_token")
        for text, number in numbers.items():
            if number < self.n_vocab and (text == unknown or _BYTE.fullmatch(text)):
                self.kinds[number] = TokenType.UNKNOWN if text == unknown else TokenType.BYTE

    def _check_sentencepiece(self, data: dict[str, Any]) -> bool:
        """Whether a text gets a space in front. Raises InputError for steps that llama.cpp does not support."""
        prepend = False
        for part in _parts(data.get("normalizer"), "normalizers"):
            if part["type"] == "Prepend" and part["prepend"] == _SPACE:
                prepend = True
            elif part["type"] != "Replace" or part["pattern"] != {"String": " "} or part["content"] != _SPACE:
                raise InputError(f"{self.fast}: the normalizer {part['type']} is not supported")
        for part in _parts(data.get("pre_tokenizer"), "pretokenizers"):
            if part["type"] != "Metaspace" or part.get("split", True):
                raise InputError(f"{self.fast}: the pre-tokenizer {part['type']} is not supported")
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space") else "never")
            prepend = scheme != "never"
            if prepend:
                where = " and text after a special token" if scheme == "first" else ""
                self.warnings.append(f"text that begins with a space{where} gets one more space in llama.cpp")
        return prepend

    def _cut(self, data: dict[str, Any]) -> str:
        """llama.cpp's name of the rule that splits text into words."""
        normalizers = [part["type"] for part in _parts(data.get("normalizer"), "normalizers")]
        if normalizers == ["NFC"]:
            self.warnings.append("the tokenizer composes characters (NFC) first, which llama.cpp does not support")
        elif normalizers:
            raise InputError(f"{self.fast}: the normalizer {normalizers[0]} is not supported")
        steps = tuple(map(_step, _parts(data.get("pre_tokenizer"), "pretokenizers")))
        rule = _CUTS.get((steps, bool(data["model"].get("ignore_merges"))))
        if rule is None:
            raise InputError(
                f"{self.fast}: the rule that splits text ({'; '.join(steps) or 'none'}) is not supported; use "
                "llama.cpp's convert_hf_to_gguf.py, and then `agq-gguf quantize` with its F16 file"
            )
        return rule

    # other files

    def from_sentencepiece(self) -> Vocabulary:
        """From tokenizer.model, the file of SentencePiece."""
        if getattr(gguf.vocab, "SentencePieceProcessor", None) is None:
            raise missing_package("reading tokenizer.model", "sentencepiece", "convert")
        path = self.folder / "tokenizer.model"
        try:
            vocabulary = gguf.SentencePieceVocab(self.folder)
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path}: SentencePiece cannot read it: {e}") from e
        for number, (text, score, kind) in enumerate(vocabulary.all_tokens()):
            self.put(number, bytes(text).decode("utf-8"), TokenType(kind), score)
        if not all(float(score).is_integer() for score in self.scores):
            raise InputError(
                f"{path}: only BPE models are supported, this is a Unigram model (its scores are not ranks)"
            )
        self._put_configured()
        found = self.done("llama", "default", merges=False)
        found.add_space_prefix = vocabulary.sentencepiece_tokenizer.encode("a", out_type=str)[0].startswith(_SPACE)
        found.special.add_special_token.setdefault("bos", True)  # as in transformers for this file
        return found

    def from_vocab(self) -> Vocabulary:
        """From vocab.json and merges.txt, the files of GPT-2 and OPT."""
        for text, number in read_object(self.folder / "vocab.json").items():
            self.put(number, text, TokenType.NORMAL)
        self._put_configured()
        return self.done("gpt2", "gpt-2", merges=True)

    def _put_configured(self) -> None:
        """Adds special and added tokens, for folders without tokenizer.json."""
        extra = self.folder / "added_tokens.json"
        for text, number in (read_object(extra) if extra.is_file() else {}).items():
            self.put_added(number, text, False)
        numbers = {text: number for number, text in enumerate(self.tokens)}
        for text in set(named_specials(self.folder).values()):
            if text in numbers:
                self.put_added(numbers[text], text, True)
        settings = self.folder / "tokenizer_config.json"
        decoder = (read_object(settings) if settings.is_file() else {}).get("added_tokens_decoder") or {}
        for number, token in decoder.items():
            self.put_added(int(number), token["content"], bool(token["special"]))


def _parts(found: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be none, one, or a sequence."""
    if not found:
        return []
    return [part for item in found[key] for part in _parts(item, key)] if found["type"] == "Sequence" else [found]


def _step(part: dict[str, Any]) -> str:
    """One step of a pre-tokenizer, as written in `_CUTS`."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "words" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    # Some rules match everything. For them keeping the matches is the same as dropping the rest.
    keeps = (part.get("behavior"), bool(part.get("invert"))) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and keeps and "Regex" in part["pattern"]:
        return f"split {part['pattern']['Regex']}"
    return str(kind)


def named_specials(folder: Path) -> dict[str, str]:
    """Kind of special token ("bos") -> its text, from tokenizer_config.json or special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(values, dict):
            raise InputError(f"{folder / name}: must hold a JSON object, got {type(values).__name__}")
        for kind in _SPECIAL_KINDS:
            entry = values.get(f"{kind}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text:
                found.setdefault(kind, text)
    return found


def _check_texts(found: Vocabulary, folder: Path) -> None:
    """Renames tokens with empty text. Raises InputError for a text that occurs twice, where llama.cpp would abort."""
    numbers: dict[str, int] = {}
    for number, text in enumerate(found.tokens):
        if not text:
            text = found.tokens[number] = f"[EMPTY{number}]"
            found.kinds[number] = TokenType.UNUSED
        if text in numbers:
            raise InputError(f"{folder}: tokens {numbers[text]} and {number} have the same text {text!r}")
        numbers[text] = number


def _complete_special(found: Vocabulary, folder: Path, config: dict[str, Any]) -> None:
    """Sets special tokens that `gguf.SpecialVocab` did not find; llama.cpp's defaults would belong to other models."""
    ids = found.special.special_token_ids
    numbers = {text: number for number, text in enumerate(found.tokens)}
    for kind, text in named_specials(folder).items():
        if text in numbers:
            ids.setdefault(kind, numbers[text])
    ends = config.get("eos_token_id")
    if "eos" not in ids and isinstance(ends, list) and ends and ends[0] in range(len(found.tokens)):
        ids["eos"] = int(ends[0])
    if "eos" not in ids:
        found.warnings.append("the checkpoint names no end-of-text token; llama.cpp will use a default")
    adds = found.special.add_special_token
    for kind in ("bos", "eos"):
        adds.setdefault(kind, False)
        if kind not in ids:
            adds[kind] = False
    template = found.special.chat_template
    if template is not None and not isinstance(template, str) and not _named_templates(template):
        found.special.chat_template = None
        found.warnings.append("left out the chat template, because its form is not supported")


def _named_templates(template: Any) -> bool:
    pairs = [(item.get("name"), item.get("template")) for item in template if isinstance(item, dict)]
    return len(pairs) == len(template) and all(isinstance(text, str) for pair in pairs for text in pair)
