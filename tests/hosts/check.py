"""The host check: whether a host runs AGQ4 models as it should. tests/test_hosts.py and benchmarks/hosts.py use it.

All is measured in processes of the host (driver.py) and judged here: against a forward in numpy, against the same host
with other settings, and against the same host without the plugin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_models
from low_level import QUICK
from reference_model import ReferenceModel

from agq_gguf.quantization.pipeline import quantize

_DRIVER = Path(__file__).with_name("driver.py")
_PACKAGED = Path(__file__).resolve().parents[2] / "agq_gguf" / "data" / "story-f16.gguf"
_STORY = (
    "Once upon a time there was a little dog who lived in a house near the sea. One day the dog went to the king, who "
    "had lost his red key in the garden. The dog looked under the tree, behind the door and in the big box. Then he saw"
)
# Short enough that no activation falls to the other side of a rounding step (docs/design.md).
_SHORT = "the red key in the box and the dog"

# Logits of two tokens that are as near as this may change places when one activation is rounded the other way.
_NEAR = 0.1


@dataclass(frozen=True)
class HostModels:
    """Models of the check: what is compared with the forward in numpy is tiny and keeps its cache in binary32."""

    dense: Path
    experts: Path
    stock: Path
    story: Path

    @classmethod
    def make(cls, folder: Path) -> HostModels:
        """Quantizes them into the folder."""
        stock = tiny_models.write_llama(folder / "stock.gguf", dtype="f32", n_embd=256, n_ff=384)
        moe = tiny_models.write_llama(folder / "moe.gguf", dtype="f32", n_ff=384, n_expert=4, n_expert_used=2)
        found = cls(folder / "dense-agq4.gguf", folder / "experts-agq4.gguf", stock, folder / "story-agq4.gguf")
        quantize(stock, found.dense, options=QUICK)
        quantize(moe, found.experts, options=QUICK)
        quantize(_PACKAGED, found.story, options=QUICK)
        return found


@dataclass
class HostReport:
    """What the check found."""

    ggml: str = "unknown"
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # what is wrong, one sentence each

    def expect(self, what: str, holds: bool, otherwise: str = "") -> None:
        """Notes a result."""
        if holds:
            self.passed.append(what)
        else:
            self.failed.append(f"{what}: {otherwise}" if otherwise else what)


class HostFailure(Exception):
    """A process of the host did not end well."""


class HostUnderTest:
    """A host: how to run the driver in it, and its library."""

    def __init__(self, python: Sequence[str], library: Path, plugin: Path, work: Path) -> None:
        """`python` is the command of an interpreter that can load the library."""
        self._python, self._library, self._plugin, self._work = list(python), library, plugin, work
        self.ggml = "unknown"

    def run(
        self, model: Path, prompt: str | list[int], runs: list[dict[str, str]], *, plugin: bool = True
    ) -> list[dict[str, Any]]:
        """Results of the driver, one for each run. Raises HostFailure."""
        job = self._work / "job.json"
        defaults = {"flash": "off", "prune": "off", "cache": "f16", "outputs": "last"}
        job.write_text(
            json.dumps({"model": str(model), "prompt": prompt, "runs": [{**defaults, **run} for run in runs]})
        )
        command = [*self._python, str(_DRIVER), str(self._library), str(self._plugin) if plugin else "none", str(job)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        if result.returncode != 0 or len(lines) != 1 + len(runs):
            raise HostFailure(f"{result.stderr.strip()[-600:]} (exit code {result.returncode})")
        self.ggml = lines[0]["ggml"]
        return lines[1:]


def _distance(found: Any, wanted: Any) -> float:
    a, b = np.asarray(found), np.asarray(wanted)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _follow(model: ReferenceModel, prompt: list[int], tokens: list[int]) -> NDArray[np.float64]:
    """How far each token is from the reference's best one, in logits."""
    logits = model.logits(prompt + tokens)[len(prompt) - 1 : -1]
    return logits.max(1) - logits[np.arange(len(tokens)), tokens]


def check_host(host: HostUnderTest, models: HostModels) -> HostReport:
    """Runs the whole check, as far as it goes."""
    report = HostReport()
    try:
        _check_reference(host, models, report)
        _check_story(host, models, report)
        _check_stock(host, models, report)
    except HostFailure as failure:
        report.failed.append(f"a process of the host failed: {failure}")
    report.ggml = host.ggml
    return report


def _check_reference(host: HostUnderTest, models: HostModels, report: HostReport) -> None:
    for name, path in (("dense", models.dense), ("experts", models.experts)):
        [found] = host.run(path, _SHORT, [{"cache": "f32", "outputs": "all"}])
        model, prompt = ReferenceModel(path), found["prompt"]
        error = _distance(found["logits"], model.logits(prompt))
        report.expect(f"logits of a {name} model are the reference's", error < 1e-5, f"relative difference {error:.1e}")
        behind = _follow(model, prompt, found["tokens"]).max()
        report.expect(
            f"text of a {name} model is the reference's", behind < _NEAR, f"{behind:.3f} behind the best token"
        )
        report.expect(f"saved and restored, {name}", found["restored"])


def _check_story(host: HostUnderTest, models: HostModels, report: HostReport) -> None:
    flash = [{"flash": kind} for kind in ("off", "on", "auto")]
    cached = [{"flash": "on", "cache": "q8_0"}]
    pruned = [{"flash": f, "prune": p} for f in ("off", "on") for p in ("1:0.5;min=16", "mask,1:0.5;min=16")]
    results = host.run(models.story, _STORY, [*flash, *cached, *pruned])
    off, on, auto, q8 = results[:4]
    behind = _follow(ReferenceModel(models.story), off["prompt"], off["tokens"]).max()
    report.expect("a story is the reference's", behind < _NEAR, f"{behind:.3f} behind the best token: {off['text']}")
    for name, other in (("on", on), ("auto", auto)):
        error = _distance(other["logits"], off["logits"])
        same = other["tokens"] == off["tokens"] and error < 0.02
        report.expect(f"flash attention {name} as off", same, f"{error:.1e}, {other['text']!r} for {off['text']!r}")
    error = _distance(q8["logits"], on["logits"])
    report.expect("a cache in q8_0", error < 0.1, f"relative difference {error:.1e}")
    for name, (cut, mask), whole in (("off", results[4:6], off), ("on", results[6:8], on)):
        error, effect = _distance(cut["logits"], mask["logits"]), _distance(cut["logits"], whole["logits"])
        same = cut["tokens"] == mask["tokens"] and error < 0.02 and effect > 5 * error
        report.expect(
            f"pruning is its mask run, flash attention {name}", same,
            f"{error:.1e} from the mask run, {effect:.1e} from the whole, {cut['text']!r} for {mask['text']!r}",
        )  # fmt: skip
    report.expect("stories saved and restored", all(r["restored"] for r in results))
    said = [line for r in results for line in r["log"]]
    report.expect("nothing to complain about", not said, "; ".join(said))


def _check_stock(host: HostUnderTest, models: HostModels, report: HostReport) -> None:
    [[with_plugin], [without]] = (host.run(models.stock, _SHORT, [{}], plugin=plugin) for plugin in (True, False))
    same = with_plugin["logits"] == without["logits"] and with_plugin["tokens"] == without["tokens"]
    report.expect("stock models are left alone", same)
