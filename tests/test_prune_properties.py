"""Token pruning on models of random sizes: the plugin against tokens that are physically removed, call by call.

Sizes of the model, rules, score, lengths of the calls and the host's ubatch are all drawn. Who leaves, and what the
model then says, must be what the numpy forward of reference_pruning.py finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from low_level import LowModel
from reference_model import ReferenceModel
from reference_pruning import PrunedReference, Rule

import agq_gguf
from agq_gguf.runtime.log import quiet_log

CLOSE = 1e-4  # of the norm of the logits; K/V cache and weights in F32


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    """Of a LLaMA: layers, heads and widths."""
    n_kv = draw(st.integers(1, 3))
    n_head = n_kv * draw(st.integers(1, 4))
    return {
        "n_layer": draw(st.integers(2, 6)),
        "n_head": n_head,
        "n_kv": n_kv,
        "n_embd": n_head * draw(st.sampled_from([16, 32, 48])),
        "n_ff": 32 * draw(st.integers(1, 6)),
        "seed": draw(st.integers(0, 99)),
    }


RULES = st.builds(
    lambda share, threshold, by_share: Rule(share=share) if by_share else Rule(threshold=threshold),
    st.integers(0, 8).map(lambda i: i / 10),
    st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    st.booleans(),
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate],  # shrinking would take minutes
)
@given(
    shape=shapes(),
    rules=st.lists(st.tuples(st.integers(0, 4), RULES), min_size=1, max_size=3, unique_by=lambda rule: rule[0]),
    score=st.sampled_from(["first", "received", "recent"]),
    keep=st.integers(0, 30),
    reach=st.integers(0, 3),
    reuse=st.booleans(),
    calls=st.lists(st.one_of(st.integers(64, 140), st.integers(1, 3)), min_size=1, max_size=4),
    ubatch=st.integers(64, 160),
)
def test_random_graphs(
    tmp_path: Path,
    shape: dict[str, Any],
    rules: list[tuple[int, Rule]],
    score: str,
    keep: int,
    reach: int,
    reuse: bool,
    calls: list[int],
    ubatch: int,
) -> None:
    path = tiny_models.write_llama(tmp_path / "random.gguf", dtype="f32", **shape)
    chosen = {
        layer: Rule(rule.share, rule.threshold, keep, reach, reuse)
        for layer, rule in sorted(rules)
        if layer < shape["n_layer"] - 1
    } or {0: Rule(share=0.4, keep=keep, reach=reach, reuse=reuse)}
    listed = ",".join(
        f"{layer}:{r.share if r.threshold is None else f't{r.threshold:.9g}'}" for layer, r in chosen.items()
    )
    reference = PrunedReference(ReferenceModel(path), chosen, score)
    dice = np.random.default_rng(shape["seed"])
    n_past = 0
    with quiet_log():
        model = LowModel(path)
        spec = f"{listed};score={score};keep={keep};reach={reach};reuse={int(reuse)}"
        with model.context(spec, cache="f32", n_ubatch=ubatch) as context:
            for length in calls:
                tokens = dice.integers(300, 420, length).tolist()
                found = context.decode(tokens, n_past)[0]
                for begin in range(0, length, ubatch):  # the host cuts a batch into ubatches
                    part = tokens[begin : begin + ubatch]
                    is_last = begin + ubatch >= length
                    logits = reference.run(part, None if is_last else [])
                    left = np.array(agq_gguf.last_pruned())[n_past + begin :][: len(part)]
                    np.testing.assert_array_equal(left, reference.left_behind)
                n_past += length
                error = np.linalg.norm(found - logits[0]) / np.linalg.norm(logits[0])
                assert error < CLOSE, (error, spec)
        model.close()
