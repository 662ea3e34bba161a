"""benchmarks/prune_tasks.py on a tiny model: every kind of prompt, a table, and a run that goes on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import tiny_models
from command_line import environment

from agq_gguf.pruning.facts import FACT_WORDS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "prune_tasks.py"
SETTING = "0:0.5;score=recent;keep=64"
KINDS = ["needle", "facts", "functions", "count", "list", "variables", "question-first", "paraphrase", "second", "text"]


def prose(path: Path) -> Path:
    dice = random.Random(5)
    words = [word for word in tiny_models.WORDS if word not in FACT_WORDS]
    lines = [" ".join(["The", *dice.choices(words, k=dice.randint(8, 20))]) + "." for _ in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tasks(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_all_kinds_and_a_run_that_goes_on(llama_agq: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out.json"
    common = [llama_agq, "--prose", prose(tmp_path / "prose.txt"), "--tokens", 700, 800, "--json", kept]
    out = tasks(*common, "--count", 2, "--settings", SETTING)
    assert out.count(" tokens  ") == 2 * 2 * len(KINDS)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:3] == "| `"]
    assert [row[:2] for row in rows] == [
        [f"`{s}`", kind] for s in ("off", SETTING) for kind in [*KINDS, "all with answers"]
    ]
    for setting, kind, unpruned, right, interval, value, saved, nll in rows:
        assert (saved == "0.0%") == (setting == "`off`") and float(nll.split()[0]) > 0
        if kind == "text":
            assert [unpruned, right, interval, value] == [""] * 4 and nll.endswith("%)")
        else:
            n = int(unpruned.split("/")[0])
            assert unpruned.endswith("/18" if kind == "all with answers" else "/2") and right.endswith(f"/{n}")
            assert " to " in interval and value.endswith("%")
            assert setting != "`off`" or (right == f"{n}/{n}" and value == "100.0%")
    results = json.loads(kept.read_text(encoding="utf-8"))["results"]
    assert {(r["kind"], r["seed"]) for r in results} == {(kind, seed) for kind in KINDS for seed in (1000, 1001)}
    assert all(700 <= r["tokens"] <= 800 for r in results)

    again = tasks(*common, "--count", 3, "--settings", SETTING, "--kinds", "needle,text")
    assert again.count(" tokens  ") == 2 * 2 and "needle 1002" in again and "needle 1001:" not in again
    other = tasks(*common[:3], "--tokens", 600, 700, "--json", kept, code=1)
    assert "has results of another run" in other
    assert "kinds must be from needle, " in tasks(*common, "--kinds", "x", code=2)
