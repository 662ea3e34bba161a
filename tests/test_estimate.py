"""What `--dry-run` tells: order and parts of it, since times depend on the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.quantization import estimate as module
from agq_gguf.quantization.estimate import estimate
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file


def test_more_work_takes_longer(llama_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_operations_per_second", lambda: 1e11)

    def told(**changes: Any) -> module.Estimate:
        options = replace(QuantizeOptions(calibration_tokens=32768), **changes)
        return estimate(plan_file(llama_f16, options), options, calibrated=True, threads=1)

    fast, balanced, best = (told(quality=quality) for quality in ("fast", "balanced", "best"))
    assert 0 < fast.seconds < balanced.seconds < best.seconds
    assert told(calibration_tokens=65536).seconds > 1.5 * balanced.seconds
    assert fast.memory_bytes < balanced.memory_bytes and fast.disk_bytes == balanced.disk_bytes > 0


def test_logits_of_the_text_take_memory(llama_f16: Path) -> None:
    options = QuantizeOptions(quality="fast")
    plans = plan_file(llama_f16, options)
    with open_gguf(llama_f16) as reader:
        vocabulary = reader.tensors["token_embd.weight"].shape[0]
    with_text, without = (estimate(plans, options, calibrated=c, threads=2).memory_bytes for c in (True, False))
    assert with_text - without == 2 * 512 * 4 * vocabulary


def test_the_speed_is_that_of_one_core() -> None:
    before = torch.get_num_threads()
    speed = module._operations_per_second()
    assert speed > 1e8 and torch.get_num_threads() == before


def test_memory_of_best(llama_f16: Path) -> None:
    """More text takes more, and `--memory` bounds all parts that grow."""

    def told(memory: int, **changes: Any) -> int:
        options = replace(QuantizeOptions(quality="best", memory=memory), **changes)
        return estimate(plan_file(llama_f16, options), options, calibrated=True, threads=1).memory_bytes

    plenty, little = 1 << 40, 64 << 20
    assert told(plenty, calibration_tokens=1 << 20) > told(plenty, calibration_tokens=1 << 14) + (1 << 30)
    assert told(little, calibration_tokens=1 << 20) < told(little, calibration_tokens=1 << 14) + 2 * little
    assert told(plenty, quality="balanced") < told(plenty)
    assert told(plenty, tune=False, calibration_tokens=512) <= told(plenty, calibration_tokens=512)
