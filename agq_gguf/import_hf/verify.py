"""Compares the imported tokenizer in llama.cpp with the checkpoint's own tokenizer, on difficult texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gguf import TokenType

from agq_gguf.errors import InputError, install_command
from agq_gguf.import_hf.tokenizer import Vocabulary
from agq_gguf.runtime.model import Model

_SPECIALS = 8  # maximum number of special tokens to try

Encode = Callable[[str], list[int]]


def sample_texts(special: list[str]) -> Iterator[str]:
    """Texts on which tokenizers differ: spaces, digits, scripts, emoji, special tokens within text."""
    yield from (
        "Hello, world!",
        " leading and trailing ",
        "two  spaces,   three, tab\tand\nnewline\n\nand\r\nmore \n \n",
        "I'll DON'T we've 'tis it's",
        "0 12 345 6789 3.14 1,000,000 x2y",
        "naïve café Ünïcödé ß ﬁ e\u0301",
        "日本語のテキスト 中文。，、 한국어",
        "Привет мир العربية עברית हिन्दी। ไทย",
        "😀 👩‍👩‍👧 🇩🇪 ✅",
        "if (x == 1) { return a[i]->b; } // #!/bin/sh $HOME `ls`",
        '...!!!??? ---___=== "quoted" (a|b)',
        "\u00a0\u200b\ufeff\u2028",
        "aaaaaaaaaaaaaaaaaaaaaaaa",
    )
    for text in special:
        yield f"before {text} after"
        yield f"{text}{text}x"


def tokenizer_warnings(model: Path, folder: Path, vocabulary: Vocabulary) -> list[str]:
    """Warnings about the tokenizer of a GGUF (with or without tensors) that came from `folder`; [] if it is right.

    Raises InputError if llama.cpp cannot load the tokenizer.
    """
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    special = [text for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in kinds][
        :_SPECIALS
    ]
    with Model(model, vocab_only=True) as host:
        encode = _own_tokenizer(folder, special)
        if encode is None:
            command = install_command("convert", "tokenizers")
            return [
                "the tokenizer was not compared with the checkpoint's own, because tokenizers is not installed; "
                f"install it with: {command}"
            ]
        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            special = []  # SentencePiece itself treats them as text
        texts = list(sample_texts(special))
        different = [
            text
            for text in texts
            if host.tokenize(text, add_special=False, parse_special=True).tolist() != encode(text)
        ]
    if not different:
        return []
    return [
        f"llama.cpp tokenizes {len(different)} of {len(texts)} test texts differently from the checkpoint, such as "
        f"{different[0]!r}"
    ]


def _own_tokenizer(folder: Path, special: list[str]) -> Encode | None:
    """The checkpoint's own tokenizer, without special tokens at the ends; None if its library is not installed."""
    if (folder / "tokenizer.json").is_file():
        return _fast(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return lambda text: list(pieces.encode(text))
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        return None
    bpe = ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    bpe.add_special_tokens(special)
    return lambda text: list(bpe.encode(text, add_special_tokens=False).ids)


def _fast(path: Path) -> Encode | None:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises no more specific type
        raise InputError(f"{path}: cannot be read by the tokenizers library: {e}") from e

    def encode(text: str) -> list[int]:
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as e:
            raise InputError(f"{path}: the tokenizers library cannot tokenize {text!r} with it: {e}") from e

    return encode
