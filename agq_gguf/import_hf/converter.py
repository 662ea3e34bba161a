"""Checkpoints of every architecture: runs llama.cpp's own converter, convert_hf_to_gguf.py, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from agq_gguf.errors import InputError, missing_package
from agq_gguf.import_hf.checkpoint import read_json, read_object
from agq_gguf.import_hf.packed import Unpacked

NAME = "convert_hf_to_gguf.py"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # the checkpoint is complete
_FILE_BYTES = 1 << 31  # of weights that are in memory at one time
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def find(named: str, architecture: str) -> Path:
    """The converter: `named`, which may be its folder, or AGQ_CONVERTER, or one on PATH or installed in this Python.

    Raises InputError if there is none.
    """
    for origin, value in (("--converter", named), ("AGQ_CONVERTER", os.environ.get("AGQ_CONVERTER", ""))):
        if value:
            path = Path(value) / NAME if Path(value).is_dir() else Path(value)
            if not path.is_file():
                raise InputError(f"{path}: there is no such file, but {origin} names it; give the path of {NAME}")
            return path
    on_path = shutil.which(NAME)
    if on_path:
        return Path(on_path)
    module = importlib.util.find_spec(NAME.removesuffix(".py"))
    if module is not None and module.origin:
        return Path(module.origin)
    raise InputError(
        f"{architecture} needs llama.cpp's converter, {NAME}, which was not found; it is in the source archives of "
        f"llama.cpp and of llama-cpp-python: unpack one and give the path with --converter or AGQ_CONVERTER"
    )


def convert(script: Path, folder: Path, target: Path) -> None:
    """Writes the checkpoint in `folder` as a GGUF file in F16 or BF16, whichever the checkpoint has.

    Raises InputError with the converter's last words, HostError if a package that it needs is missing.
    """
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_object(settings).get("auto_map"):
        raise InputError(
            f"{settings}: the tokenizer is a program (auto_map), which llama.cpp's converter would run; if you trust "
            f"its author, run {NAME} yourself, and then quantize its file"
        )
    command = [sys.executable, str(script), str(folder), "--outfile", str(target), "--outtype", "auto"]
    offline = os.environ | _OFFLINE
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=offline)
    if done.returncode == 0 and target.is_file():
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {done.returncode}"
    module = re.search(r"No module named '([\w.]+)'", last)
    if module:
        raise missing_package("llama.cpp's converter", module[1].partition(".")[0], "hf")
    raise InputError(f"{folder}: {script} cannot convert it: {last[:300]}")


def write_floats(weights: Unpacked, target: Path) -> None:
    """Writes a packed checkpoint as a float one, for the converter, which knows fewer ways of packing."""
    from safetensors.torch import save_file

    target.mkdir()
    for path in weights.folder.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    config = read_json(weights.folder / "config.json")
    (target / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "quantization_config"}), "utf-8"
    )
    table: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    size = 0
    names = list(weights.shapes)
    for i, name in enumerate(names):
        tensor = weights.load(name)
        part[name] = (tensor.half() if weights.packed(name) else tensor).contiguous()
        size += tensor.nbytes
        if size >= _FILE_BYTES or i + 1 == len(names):
            file = f"model-{len(set(table.values())) + 1:05}.safetensors"
            save_file(part, target / file, metadata={"format": "pt"})
            table.update(dict.fromkeys(part, file))
            part, size = {}, 0
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}), "utf-8")
