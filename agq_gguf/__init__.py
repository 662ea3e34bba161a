"""Agile-Quant for GGUF: quantizes models to AGQ4 and runs them in stock llama.cpp.

Importing this package is light: it loads neither torch nor llama_cpp. If ``gguf`` is installed it learns the type AGQ4,
so that ``gguf.GGUFReader`` and ``gguf.quants.dequantize`` read our files.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from agq_gguf._version import __version__
from agq_gguf.errors import AgqError, FormatError, HostError, InputError, OutputError
from agq_gguf.integrations import gguf_package
from agq_gguf.native import backend_path
from agq_gguf.runtime.plugin import last_pruned, options, register

if TYPE_CHECKING:
    from agq_gguf.calibration.default_text import default_calibration
    from agq_gguf.calibration.imatrix import load_imatrix
    from agq_gguf.calibration.stats import InputStats, WeightStats
    from agq_gguf.import_hf import import_checkpoint
    from agq_gguf.inspection.inspect import inspect_file
    from agq_gguf.inspection.verify import verify
    from agq_gguf.matrix.options import MatrixOptions
    from agq_gguf.measure.bench import bench
    from agq_gguf.measure.embeddings import evaluate_embeddings
    from agq_gguf.measure.evaluate import evaluate
    from agq_gguf.pruning.calibrate import calibrate_pruning
    from agq_gguf.pruning.options import PruneOptions
    from agq_gguf.quantization.options import QuantizeOptions, activation_options
    from agq_gguf.quantization.packing import pack_agq4
    from agq_gguf.quantization.pipeline import plan_file, quantize
    from agq_gguf.quantization.presets import with_preset
    from agq_gguf.text import mix_texts

# Where the public names live that load torch or llama_cpp; they are imported when they are first used.
_LAZY = {
    "InputStats": "calibration.stats",
    "MatrixOptions": "matrix.options",
    "PruneOptions": "pruning.options",
    "QuantizeOptions": "quantization.options",
    "WeightStats": "calibration.stats",
    "activation_options": "quantization.options",
    "bench": "measure.bench",
    "calibrate_pruning": "pruning.calibrate",
    "default_calibration": "calibration.default_text",
    "evaluate": "measure.evaluate",
    "evaluate_embeddings": "measure.embeddings",
    "import_checkpoint": "import_hf",
    "inspect_file": "inspection.inspect",
    "load_imatrix": "calibration.imatrix",
    "mix_texts": "text",
    "pack_agq4": "quantization.packing",
    "plan_file": "quantization.pipeline",
    "quantize": "quantization.pipeline",
    "verify": "inspection.verify",
    "with_preset": "quantization.presets",
}

__all__ = [
    "AgqError",
    "FormatError",
    "HostError",
    "InputError",
    "InputStats",
    "MatrixOptions",
    "OutputError",
    "PruneOptions",
    "QuantizeOptions",
    "WeightStats",
    "__version__",
    "activation_options",
    "backend_path",
    "bench",
    "calibrate_pruning",
    "default_calibration",
    "evaluate",
    "evaluate_embeddings",
    "import_checkpoint",
    "inspect_file",
    "last_pruned",
    "load_imatrix",
    "mix_texts",
    "options",
    "pack_agq4",
    "plan_file",
    "quantize",
    "register",
    "verify",
    "with_preset",
]

try:
    gguf_package.extend()
except Exception as error:
    # What is in the way is a matter between us and one release of gguf: files are converted and run without it.
    warnings.warn(f"the installed gguf does not learn the type AGQ4: {error}", stacklevel=2)


def __getattr__(name: str) -> Any:
    """Imports heavy modules only when they are used."""
    if name in _LAZY:
        return getattr(import_module(f"agq_gguf.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
