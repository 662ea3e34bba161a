"""Whatever happens while a model is made: the target is complete and verified, or it is not there."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import environment, heeding_interrupts, run

from agq_gguf.errors import EditedError, FormatError, InputError, OutputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.inspection.verify import verify
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize

OPTIONS = QuantizeOptions(threads=1, matrix=MatrixOptions(learn_codebook=False))


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    return tiny_models.write_llama(models / "faults.gguf")


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Path:
    quantize(source, tmp_path / "made.gguf", options=OPTIONS)
    return tmp_path / "made.gguf"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# verify


def test_a_whole_model_is_verified(made: Path) -> None:
    found = verify(made)
    with open_gguf(made) as reader:
        assert found.problems == [] and found.tensors == len(reader.tensors) > 10
    assert "whole" in run("verify", made).stdout


def test_every_flipped_byte_is_found(made: Path) -> None:
    """One byte in each tensor, in a metadata key and value, in a tensor's shape."""
    original = made.read_bytes()
    with open_gguf(made) as reader:
        places = {tensor.name: tensor.offset + tensor.n_bytes // 2 for tensor in reader.tensors.values()}
        first = next(iter(reader.tensors.values()))
    for name, at in places.items():
        made.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        assert verify(made).problems == [f"tensor {name}: its bytes are not the ones that were written"]
    names_at = original.index(first.name.encode())
    rope = original.index(b"llama.rope.freq_base")
    for at in (rope, rope + 24, original.index(b"general.name") + 26, names_at):
        made.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        assert verify(made).problems == ["the metadata was edited"] and verify(made).only_edited


def test_what_verify_says_of_a_changed_model(made: Path) -> None:
    """Damage and edited metadata have exit codes of their own; damage is worse."""
    original = made.read_bytes()
    with open_gguf(made) as reader:
        weight, n = reader.tensors["blk.0.ffn_up.weight"].offset, len(reader.tensors)
    renamed = original.replace(b"tiny random", b"tiny Random")
    damaged = original[:weight] + bytes([original[weight] ^ 1]) + original[weight + 1 :]
    both = renamed[:weight] + damaged[weight:]

    made.write_bytes(renamed)
    edited = run("verify", made, "-q", code=EditedError.exit_code)
    assert f"made.gguf: the metadata was edited; all {n} tensors are intact" in edited.stderr
    assert "damaged" not in edited.stderr and edited.stdout == ""
    found = json.loads(run("verify", made, "--json", code=EditedError.exit_code).stdout)
    assert found["metadata_edited"] and found["problems"] == ["the metadata was edited"]

    made.write_bytes(damaged)
    worse = run("verify", made, "-q", code=FormatError.exit_code).stderr
    assert "made.gguf: damaged (1 problems)" in worse and "edited" not in worse
    found = json.loads(run("verify", made, "--json", code=FormatError.exit_code).stdout)
    assert not found["metadata_edited"] and len(found["problems"]) == 1

    made.write_bytes(both)
    assert "made.gguf: damaged (2 problems)" in run("verify", made, "-q", code=FormatError.exit_code).stderr


def test_checksums_of_attributes_count_too(made: Path, tmp_path: Path) -> None:
    """Digests that were made of damaged bytes, as a broken tool might."""
    with open_gguf(made) as reader:
        damaged = {name: bytearray(reader.raw(name)) for name in reader.tensors}
        damaged["blk.0.ffn_up.weight"][48] ^= 1  # the first attribute byte
        placed = layout((t.name, t.type_name, t.shape) for t in reader.tensors.values())
        with Writer(tmp_path / "damaged.gguf", reader.metadata, {}, placed) as writer:
            for name, data in damaged.items():
                writer.write(name, [memoryview(data)])
    problems = verify(tmp_path / "damaged.gguf").problems
    assert len(problems) == 1 and "blk.0.ffn_up.weight: the attributes must begin with" in problems[0]


def test_files_without_digests_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no digests"):
        verify(source)
    assert "no digests" in run("verify", source, code=InputError.exit_code).stderr


# faults


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from agq_gguf import QuantizeOptions, quantize
from agq_gguf.errors import InputError
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.inspection.verify import verify

source, folder, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
options = QuantizeOptions(threads=1, split_size=size, matrix=MatrixOptions(learn_codebook=False))
target = quantize(source, folder / "out.gguf", options=options).paths[0]  # also: nothing is imported later
begun = time.monotonic()
quantize(source, folder / "out.gguf", options=options)
took = time.monotonic() - begun
choose, killed, left, tries = random.Random(5), 0, 0, 0
while tries < 8 or (killed < 4 or left < 2) and tries < 40:
    tries += 1
    if tries % 2 == 0:
        target.unlink(missing_ok=True)  # half of them replace an older file
    child = os.fork()
    if child == 0:
        quantize(source, folder / "out.gguf", options=options)
        os._exit(0)
    time.sleep(choose.uniform(0.2, 1.05) * took)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] != 0:
        killed += 1
    else:
        took *= 0.8  # on a busy machine one run says little of the next
    left += any(folder.glob(".*.part"))
    if target.exists():
        assert verify(target).problems == []
