"""Reads a Hugging Face checkpoint folder: config.json, and one tensor at a time from safetensors or PyTorch files.

The folder is untrusted. Sizes are checked before use, and an index may only name files inside the folder. PyTorch files
are pickles; they are loaded without running code, unless the user allows it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Protocol

import torch

from agq_gguf.errors import InputError, missing_package
from agq_gguf.gguf_io.kinds import LFS_POINTER, what_it_is

_FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_MAX_POINTER = 1024  # bytes
_MAX_JSON = 1 << 30  # bytes; the largest tokenizer.json has about 50 MB
# Files of weights, best first: safetensors files run no code and can be mapped.
_LAYOUTS = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises InputError if it is missing or not JSON."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise InputError(f"{path}: a JSON file must have at most {_MAX_JSON} bytes, got {path.stat().st_size}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not a JSON file: {e}") from e


def read_object(path: Path) -> dict[str, Any]:
    """Like `read_json`, for files that must hold a JSON object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found


class Config:
    """The content of config.json, with checked types. `path` is for messages."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def get(self, key: str, default: Any = None) -> Any:
        """The unchecked value; null means missing."""
        found = self.values.get(key)
        return default if found is None else found

    def _first(self, keys: tuple[str, ...]) -> Any:
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def size(self, *keys: str, default: int | None = None, most: int = 1 << 24) -> int:
        """A positive integer of at most `most`, under one of the keys (older names last).

        Raises InputError for other values.
        """
        found = self._first(keys)
        if found is None:
            found = default
        if found is None:
            raise InputError(f"{self.path}: has no {keys[0]}")
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= most:
            raise InputError(f"{self.path}: {keys[0]} must be a number from 1 to {most}, got {found!r}")
        return found

    def number(self, *keys: str, default: float | None = None) -> float:
        """A positive, finite number under one of the keys. Raises InputError for other values."""
        found = self._first(keys)
        if found is None:
            found = default
        if found is None:
            raise InputError(f"{self.path}: has no {keys[0]}")
        if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 < found < float("inf"):
            raise InputError(f"{self.path}: {keys[0]} must be a positive number, got {found!r}")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises InputError for other values."""
        found = self.get(key, default)
        if not isinstance(found, bool):
            raise InputError(f"{self.path}: {key} must be true or false, got {found!r}")
        return found

    def require(self, key: str, wanted: Any, default: Any, why: str) -> None:
        """Raises InputError unless the value (or its default) is the one that llama.cpp's graph computes."""
        found = self.get(key, default)
        if found != wanted:
            raise InputError(f"{self.path}: {key} must be {wanted!r}, got {found!r} ({why})")


def read_config(folder: Path) -> Config:
    """Reads config.json. Raises InputError if the folder or the file is missing or not JSON."""
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give a Hugging Face checkpoint folder with config.json and weights")
    _refuse_pointers(folder)
    return Config(read_object(folder / "config.json"), folder / "config.json")


def _refuse_pointers(folder: Path) -> None:
    """Raises InputError if a file of the folder was not downloaded, but only its Git LFS pointer."""
    for path in sorted(folder.iterdir()):
        try:
            small = path.is_file() and path.stat().st_size < _MAX_POINTER
            head = path.read_bytes() if small else b""
        except OSError:
            continue  # whoever needs the file says what is wrong with it
        if head.startswith(LFS_POINTER):
            raise InputError(f"{path}: is {what_it_is(head, len(head))}")


class Weights(Protocol):
    """Float tensors by name; shapes are () for tensors that are not plain floats."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises InputError."""


class _File(Protocol):
    """One file of weights."""

    def shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Shapes by name, and whether the tensor holds plain floats."""

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""

    def release(self) -> None:
        """Frees the file's memory; the next call reads the file again."""


