"""Checkpoint folders as a source: a float GGUF for the time of the quantization."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agq_gguf.arguments import PathName, Progress
from agq_gguf.errors import InputError, OutputError
from agq_gguf.gguf_io.writer import check_writable
from agq_gguf.import_hf import FAMILIES, converter, import_checkpoint, weights_of
from agq_gguf.import_hf.checkpoint import Checkpoint, Config, read_config
from agq_gguf.import_hf.packed import Scheme, Unpacked, scheme_of
from agq_gguf.quantization.options import QuantizeOptions


@contextmanager
def as_gguf(
    src: PathName, dst: PathName, options: QuantizeOptions, progress: Progress
) -> Iterator[tuple[Path, list[str]]]:
    """The GGUF file to quantize, with warnings: `src`, or one that is made of a checkpoint folder and removed later.

    It is made in a folder beside `dst`, or is `options.keep_float`, which stays. Raises InputError, and OutputError if
    it does not fit on the disk.
    """
    folder = Path(src)
    if not folder.is_dir():
        yield folder, []
        return
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: is a folder without config.json, so it is no Hugging Face checkpoint; give a GGUF file, or the "
            "folder of a checkpoint"
        )
    config = read_config(folder)
    scheme = scheme_of(config, folder)
    if scheme is not None and not options.allow_requantize:
        raise InputError(
            f"{config.path}: the weights are already quantized ({scheme}); start from the float checkpoint, or use "
            "--allow-requantize, which loses quality"
        )
    check_writable(dst)
    wanted = Path(options.keep_float or dst)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=f".{wanted.name[:40]}.", suffix=".import", dir=wanted.parent)
    except OSError as e:
        raise OutputError(f"{wanted}: cannot write there: {e.strerror}") from e
    with scratch as inside:
        made = Path(inside) / "float.gguf"
        warnings = _make(folder, config, scheme, made, options, progress)
        if options.keep_float:
            made = made.replace(wanted)
        yield made, warnings


def _make(
    folder: Path, config: Config, scheme: Scheme | None, made: Path, options: QuantizeOptions, progress: Progress
) -> list[str]:
    """Writes the float GGUF; returns warnings."""
    named = config.get("architectures", [])
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "(not named)"
    known = architecture in FAMILIES
    script = None if known else converter.find(options.converter, f"{config.path}: {architecture}")
    with Checkpoint(folder) as files:
        weights = weights_of(files, scheme)
        n_bytes = 2 * sum(math.prod(shape) for shape in weights.shapes.values())
        copies = 1 if known or scheme is None else 2
        free = shutil.disk_usage(made.parent).free
        if free < copies * n_bytes:
            raise OutputError(
                f"{made.parent}: a float file of the checkpoint needs {copies * n_bytes} bytes, {free} are free there; "
                "make room, or name a place with --keep-float"
            )
        progress("import", 0, 1, f"a float file of {n_bytes >> 20} MiB in {made.parent}")
        source = folder
        if isinstance(weights, Unpacked) and not known:
            source = made.parent / folder.absolute().name
            converter.write_floats(weights, source)
    warnings = []
    if scheme is not None:
        warnings.append(
            f"the checkpoint is quantized already ({scheme}): its errors stay in the weights; the float "
            "checkpoint gives a better result"
        )
    if script is not None:
        converter.convert(script, source, made)
        return warnings
    outtype = "bf16" if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else "f16"
    return warnings + import_checkpoint(folder, made, outtype=outtype, progress=progress).warnings
