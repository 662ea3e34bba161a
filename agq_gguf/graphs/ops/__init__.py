"""What each operation of ggml computes, in PyTorch: one function for each, all in the table `OPS`.

Values are [batch, ne3, ne2, ne1, ne0], float32 or int64.
"""

from agq_gguf.graphs.ops import arithmetic, attention, indices, norms, positions, products, recurrent, shapes
from agq_gguf.graphs.ops.table import OPS

__all__ = ["OPS", "arithmetic", "attention", "indices", "norms", "positions", "products", "recurrent", "shapes"]
