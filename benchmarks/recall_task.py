"""Counts how many questions about one sentence in a long story a model answers.

    python benchmarks/recall_task.py MODEL.gguf [--tokens 300 600] [--count 200]

The stories come from ``examples/story_grammar.py``, with seeds that training does not use. Each fact is told exactly
once, at a random place, among a dozen or more facts of the same kinds. An answer is right if all its words are right.
Runs the model in llama.cpp without pruning; ``prune_figures.py`` uses the same tasks.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import agq_gguf
from agq_gguf.runtime.model import Batch, Context, Model

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import story_grammar

TOKENS_OF_FACT = 28  # average of one fact and the text up to the next fact
ANSWER = 24  # maximum number of tokens


@dataclass
class RecallTask:
    """A prompt that ends where the answer begins; its text includes all special tokens except the first."""

    prompt: str
    answer: str
    place: float  # of the fact in the story, 0..1

    def right(self, reply: str) -> bool:
        """Whether each word of the reply is right."""
        return reply.strip() == self.answer


def recall_tasks(seed: int, count: int, tokens: tuple[int, int], length: Callable[[str], int]) -> list[RecallTask]:
    """Tasks whose prompts have `tokens` (minimum, maximum) tokens, counted by `length`."""
    rng = random.Random(seed)
    tasks: list[RecallTask] = []
    while len(tasks) < count:
        facts = rng.randint(max(2, tokens[0] // TOKENS_OF_FACT - 3), max(3, tokens[1] // TOKENS_OF_FACT))
        world = story_grammar.tell(rng, facts, fillers=0.5, memories=0.0)
        fact, story = rng.choice(world.facts), " ".join(world.lines)
        prompt = f"User: Tell me a story.\nBot: {story}</s>\nUser: {fact.question}\nBot:"
        if tokens[0] <= length(prompt) <= tokens[1]:
            place = story.find(fact.answer[1:]) / len(story)
            tasks.append(RecallTask(prompt, fact.answer, place))
    return tasks


def reply(model: Model, context: Context, prompt: str) -> str:
    """The answer of greedy decoding."""
    context.clear()
    batch = Batch(model.tokenize(prompt, parse_special=True))
    past = batch.raw.n_tokens
    answer: list[int] = []
    while True:
        context.decode(batch)
        token = int(context.logits(batch)[-1].argmax())
        if token == model.eos or len(answer) == ANSWER:
            return model.detokenize(answer)
        batch = Batch([token], first_position=past + len(answer))
        answer.append(token)


def main() -> None:
    """Prints the shares of right answers, also by the place of the fact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, nargs=2, default=(300, 600), help="length of the prompts")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N wrong answers")
    args = parser.parse_args()
    with Model(args.model) as model, agq_gguf.options(prune="off"):
        tasks = recall_tasks(
            args.seed, args.count, tuple(args.tokens), lambda text: len(model.tokenize(text, parse_special=True))
        )
        with model.context(args.tokens[1] + ANSWER + 64, threads=args.threads) as context:
            replies = [reply(model, context, task.prompt) for task in tasks]
    right = [task.right(found) for task, found in zip(tasks, replies, strict=True)]
    for task, found in [pair for pair, good in zip(zip(tasks, replies, strict=True), right, strict=True) if not good][
        : args.show
    ]:
        print(f"expected: {task.answer}  got: {found.strip()}")
    print(f"{args.model}: {sum(right)} of {len(right)} right ({sum(right) / len(right):.1%}), "
          f"prompts of {args.tokens[0]} to {args.tokens[1]} tokens")  # fmt: skip
    for part in range(4):
        here = [good for task, good in zip(tasks, right, strict=True) if part <= 4 * task.place < part + 1]
        print(f"  fact in quarter {part + 1} of the story: {sum(here)} of {len(here)}")


if __name__ == "__main__":
    main()
