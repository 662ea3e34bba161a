"""Zero-pads a LLaMA, so that types with blocks of 128 and 256 columns support it; its function does not change.

    python benchmarks/widen_llama.py SmolLM2-135M.gguf widened-f16.gguf --columns 768
    python benchmarks/widen_llama.py story-f16.gguf widened-f16.gguf --columns 256 --inner 512

New channels of the residual stream and of the feed-forward network are zero everywhere; new heads have zero weights.
RMS norms include the new zeros in the mean of squares, so their weights and epsilon are scaled to compensate. Quantized
tensors are dequantized to F16, so a model that exists only in a quantized type can be the float model of a comparison.
(State this: that type's grid is then exact for the model, other grids are not.) Used for the real checkpoint of
docs/research/quality.md and docs/research/pruning.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray


def widen(array: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """A matrix zero-padded to (rows, columns)."""
    return np.pad(array, ((0, rows - array.shape[0]), (0, columns - array.shape[1])))


def main() -> None:
    """Reads, zero-pads, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--columns", type=int, required=True, help="new width; a multiple of the heads' size")
    parser.add_argument("--inner", type=int, help="new width of the feed-forward network; default: unchanged")
    args = parser.parse_args()

    reader = GGUFReader(args.source)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    if keys["general.architecture"] != "llama":
        parser.error(f"architecture must be llama, got {keys['general.architecture']}")
    old, n_head, n_kv = (
        int(keys[f"llama.{key}"]) for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    size = old // n_head
    new_head = args.columns // size
    if args.columns % size or args.columns < old or new_head % (n_head // n_kv):
        parser.error(f"--columns must be a multiple of {size * (n_head // n_kv)} and at least {old}")
    new_kv = new_head // (n_head // n_kv)
    share = old / args.columns
    old_inner = int(keys["llama.feed_forward_length"])
    inner = args.inner or old_inner
    if inner < old_inner:
        parser.error(f"--inner must be at least {old_inner}")
    changed = {
        "llama.embedding_length": args.columns,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": new_head,
        "llama.attention.head_count_kv": new_kv,
        "llama.attention.layer_norm_rms_epsilon": keys["llama.attention.layer_norm_rms_epsilon"] * share,
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
    }

    writer = GGUFWriter(args.target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, changed.get(name, keys[name]), kind, sub_type=sub_type)
    rows: dict[str, int] = {"attn_q": args.columns, "attn_k": new_kv * size, "attn_v": new_kv * size}
    rows |= {"attn_output": args.columns, "ffn_down": args.columns, "ffn_gate": inner, "ffn_up": inner}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if weight.ndim == 1:
            if part.endswith("norm"):
                weight = np.pad(weight * np.sqrt(share), (0, args.columns - len(weight)))
            writer.add_tensor(tensor.name, weight.astype(np.float32))
        else:
            columns = inner if part == "ffn_down" else args.columns
            writer.add_tensor(tensor.name, widen(weight, rows.get(part) or len(weight), columns).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
