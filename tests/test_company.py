"""A request gets the same bits alone, beside other requests, and after others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import architectures
import llama_cpp.llama_cpp as api
import numpy as np
import pytest
import tiny_models
from low_level import QUICK, LowContext, LowModel

from agq_gguf.quantization.pipeline import quantize

Writer = Callable[[Path], Path]

# Positions by rotation, learned, and ALiBi; a norm of queries and keys; sliding windows; sinks; experts.
WRITERS: dict[str, Writer] = {
    "llama": tiny_models.write_llama,
    "qwen2": tiny_models.write_qwen2,
    "gpt2": tiny_models.write_gpt2,
    "bloom": tiny_models.write_bloom,
    "falcon": tiny_models.write_falcon,
    "qwen3": architectures.write_qwen3,
    "gemma3": architectures.write_gemma3,
    "gpt_oss": architectures.write_gpt_oss,
    "qwen3moe": architectures.write_qwen3moe,
}
STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], LowModel]]:
    folder = tmp_path_factory.mktemp("company")
    loaded: dict[str, LowModel] = {}

    def get(arch: str) -> LowModel:
        if arch not in loaded:
            quantize(WRITERS[arch](folder / f"{arch}.gguf"), folder / f"{arch}-agq4.gguf", options=QUICK)
            loaded[arch] = LowModel(folder / f"{arch}-agq4.gguf")
        return loaded[arch]

    yield get
    for m in loaded.values():
        m.close()


def tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(300, 420, n).tolist()


def context(model: LowModel, **how: object) -> LowContext:
    return model.context(None, n_ctx=1024, n_batch=512, n_ubatch=512, n_seq=4, **how)


def alone(model: LowModel, prompt: list[int], **how: object) -> np.ndarray:
    """Logits of the prompt's last token and of some tokens behind it."""
    with context(model, **how) as c:
        found = [c.decode(prompt)]
        found += [c.decode([310 + i], len(prompt) + i) for i in range(STEPS)]
    return np.concatenate(found)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", WRITERS)
def test_beside_others(model: Callable[[str], LowModel], arch: str, flash: bool) -> None:
    """The prompt comes in one batch with tokens of others; then all generate side by side, in changing order."""
    m, prompt, others = model(arch), tokens(70, 0), {1: tokens(40, 1), 2: tokens(61, 2), 3: tokens(7, 3)}
    wanted = alone(m, prompt, flash=flash)
    with context(m, flash=flash) as c:
        for sequence, other in others.items():
            c.run(other, sequence=sequence)
        length = {sequence: len(other) for sequence, other in others.items()}
        at = [*length.values(), *range(len(prompt))]
        sequences = [[1], [2], [3], *[[0]] * len(prompt)]
        batch = [320, 321, 322, *prompt]
        found = [c.decode(batch, positions=at, sequence=sequences)]
        for step in range(STEPS):
            rows = [(330 + s, length[s] + 1 + step, s) for s in others]
            rows.insert(step % 4, (310 + step, len(prompt) + step, 0))
            ids, at, numbers = map(list, zip(*rows, strict=True))
            logits = c.decode(ids, positions=at, sequence=[[n] for n in numbers], outputs=range(4))
            found.append(logits[step % 4 : step % 4 + 1])
    if arch == "gpt_oss":  # stock ggml's product with the router, in F32, sums in another order for several tokens
        np.testing.assert_allclose(np.concatenate(found), wanted, atol=1e-5)
    else:
        np.testing.assert_array_equal(np.concatenate(found), wanted)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "bloom", "gemma3"])
@pytest.mark.parametrize("unified", [False, True])
def test_after_others(model: Callable[[str], LowModel], arch: str, unified: bool) -> None:
    """Cells that others left behind, and cells between those of a sequence that still runs."""
    m, prompt = model(arch), tokens(90, 4)
    wanted = alone(m, prompt, unified=unified)
    with context(m, unified=unified) as c:
        c.run(tokens(75, 5), sequence=0)
        c.run(tokens(50, 6), sequence=1)
        api.llama_memory_seq_rm(c.memory, 0, -1, -1)
        c.run(tokens(30, 7), 50, sequence=1)
        found = [c.decode(prompt)]
        for i in range(STEPS):
            c.run([400 + i], 80 + i, sequence=1)
            found.append(c.decode([310 + i], len(prompt) + i))
    np.testing.assert_array_equal(np.concatenate(found), wanted)


def test_threads_do_not_matter(model: Callable[[str], LowModel]) -> None:
    prompt = tokens(200, 8)
    np.testing.assert_array_equal(alone(model("qwen2"), prompt, threads=1), alone(model("qwen2"), prompt, threads=2))
