"""Compares the imported tokenizer in llama.cpp with the checkpoint's own, on texts that tell tokenizers apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gguf import TokenType

from agq_gguf.errors import InputError
from agq_gguf.import_hf.tokenizer import Vocabulary
from agq_gguf.runtime.model import Model

_SPECIALS = 8  # tokens tried in text, at most

Encode = Callable[[str], list[int]]


def sample_texts(special: list[str]) -> Iterator[str]:
    """Texts that tell tokenizers apart: spaces, digits, scripts, emoji, special tokens in between."""
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
    """What to tell the user about a GGUF (metadata is enough) whose tokenizer came from `folder`; [] if all is well.

    Raises InputError when llama.cpp does not take the tokenizer at all.
    """
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    special = [text for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in kinds][
        :_SPECIALS
    ]
    with Model(model, vocab_only=True) as host:
        encode = _own_tokenizer(folder, special)
        if encode is None:
            return ["the tokenizer was not compared with the checkpoint's own: pip install 'agq-gguf[convert]'"]
        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            special = []  # SentencePiece alone takes them for text
        texts = list(sample_texts(special))
        different = [
            text
            for text in texts
            if host.tokenize(text, add_special=False, parse_special=True).tolist() != encode(text)
        ]
    if not different:
        return []
    return [
        f"llama.cpp cuts {len(different)} of {len(texts)} test texts otherwise than the checkpoint, as {different[0]!r}"
    ]


def _own_tokenizer(folder: Path, special: list[str]) -> Encode | None:
    """What the checkpoint's own tokenizer makes of a text, without special tokens around; None: library missing."""
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
    except Exception as e:  # the library raises nothing more special
        raise InputError(f"{path}: cannot be read by the tokenizers library: {e}") from e

    def encode(text: str) -> list[int]:
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as e:
            raise InputError(f"{path}: the tokenizers library cannot cut {text!r} with it: {e}") from e

    return encode
