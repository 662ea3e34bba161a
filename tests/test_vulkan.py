"""Programs of llama.cpp with a Vulkan device: experts in AGQ4 on the CPU, the rest on the device, give the same text.

    AGQ_VULKAN_PROGRAM=build/bin/llama-completion pytest --slow tests/test_vulkan.py

The program is a llama-completion built with -DGGML_VULKAN=ON. Mesa's software device is enough (Debian's package
mesa-vulkan-drivers). CI does not build such a program; docs/gpu.md says when this test ran last.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import tiny_models
from low_level import QUICK

import agq_gguf
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.quantization.pipeline import quantize

PROGRAM = os.environ.get("AGQ_VULKAN_PROGRAM", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="AGQ_VULKAN_PROGRAM is not set: a llama-completion built with Vulkan"),
]

SET_UPS = [
    ("-ngl", "0"),
    ("-ngl", "2"),
    ("-ngl", "99"),
    ("-ngl", "99", "--no-kv-offload"),
    ("-ngl", "99", "-ot", "exps=CPU"),
    ("-ngl", "99", "--cpu-moe"),
    ("-ngl", "99", "--cpu-moe", "--no-op-offload"),
    ("-ngl", "99", "--cpu-moe", "-fa", "on"),
]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with experts in AGQ4 and everything else as it was, in a type that the device knows."""
    folder = tmp_path_factory.mktemp("vulkan")
    source = tiny_models.write_llama(folder / "f16.gguf", n_expert=4, n_expert_used=2, n_layer=3, seed=5)
    quantize(source, folder / "agq4.gguf", options=QUICK)
    with open_gguf(source) as plain, open_gguf(folder / "agq4.gguf") as ours:
        origins = {name: ours if "_exps" in name else plain for name in plain.tensors}
        placed = [(n, origin.tensors[n].type_name, origin.tensors[n].shape) for n, origin in origins.items()]
        with Writer(folder / "hybrid.gguf", ours.metadata, {}, layout(placed)) as writer:
            for name, origin in origins.items():
                writer.write(name, [origin.raw(name)])
    return folder / "hybrid.gguf"


def run(model: Path, plugin: bool, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the program, which prints a text and a log."""
    # Without the first variable llama.cpp passes over devices that are CPUs, as Mesa's software device is.
    variables = {"GGML_VK_VISIBLE_DEVICES": "0", **os.environ}
    if plugin:
        variables["LD_PRELOAD"] = str(agq_gguf.backend_path())
    return subprocess.run(
        [PROGRAM, "-m", str(model), "-p", "the red key in the box and the blue door", "-n", "24", "--temp", "0",
         "-no-cnv", "-t", "1", "-v", *options],
        capture_output=True, text=True, errors="replace", timeout=300, check=False, stdin=subprocess.DEVNULL,
        env=variables,
    )  # fmt: skip


@pytest.mark.parametrize("set_up", SET_UPS, ids=" ".join)
def test_the_text_is_that_of_the_cpu(hybrid: Path, set_up: tuple[str, ...]) -> None:
    # The float model with its experts on the CPU is laid out alike: the plugin has no part in its crash.
    stock = run(hybrid.with_name("f16.gguf"), False, *set_up, *(() if set_up[1] == "0" else ("--cpu-moe",)))
    if stock.returncode < 0:
        pytest.skip(f"the program ends with signal {-stock.returncode} without the plugin, too")
    wanted, found = run(hybrid, True, "--device", "none"), run(hybrid, True, *set_up)
    assert wanted.returncode == found.returncode == 0, found.stderr[-3000:]
    prompt = "the red key in the box and the blue door"
    assert len(wanted.stdout.strip()) > len(prompt) + 20
    # The device rounds otherwise, so a late token of this random model may fall the other way.
    sure = len(prompt) + 12
    assert found.stdout[:sure] == wanted.stdout[:sure]
    if set_up[1] != "0":
        assert "Vulkan0 model buffer size" in found.stderr  # the device really had a part of the model
