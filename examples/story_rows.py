"""Tokenizer and training rows of the demo model: stories and questions about them.

A row is a window of tokens that begins with a document. It also says which tokens are answers, and where the story
tells them.
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
    """SentencePiece BPE with bytes for unknown characters; it adds no space before a text."""
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
    """Tokens, and the places of tokens that can only be copied from an earlier place.

    values: position of such a token of an answer -> position of the same token in the sentence that told it, or -1 if
    it was told more than once. keys: position of any other token of an answer -> the same in the question, or -1.
    """

    tokens: list[int] = field(default_factory=list)
    values: dict[int, int] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)

    def append(self, other: Row) -> None:
        """Appends another row's tokens."""
        begin = len(self.tokens)
        self.tokens += other.tokens
        for mine, theirs in ((self.values, other.values), (self.keys, other.keys)):
            mine |= {begin + at: begin + source if source >= 0 else -1 for at, source in theirs.items()}

    def cut(self, size: int) -> None:
        """Keeps only the first `size` tokens."""
        del self.tokens[size:]
        for places in (self.values, self.keys):
            for at in [at for at in places if at >= size]:
                del places[at]


def encode(talk: Talk, tokenizer: Tokenizer, chat: bool = True) -> Row:
    """A document in the form of the chat template, with an end token after each answer, or as plain text."""
    if not chat:
        return Row(tokenizer.encode(story_grammar.as_text(talk) + "\n\n"))
    if not talk.request:
        return Row([BOS, *tokenizer.encode(talk.story), EOS])
    row = Row([BOS, *tokenizer.encode(f"User: {talk.request}\nBot: {talk.story}"), EOS])
    story = as_characters(row.tokens)
    for fact in talk.facts:
        before, behind = fact.answer.rsplit(f" {fact.value}", 1)
        key, value = tokenizer.encode(f" {before}"), tokenizer.encode(f" {fact.value}")
        told = as_characters(key[1:] + value)  # without the first token: only an answer always has a capital letter
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
        """`seed` decides all rows."""
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.documents = 0

    def next(self, size: int) -> Row:
        """A row of `size` tokens; the number of facts in its stories fits its length."""
        row = Row()
        while len(row.tokens) < size:
            self.documents += 1
            talk = story_grammar.talk(self.rng, max(2, (size - TOKENS_OF_FRAME) // TOKENS_OF_FACT))
            row.append(encode(talk, self.tokenizer, chat=self.documents % 10 >= 2))
        row.cut(size)
        return row
