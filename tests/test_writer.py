from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
import pytest
import tiny_models

from agq_gguf.errors import OutputError
from agq_gguf.gguf_io.reader import Reader, open_gguf
from agq_gguf.gguf_io.writer import ALIGNMENT, Writer, _File, check_writable, layout

TENSORS = [("a", "f32", (3, 5)), ("b", "q8_0", (2, 32)), ("c", "f16", (7,)), ("d", "agq4", (16, 512))]
DATA: dict[str, np.ndarray] = {
    "a": np.arange(15, dtype=np.float32).reshape(3, 5),
    "b": np.arange(68, dtype=np.uint8).reshape(2, 34),
    "c": np.arange(7, dtype=np.float16),
    "d": np.arange(4352, dtype=np.uint16).astype(np.uint8).reshape(16, 272),
}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Reader]:
    with open_gguf(tiny_models.write_llama(tmp_path / "source.gguf", n_layer=1)) as reader:
        yield reader


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_in_any_order(tmp_path: Path, source: Reader) -> None:
    path = tmp_path / "out.gguf"
    with Writer(path, source.metadata, {"agq.version": 1, "general.file_type": 138}, layout(TENSORS)) as writer:
        for name in ("c", "a", "d", "b"):
            writer.write(name, [DATA[name]])
        assert not path.exists()
    assert path.stat().st_size == writer.n_bytes
    with open_gguf(path) as out:
        assert list(out.tensors) == ["a", "b", "c", "d"]
        for name, data in DATA.items():
            assert bytes(out.raw(name)) == data.tobytes()
            assert out.tensors[name].offset % ALIGNMENT == 0
        changed = {"general.file_type": 138, "agq.version": 1, "general.alignment": 64}
        for key, field in source.metadata.items():
            if key not in changed:
                assert out.metadata[key].raw == field.raw, key
        assert {key: out.get(key) for key in changed} == changed
        assert list(out.metadata)[: len(source.metadata)] == list(source.metadata)
    theirs = gguf.GGUFReader(path)
    assert [t.name for t in theirs.tensors] == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(theirs.tensors[0].data, DATA["a"])


def test_files_without_agq4_are_as_stock_tools_want_them(tmp_path: Path, source: Reader) -> None:
    """llama-quantize pads tensors to 32 bytes whatever the metadata say."""
    first, second = tmp_path / "aligned.gguf", tmp_path / "plain.gguf"
    for before, path, tensors in ((None, first, TENSORS), (first, second, TENSORS[:3])):
        with ExitStack() as stack:
            given = source if before is None else stack.enter_context(open_gguf(before))
            with Writer(path, given.metadata, {}, layout(tensors)) as writer:
                for name, *_ in tensors:
                    writer.write(name, [DATA[name]])
    with open_gguf(first) as aligned, open_gguf(second) as plain:
        assert aligned.get("general.alignment") == 64 and plain.get("general.alignment") is None
        for reader, places in ((plain, [0, 64, 160]), (aligned, [0, 64, 192, 256])):
            assert [t.offset - reader.tensors["a"].offset for t in reader.tensors.values()] == places


def test_odd_metadata_is_kept(tmp_path: Path) -> None:
    """Empty strings and arrays, 64-bit numbers: what gguf's own writer drops or widens."""
    source = gguf.GGUFWriter(tmp_path / "in", "llama")
    source.add_key_value("x.empty", "", gguf.GGUFValueType.STRING)
    source.add_uint64("x.u64", 2**63)
    source.add_int8("x.i8", -3)
    source.add_float64("x.f64", 0.1)
    source.add_array("x.array", [1.5, 2.5])
    source.add_array("x.text", ["", "ü"])
    source.write_header_to_file()
    source.write_kv_data_to_file()
    source.write_ti_data_to_file()
    source.close()
    with open_gguf(tmp_path / "in") as before:
        with Writer(tmp_path / "out", before.metadata, {}, []):
            pass
        with open_gguf(tmp_path / "out") as after:
            assert {k: v.raw for k, v in before.metadata.items()}.items() <= {
                k: v.raw for k, v in after.metadata.items()
            }.items()
            assert after.get("x.empty") == "" and after.get("x.text") == ["", "ü"]


def test_target_survives_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), Writer(path, {}, {}, layout(TENSORS)) as writer:
        writer.write("a", [DATA["a"][:1], DATA["a"][1:]])
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and files(tmp_path) == ["out.gguf"]


def test_missing_tensor_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"without data: \['b', 'c', 'd'\]"),
        Writer(tmp_path / "o", {}, {}, layout(TENSORS)) as w,
    ):
        w.write("a", [DATA["a"]])
    with pytest.raises(ValueError, match="68"), Writer(tmp_path / "o", {}, {}, layout(TENSORS)) as w:
        w.write("b", [DATA["a"]])
    assert files(tmp_path) == []


@pytest.mark.parametrize("where", ["_write", "fsync", "truncate", "replace"])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "_write":
        original = _File.write
        monkeypatch.setattr(_File, "write", lambda self, at, data: full() if at > 200 else original(self, at, data))
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif where == "truncate":
        monkeypatch.setattr(os, "ftruncate", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"), Writer(tmp_path / "o", {}, {}, layout(TENSORS)) as writer:
        for name, data in DATA.items():
            writer.write(name, [data])
    assert files(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own refusal, which arrives when buffers are flushed."""
    original = Path.open

    def to_full(self: Path, *args: str) -> IO[Any]:
        original(self, "xb").close()
        return original(Path("/dev/full"), "wb")

    monkeypatch.setattr(Path, "open", to_full)
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)
    with pytest.raises(OutputError, match="No space left"), Writer(tmp_path / "o", {}, {}, layout(TENSORS)) as writer:
        for name, data in DATA.items():
            writer.write(name, [data])
    assert files(tmp_path) == []


def test_impossible_targets(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write there: No such file"):
        Writer(tmp_path / "no" / "o", {}, {}, [])
    with pytest.raises(OutputError, match="is a folder"):
        Writer(tmp_path, {}, {}, [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe: exists and is not a regular file"):
        Writer(tmp_path / "pipe", {}, {}, [])
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with Writer(tmp_path / "o", {}, {}, []):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "o")]
    assert modes[0] == modes[1]


def test_links_are_written_through(tmp_path: Path, source: Reader) -> None:
    """OUT as a symbolic link: the file it names is replaced, and the link stays."""
    (tmp_path / "there").mkdir()
    real = tmp_path / "there" / "model.gguf"
    real.write_bytes(b"old")
    link, chain = tmp_path / "link.gguf", tmp_path / "chain.gguf"
    link.symlink_to(real)
    chain.symlink_to(link)
    with Writer(chain, source.metadata, {}, layout(TENSORS)) as writer:
        for name, data in DATA.items():
            writer.write(name, [data])
    assert chain.is_symlink() and link.is_symlink()
    with open_gguf(real) as out:
        assert list(out.tensors) == list(DATA)
    assert files(tmp_path / "there") == ["model.gguf"]
    circle = tmp_path / "circle.gguf"
    circle.symlink_to(circle)
    with pytest.raises(OutputError):
        Writer(circle, {}, {}, layout(TENSORS))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a folder where nothing can be made")
def test_a_folder_where_nothing_can_be_written() -> None:
    with pytest.raises(OutputError, match="cannot write there"):
        check_writable("/proc/self/fd/model.gguf")
