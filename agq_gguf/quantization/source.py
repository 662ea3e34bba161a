"""Sources whose weights are quantized already: reading them, and saying what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from agq_gguf.errors import HostError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import TYPE_IDS, TYPES, Reader, check_source
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.type_plan import TensorPlan


def prepare(reader: Reader, options: QuantizeOptions) -> None:
    """Checks that a file can be quantized; afterwards `reader.read` gives floats for each of its weights.

    Raises InputError, HostError if ggml does not know one of its types.
    """
    check_source(reader, allow_requantize=options.allow_requantize, option="--allow-requantize")
    first = {tensor.type_name: tensor.name for tensor in reversed(reader.tensors.values()) if tensor.quantized}
    if not first:
        return
    from agq_gguf.runtime.ggml import ggml

    for type_name, name in first.items():
        try:
            reader.decoders[type_name] = ggml().decoder(type_name)
        except HostError as e:
            raise HostError(f"{reader.path}: tensor {name} cannot be read: {e}") from e


def lossy_types(plans: Iterable[TensorPlan]) -> list[str]:
    """The quantized types of the source that become another type, those of the most tensors first."""
    lossy = (p for p in plans if p.source.quantized and p.type_name != p.source.type_name and not p.own_codes)
    counts = Counter(p.source.type_name for p in lossy)
    return [name for name, _ in counts.most_common()]


def warnings_about(plans: list[TensorPlan]) -> list[str]:
    """What the source means for the result, in plain words: nothing AGQ4, its own codes kept, errors that add up."""
    ours = [p for p in plans if p.type_name == blocks.TYPE_NAME]
    if not ours:
        chosen = any(p.searched for p in plans)  # by a budget
        return [*_loss_warnings(plans), *([] if chosen else ["AGQ4 supports no tensor of this model"])]
    kept = sum(p.own_codes for p in plans)
    if not kept:
        return _loss_warnings(plans)
    said = f"{kept} matrices are 4-bit integers already and keep them as their codes, with almost no further loss"
    if kept < len(ours):
        said += f"; the other {len(ours) - kept} are quantized anew"
    return [*_loss_warnings(plans), said]


def _loss_warnings(plans: list[TensorPlan]) -> list[str]:
    """What requantizing costs; empty for a float source."""
    types = lossy_types(plans)
    if not types:
        return []
    warnings = [
        f"the source is quantized already ({', '.join(types)}): its errors stay in the weights and new ones are "
        "added to them; the F32, F16 or BF16 file of the model gives a better result"
    ]
    small = [name for name in types if _weight_bytes(name) < _weight_bytes(blocks.TYPE_NAME)]
    if small:
        warnings.append(
            f"{', '.join(small)} has fewer bits than AGQ4: these tensors became larger, not better; "
            "--keep-types leaves them as they are"
        )
    return warnings


def _weight_bytes(type_name: str) -> float:
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    return block_bytes / block