class _SafetensorsFile:
    def __init__(self, path: Path, stack: ExitStack) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as e:
            raise missing_package("this checkpoint", e, "convert") from e
        self._path, self._error = path, SafetensorError
        try:
            self._file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError, ValueError) as e:
            raise InputError(f"{path}: not a readable safetensors file: {e}") from e

    def shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        parts = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118  # not a dict
        floats = ("F32", "F16", "BF16", "F64")
        return {name: (tuple(part.get_shape()), part.get_dtype() in floats) for name, part in parts.items()}

    def load(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except (OSError, self._error) as e:
            raise InputError(f"{self._path}: tensor {name} cannot be read: {e}") from e

    def release(self) -> None:
        pass  # holds no memory


class _PytorchFile:
    def __init__(self, path: Path, allow_pickle: bool) -> None:
        self._path, self._allow = path, allow_pickle
        self._tensors: dict[str, torch.Tensor] | None = None
        self._mapped = False

    def _open(self) -> dict[str, torch.Tensor]:
        if self._tensors is None:
            self._tensors = self._read()
        return self._tensors

    def _read(self) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": not self._allow}
        try:
            with self._path.open("rb") as file:
                self._mapped = file.read(4) == b"PK\x03\x04"  # what torch has written since 1.6
            found = torch.load(self._path, mmap=self._mapped, **options)
        except OSError as e:
            raise InputError(f"{self._path}: cannot be read: {e.strerror or e}") from e
        except Exception as e:  # damaged or hostile pickles raise exceptions of many types
            cure = "" if self._allow else "; if it holds more than tensors and you trust its author, use --allow-pickle"
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise InputError(f"{self._path}: PyTorch cannot load it safely: {reason}{cure}") from e
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        if not isinstance(found, dict):
            raise InputError(f"{self._path}: must hold a dictionary of tensors, got {type(found).__name__}")
        return {str(k): v.detach() for k, v in found.items() if isinstance(v, torch.Tensor)}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        return {
            name: (tuple(tensor.shape), tensor.dtype in _FLOATS and tensor.layout == torch.strided)
            for name, tensor in self._open().items()
        }

    def load(self, name: str) -> torch.Tensor:
        return self._open()[name]

    def release(self) -> None:
        if not self._mapped:
            self._tensors = None


class Checkpoint:
    """The weights of a checkpoint folder; a context manager.

    `shapes` maps the name of each tensor to its shape, or to () if the tensor does not hold plain floats; `sizes` maps
    all names to shapes.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        """Opens all files. Raises InputError if one is missing, damaged or outside the folder."""
        self.folder = folder
        self._stack = ExitStack()
        try:
            self._files = self._open(allow_pickle)
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.sizes: dict[str, tuple[int, ...]] = {}
            self._file_of: dict[str, _File] = {}
            self._last: _File | None = None
            for file in self._files:
                for name, (shape, floats) in file.shapes().items():
                    self.shapes[name] = shape if floats else ()  # an error if the plan needs this tensor
                    self.sizes[name] = shape
                    self._file_of[name] = file
                file.release()
        except BaseException:
            self._stack.close()
            raise

    def _open(self, allow_pickle: bool) -> list[_File]:
        for single in _LAYOUTS:
            index = self.folder / f"{single}.index.json"
            if index.is_file():
                names = self._indexed(index)
            elif (self.folder / single).is_file():
                names = [single]
            else:
                continue
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise InputError(
                    f"{index}: {len(missing)} of {len(names)} files are missing ({', '.join(missing[:3])}); "
                    "download the checkpoint again"
                )
            if single.endswith(".bin"):
                return [_PytorchFile(self.folder / name, allow_pickle) for name in names]
            return [_SafetensorsFile(self.folder / name, self._stack) for name in names]
        raise InputError(
            f"{self.folder}: has no weights; expected model.safetensors or pytorch_model.bin, or parts of one of them "
            "with an .index.json"
        )

    def _indexed(self, index: Path) -> list[str]:
        """The files that an index names; raises InputError for names outside the folder."""
        table = read_object(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise InputError(f"{index}: has no weight_map")
        names = list(dict.fromkeys(table.values()))
        for name in names:
            # Only the name is checked: in the cache of huggingface_hub the files are links to other folders.
            if not isinstance(name, str) or not _is_plain_name(name):
                raise InputError(f"{index}: names the file {name!r}, which is not a file of this folder")
        return names

    def load(self, name: str) -> torch.Tensor:
        """One tensor in its own type. Raises InputError."""
        file = self._file_of[name]
        if self._last is not None and self._last is not file:
            self._last.release()
        self._last = file
        return file.load(name)

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()
        self._files = []
        self._file_of = {}

    def __enter__(self) -> Checkpoint:
        """Returns the checkpoint, which is already open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        """Closes the files."""
        self.close()


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and name == PurePosixPath(name).name == PureWindowsPath(name).name


def folder_name(folder: Path) -> str:
    """A name for the model: that of its folder."""
    return folder.absolute().name or folder.resolve().name or "model"
