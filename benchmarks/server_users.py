"""Measures a server with several users at once: all tokens per second, and the time to the first token.

    python benchmarks/server_users.py A.gguf B.gguf --server build/bin/llama-server --text TEXT --users 8

Each model gets a llama-server of its own, with the plugin, one after the other in each round. All users ask at the
same time, each about another stretch of the text, and read a streamed answer. Prints a table in Markdown with medians
over the rounds; ratios are to the first model.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Round:
    """What the users of one round saw."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token, of each user


@contextmanager
def served(model: Path, server: str, users: int, context: int, threads: int) -> Iterator[str]:
    """The address of a server."""
    command = [sys.executable, "-m", "agq_gguf", "serve", model, "--server", server, "--port", 0, "--slots", users]
    command += ["-c", context, "-t", threads]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        assert running.stdout is not None
        found = re.match(r"serving at (http://\S+)/v1 with ", running.stdout.readline())
        if not found:
            raise SystemExit(f"{model}: the server did not start")
        try:
            yield found[1]
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(60)


def ask(url: str, prompt: str, tokens: int) -> Iterator[float]:
    """The times at which the tokens of an answer come."""
    body = {"prompt": prompt, "n_predict": tokens, "stream": True, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        url + "/completion", json.dumps({**body, "cache_prompt": False}).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data: ") and b'"content":""' not in line:
                yield time.perf_counter()


def run_round(url: str, prompts: list[str], tokens: int) -> Round:
    """All users at once."""
    found, lock, begin = Round(), threading.Lock(), time.perf_counter()

    def user(prompt: str) -> None:
        times = list(ask(url, prompt, tokens))
        with lock:
            found.tokens += len(times)
            found.first.append(times[0] - begin)

    people = [threading.Thread(target=user, args=(prompt,)) for prompt in prompts]
    for one in people:
        one.start()
    for one in people:
        one.join()
    found.seconds = time.perf_counter() - begin
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--server", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1000, help="characters of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=2)
    args = parser.parse_args()
    text = args.text.read_text("utf-8")
    prompts = [text[i * 5000 : i * 5000 + args.prompt] for i in range(args.users)]
    rounds: dict[Path, list[Round]] = {model: [] for model in args.models}
    for _ in range(args.rounds):
        for model in args.models:
            with served(model, args.server, args.users, 1024, args.threads) as url:
                list(ask(url, "warm", 4))
                rounds[model].append(run_round(url, prompts, args.tokens))
    print("| model | tokens/s of all | to the first | time to first token, median of users | to the first |")
    print("|---|---|---|---|---|")
    reference: tuple[float, float] | None = None
    for model, found in rounds.items():
        speed = statistics.median(one.tokens / one.seconds for one in found)
        first = statistics.median(statistics.median(one.first) for one in found)
        reference = reference or (speed, first)
        print(
            f"| {model.name} | {speed:.1f} | {speed / reference[0]:.2f} | {first:.2f} s | {first / reference[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
