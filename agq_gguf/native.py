"""Finds the plugin library and declares the C functions of it that Python calls."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from agq_gguf.errors import HostError

_SUFFIX = {"win32": ".dll", "darwin": ".so"}.get(sys.platform, ".so")
_FILE_NAME = f"libggml-agq{_SUFFIX}"


def backend_path() -> Path:
    """Path of the plugin library, for ``GGML_BACKEND_PATH``.

    Raises HostError if it is not there, which means that the package was not built.
    """
    candidates = [Path(__file__).parent / _FILE_NAME]
    try:
        # An editable install keeps the sources in place and the built library in site-packages.
        files = metadata.distribution("agq-gguf").files or []
        candidates += [Path(str(f.locate())) for f in files if f.name == _FILE_NAME]
    except metadata.PackageNotFoundError:
        pass
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise HostError(f"the plugin library {_FILE_NAME} is not built; install the package with pip install .")
