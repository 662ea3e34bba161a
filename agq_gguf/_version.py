"""The version of the installed package."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("agq-gguf")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