quantize(source, folder / "out.gguf", options=options)
assert verify(target).problems == []
print(killed, left, *sorted(p.name for p in folder.iterdir()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("size", [0, 100_000])
def test_killed_at_any_time(source: Path, tmp_path: Path, size: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path), str(size)],
        capture_output=True, text=True, timeout=300, check=False, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    killed, left, *found = result.stdout.split()
    assert int(killed) >= 4 and int(left) >= 2, result.stdout  # it was really killed amid its work
    assert all(name.startswith("out") for name in found), found  # the last try removed what the killed ones left


LIMITED = """
import resource, sys
from agq_gguf.cli import app as cli
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
sys.argv = ["agq-gguf", "quantize", *sys.argv[1:]]
try:
    cli.main()
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # coverage also writes a file, at the end
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_limit_on_file_size(source: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "out.gguf"), "-t", "1", "--calibration", "none"],
        capture_output=True, text=True, timeout=120, check=False, env=environment(),
    )  # fmt: skip
    assert result.returncode == OutputError.exit_code, result.stderr
    assert "File too large" in result.stderr and "Traceback" not in result.stderr
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "agq-test", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_is_too_small(source: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(900_000))
    with pytest.raises(OutputError, match=r"\d+ bytes are needed, \d+ are free"):
        quantize(source, small_disk / "out.gguf", options=OPTIONS)
    assert names(small_disk) == ["other"]


def test_disk_fills_meanwhile(source: Path, small_disk: Path) -> None:
    def fill(*_: object) -> None:
        with (small_disk / "other").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    with pytest.raises(OutputError, match="No space left"):
        quantize(source, small_disk / "out.gguf", options=OPTIONS, progress=fill)
    assert names(small_disk) == ["other"]


class FailingDisk(io.FileIO):
    """Gives the header and then an error."""

    reads = 0

    def readinto(self, buffer: Any) -> int:
        type(self).reads += 1
        if type(self).reads > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


def test_read_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def open_failing(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return FailingDisk(self) if self == source and mode == "rb" else opened(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", open_failing)
    with pytest.raises(InputError, match=r"tensor \S+ cannot be read: Input/output error"):
        quantize(source, tmp_path / "out.gguf", options=OPTIONS)
    assert FailingDisk.reads > 5 and names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncate", "is cut off"), ("write", "was changed while it was read"),
        ("replace", "was changed while it was read"), ("remove", "was removed while it was read"),
    ],
)  # fmt: skip
def test_source_changes_under_us(source: Path, tmp_path: Path, change: str, message: str) -> None:
    model = tmp_path / "in.gguf"
    model.write_bytes(source.read_bytes())

    def meddle(phase: str, done: int, *_: object) -> None:
        if not 0 < done < 150_000 or not model.exists():
            return
        if change == "truncate":
            os.truncate(model, 100_000)
        elif change == "write":
            with model.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\1")
        elif change == "replace":
            (tmp_path / "new").write_bytes(source.read_bytes())
            (tmp_path / "new").replace(model)
        else:
            model.unlink()

    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        quantize(model, tmp_path / "out" / "out.gguf", options=OPTIONS, progress=meddle)
    assert names(tmp_path / "out") == []


def test_unwritable_targets(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "file").write_bytes(b"")
    targets = [tmp_path / "folder.gguf", tmp_path / "file" / "out.gguf", tmp_path / ("x" * 300)]
    if sys.platform == "linux":
        targets.append(Path("/proc/out.gguf"))
    for target in targets:
        with pytest.raises(OutputError, match=r"cannot write there|is a folder"):
            quantize(source, target, options=OPTIONS)
    assert names(tmp_path) == ["file", "folder.gguf"]
    quantize(source, tmp_path / ("x" * 250), options=OPTIONS)


def test_two_at_once_do_not_disturb_each_other(source: Path, tmp_path: Path) -> None:
    """A living process keeps its temporary file; the one that ends last wins."""
    placed = layout([("a", "f32", (4,))])
    import numpy as np

    with Writer(tmp_path / "o", {}, {}, placed) as first:
        with Writer(tmp_path / "o", {}, {}, placed) as second:
            assert len(names(tmp_path)) == 2
            second.write("a", [np.ones(4, np.float32)])
        first.write("a", [np.zeros(4, np.float32)])
    with open_gguf(tmp_path / "o") as reader:
        assert not reader.read("a").any()
    assert names(tmp_path) == ["o"] and verify(tmp_path / "o").problems == []


def test_interrupt_signal_removes_temporary_files(source: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom agq_gguf import quantize\nfrom agq_gguf.errors import OutputError\n"
        "def stop(phase, done, *rest):\n    if done: os.kill(os.getpid(), signal.SIGINT)\n"
        "quantize(sys.argv[1], sys.argv[2], progress=stop)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out.gguf")],
        capture_output=True, text=True, timeout=120, check=False, env=environment(), preexec_fn=heeding_interrupts,
    )  # fmt: skip
    assert result.returncode == -signal.SIGINT and names(tmp_path) == []
