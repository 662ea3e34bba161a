"""Options of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agq_gguf.errors import InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import TYPE_IDS
from agq_gguf.matrix.options import MatrixOptions

DEVICES = ("cpu", "cuda")
QUALITIES = ("fast", "balanced", "best")
MAX_TARGET_BPW = 16  # as an F16 file
# Types larger than AGQ4 that a tensor may get under a target, smallest first. q5_K and q5_0 have the same size; q5_0
# fits where q5_K does not. q8_0 loses almost nothing, so larger types are never needed.
LARGER_TYPES = ("q5_K", "q5_0", "q5_1", "q6_K", "q8_0")
TOKENS = 32768  # of calibration text, of a large model and with quality best
SMALL_TOKENS = 98304  # of a small one: all of the default text


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`. Raises InputError for values that are not supported."""

    quality: str = "balanced"  # one of QUALITIES
    resume: bool = False  # keep finished parts beside the output and continue from them
    shared: str = ""  # folder of finished matrices for several files of one model, not with quality best; "": none
    output_type: str = "auto"  # auto: q8_0, or chosen under `target_bpw`
    embedding_type: str = "auto"  # auto: q8_0 for small models, else agq4; or chosen under `target_bpw`
    target_bpw: float = 0.0  # maximum bits per weight of the whole model; 0: no target
    target_types: tuple[str, ...] = ()  # what `target_bpw` may choose from beside agq4; (): all of LARGER_TYPES
    threads: int = 0  # 0: all CPUs that this process may use
    device: str = "cpu"  # one of DEVICES: where quality best, and the costs for `target_bpw`, run the model in PyTorch
    memory: int = 4 << 30  # bytes for the statistics that calibration holds at one time
    calibration_tokens: int = 0  # maximum; 0: by the model's size, see `tokens_for`
    tune: bool = True  # with quality `best`: train norms and scales last
    context: int = 512  # tokens per calibration chunk
    split_size: int = 0  # maximum bytes of a file; 0: one file
    allow_requantize: bool = False  # take sources in ggml's quantized types
    keep_types: tuple[str, ...] = ("mxfp4",)  # tensors of a quantized source in these types keep their bytes
    converter: str = ""  # path of llama.cpp's convert_hf_to_gguf.py, for checkpoint folders; "": look for it
    keep_float: str = ""  # file in which the float GGUF of a checkpoint folder stays; "": it is removed at the end
    matrix: MatrixOptions = field(default_factory=MatrixOptions)

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise InputError(f"quality must be one of {', '.join(QUALITIES)}, got {self.quality!r}")
        if self.device not in DEVICES:
            raise InputError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if not 0 <= self.target_bpw <= MAX_TARGET_BPW:
            raise InputError(
                f"the target must be 4.25 to {MAX_TARGET_BPW} bits per weight, or 0 for no target, "
                f"got {self.target_bpw:g}"
            )
        for name in self.target_types:
            if name not in LARGER_TYPES:
                raise InputError(f"types for a target must be among {', '.join(LARGER_TYPES)}, got {name!r}")
        for name in self.keep_types:
            if name not in TYPE_IDS or name == blocks.TYPE_NAME:
                raise InputError(f"types to keep must be names of ggml's types, such as mxfp4 or q6_K, got {name!r}")
        if self.quality == "fast":
            object.__setattr__(self, "matrix", replace(self.matrix, error_feedback=False))

    def tokens_for(self, weights: int) -> int:
        """The maximum number of calibration tokens for a model of so many weights.

        Unless it is given, small models get as many more as they are faster, so that none takes longer than a model of
        0.6 billion weights. On SmolLM2 135M, 98304 tokens instead of 32768 lower the divergence by 4 to 9%.
        """
        if self.calibration_tokens or self.quality == "best":
            return self.calibration_tokens or TOKENS
        return min(max(20_000_000_000_000 // max(weights, 1), TOKENS), SMALL_TOKENS)


def activation_options(bits: int, scale: str = "rotated") -> MatrixOptions:
    """Matrix options for activations of 4 or 8 `bits`.

    `scale` says which activations of a token share a scale: "token" (all channels), "group" (64 channels) or "rotated"
    (64 channels, rotated before rounding); see docs/format.md. Raises InputError for other values.
    """
    if bits not in (4, 8):
        raise InputError(f"activation bits must be 4 or 8, got {bits}")
    if scale not in blocks.ACTIVATION_SCALES:
        raise InputError(f"activation scale must be one of {', '.join(blocks.ACTIVATION_SCALES)}, got {scale!r}")
    return MatrixOptions(activation_bits=bits, activation_scale=scale)
