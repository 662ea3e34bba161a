"""A conversation with a model, which may become longer than the model's context."""

from __future__ import annotations

from collections.abc import Iterator

from agq_gguf.errors import InputError
from agq_gguf.runtime.chat_format import Formatter, Message, Prompt
from agq_gguf.runtime.text import TextModel


class Conversation:
    """Messages of a user and a model. The oldest are left out of the prompt when the context is full."""

    def __init__(
        self, text: TextModel, formatter: Formatter, system: str = "", *, tokens: int, temperature: float, seed: int
    ) -> None:
        """An answer has at most so many `tokens`."""
        self.system = system
        self.messages: list[Message] = []  # all of them, without the system prompt
        self.dropped = 0  # how many of them the last prompt left out for the first time
        self._text, self._formatter = text, formatter
        self._tokens, self._temperature, self._seed = tokens, temperature, seed
        self._first = 0  # the first message that is still in the prompt

    def reset(self) -> None:
        """Forgets all messages; the system prompt stays."""
        self.messages, self._first, self.dropped = [], 0, 0

    def answer(self, message: str) -> Iterator[str]:
        """Yields pieces of the answer to a message. What was said stays in `messages`, also if it is interrupted.

        Raises InputError if the message alone is longer than the context, and then forgets the message.
        """
        self.dropped = 0
        self.messages.append({"role": "user", "content": message})
        try:
            prompt = self._prompt()
        except InputError:
            self.messages.pop()
            raise
        said: list[str] = []
        pieces = self._text.continued(prompt, tokens=self._tokens, temperature=self._temperature, seed=self._seed)
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def _prompt(self) -> Prompt:
        """The prompt of as many of the latest messages as leave room for an answer."""
        room = self._text.limit - min(self._tokens, self._text.limit // 2)
        before = self._first
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            prompt = self._formatter([*head, *self.messages[self._first :]])
            length = len(self._text.tokenize(prompt))
            last = self._first >= len(self.messages) - 1
            if length <= (self._text.limit - 1 if last else room):
                self.dropped = self._first - before
                return prompt
            if last:
                self._first = before
                raise InputError(
                    f"the message has {length} tokens with its system prompt, expected at most "
                    f"{self._text.limit - 1}; shorten it or use a larger --ctx"
                )
            self._first += 2 if self._first + 2 < len(self.messages) else 1  # a question and its answer

    def as_markdown(self) -> str:
        """The whole conversation as text."""
        parts = [f"**System**\n\n{self.system}"] if self.system else []
        parts += [f"**{message['role'].capitalize()}**\n\n{message['content'].strip()}" for message in self.messages]
        return "\n\n".join(parts) + "\n"
