"""Tokenizer and training rows of the demo model: stories and questions about them.

A row is a window of tokens that begins with a document, and says which of them are answers and where these stand in the
story.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field

import sentencepiece
import story_grammar
from story_grammar import Talk

BOS, EOS = 1, 2
TOKENS_OF_FRAME, TOKENS_OF_FACT = 70, 40  # opening, request and ending; telling, question and answer

Tokenizer = sentencepiece.SentencePieceProcessor


def train_tokenizer(vocab: int, seed: int, documents: int = 4000) -> Tokenizer:
    """SentencePiece BPE with bytes for what it does not know; no space is added before a text."""
    talks = story_grammar.texts(seed)
    lines = (line for _ in range(documents) for line in story_grammar.as_text(next(talks)).split("\n"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=vocab, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False, num_threads=1,
        remove_extra_whitespaces=False, bos_id=BOS, eos_id=EOS, unk_id=0, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(model_proto=model.getvalue())


@dataclass
class Row:
    """Tokens, and where in them is what only an earlier place tells.

    values: position of such a token of an answer -> position of the same token in the sentence that told it, or -1 if
    it was told more than once. keys: position of any other token of an answer -> the same in the question, or -1.
    """

    tokens: list[int] = field(default_factory=list)
    values: dict[int, int] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)

    def append(self, other: Row) -> None:
        """Adds another row's tokens behind these."""
        begin = len(self.tokens)
        self.tokens += other.tokens
        for mine, theirs in ((self.values, other.values), (self.keys, other.keys)):
            mine |= {begin + at: begin + source if source >= 0 else -1 for at, source in theirs.items()}

    def cut(self, size: int) -> None:
        """Leaves out all behind the first tokens."""
        del self.tokens[size:]
        for places in (self.values, self.keys):
            for at in [at for at in places if at >= size]:
                del places[at]


def encode(talk: Talk, tokenizer: Tokenizer, chat: bool = True) -> Row:
    """A document as the chat template writes it, with an end token behind each answer, or as plain text."""
    if not chat:
        return Row(tokenizer.encode(story_grammar.as_text(talk) + "\n\n"))
    if not talk.request:
        return Row([BOS, *tokenizer.encode(talk.story), EOS])
    row = Row([BOS, *tokenizer.encode(f"User: {talk.request}\nBot: {talk.story}"), EOS])
    story = as_characters(row.tokens)
    for fact in talk.facts:
        before, behind = fact.answer.rsplit(f" {fact.value}", 1)
        key, value = tokenizer.encode(f" {before}"), tokenizer.encode(f" {fact.value}")
        told = as_characters(key[1:] + value)  # an answer starts with a large letter, a telling perhaps not
        source = story.find(told) + len(key) - 1 if story.count(told) == 1 else -1
        asked = len(row.tokens)
        row.tokens += tokenizer.encode(f"\nUser: {fact.question}\nBot:")
        question = row.tokens[asked:]
        for token in key:
            row.keys[len(row.tokens)] = asked + question.index(token) if question.count(token) == 1 else -1
            row.tokens.append(token)
        for i, token in enumerate(value):
            row.values[len(row.tokens)] = source + i if source >= 0 else -1
            row.tokens.append(token)
        for token in [*tokenizer.encode(behind), EOS]:
            row.keys[len(row.tokens)] = -1
            row.tokens.append(token)
    return row


def as_characters(tokens: list[int]) -> str:
    """A character for each token, so that strings can be searched."""
    return "".join(map(chr, tokens))


class Rows:
    """Rows of whole documents, of which the last is cut off; the same seed gives the same rows."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        """seed: of all rows."""
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.documents = 0

    def next(self, size: int) -> Row:
        """A row of so many tokens; its stories have as many facts as go well with it."""
        row = Row()
        while len(row.tokens) < size:
            self.documents += 1
            talk = story_grammar.talk(self.rng, max(2, (size - TOKENS_OF_FRAME) // TOKENS_OF_FACT))
            row.append(encode(talk, self.tokenizer, chat=self.documents % 10 >= 2))
        row.cut(size)
        return row
