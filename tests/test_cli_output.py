"""What the command line shows: progress, tables, sizes, and nothing a terminal would obey."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import COMMAND, CONTROL, environment, run

from agq_gguf.cli import output


def test_plain_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with output.ProgressView() as view:
        for done in range(101):
            view.update("work", done, 100, "" if done == 100 else f"item {done}")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"work: 0%(, [\d.]+ [KMG]?i?B)? \(item 0\)", lines[0])
    assert [line.split("%")[0] for line in lines] == [f"work: {n}" for n in range(0, 101, 10)]
    assert re.fullmatch(r"work: 100% in 0 s(, [\d.]+ [KMG]?i?B)?", lines[-1])


def test_progress_tells_phase_layer_speed_time_and_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(output, "resident", lambda: 3 << 29)
    with output.ProgressView() as view:
        view.update("calibrate", 0, 4000, "")
        now = 110.0
        view.update("calibrate", 1000, 4000, "pass 1 of 1")
        view.update("quantize", 0, 10**9, "blk.0.attn_q.weight")
        now = 130.0
        view.update("quantize", 5 * 10**8, 10**9, "blk.3.ffn_up.weight")
    assert capsys.readouterr().err.splitlines() == [
        "calibrate: 0%, 1.50 GiB",
        "calibrate: 25%, 100 tokens/s, 30 s left, 1.50 GiB (pass 1 of 1)",
        "quantize: 0%, 1.50 GiB (layer 0, attn_q.weight)",
        "quantize: 50%, 25M weights/s, 20 s left, 1.50 GiB (layer 3, ffn_up.weight)",
    ]


def test_time_left_of_a_phase_that_begins_in_the_middle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run finished took no time in this one, so it says nothing about the rest."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(output, "resident", lambda: 0)
    with output.ProgressView() as view:
        view.update("quantize", 600, 1000, "a")
        now = 50.0
        view.update("quantize", 800, 1000, "b")
        view.update("quantize", 1000, 1000, "")
    assert [line for line in capsys.readouterr().err.splitlines() if "80%" in line or "60%" in line] == [
        "quantize: 60% (a)",
        "quantize: 80%, 4 weights/s, 50 s left (b)",
    ]


def test_sizes_for_people() -> None:
    shown = [output.size(n) for n in (0, 1023, 1024, 1536 * 1024, 3 << 30, 5 << 40)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "3.00 GiB", "5120.00 GiB"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_bars_on_a_terminal(small: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    arguments = ["bench", small, "-p", "8", "-n", "2", "-r", "2", "-t", "1"]
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=follower, stderr=follower, env=environment(TERM="xterm", COLUMNS="80")
    ) as child:
        os.close(follower)
        seen = b""
        try:
            while part := os.read(leader, 4096):
                seen += part
        except OSError:
            pass  # Linux says so when the other side is closed
        assert child.wait(60) == 0
    os.close(leader)
    assert b"\x1b[?25l" in seen and b"\x1b[?25h" in seen  # the cursor is hidden, and comes back
    assert b"100%" in seen
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode()))
    assert max(map(len, lines)) <= 80, lines


def test_names_cannot_reach_the_terminal(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "escape.gguf"
    path.write_bytes(small.read_bytes().replace(b"tiny random llama", b"tiny\x1b[31m \xff\x07[b]llama"[:17]))
    shown = run("inspect", path)
    assert not CONTROL.search(shown.output)
    assert "tiny\ufffd[31m" in shown.stdout
