"""LLaMA as llama.cpp's `llama`; also Mistral without sliding windows, which has the same graph."""

from __future__ import annotations

import math
from typing import Any

import gguf
import torch

from agq_gguf.errors import InputError
from agq_gguf.import_hf.checkpoint import Config
from agq_gguf.import_hf.plan import Plan, Source, Target

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", "MistralForCausalLM")
_MISTRAL_WINDOW = 4096  # transformers' default if the config has no window
_MAX_LAYERS = 4096


def plan(config: Config) -> Plan:
    """The plan for a config. Raises InputError for options that llama.cpp's graph does not support."""
    n_layer = config.size("num_hidden_layers", most=_MAX_LAYERS)
    n_embd, n_ff = config.size("hidden_size"), config.size("intermediate_size")
    n_vocab, n_head = config.size("vocab_size"), config.size("num_attention_heads")
    n_kv = config.size("num_key_value_heads", default=n_head)
    if n_head % n_kv or (config.get("head_dim") is None and n_embd % n_head):
        raise InputError(f"{config.path}: {n_head} heads do not match {n_kv} key/value heads and {n_embd} channels")
    head = config.size("head_dim", default=n_embd // n_head)
    if head % 2:
        raise InputError(f"{config.path}: heads must have an even number of channels for rotary positions, got {head}")
    config.require("hidden_act", "silu", "silu", "llama.cpp's LLaMA uses SiLU")
    warnings: list[str] = []
    context = config.size("max_position_embeddings", default=2048)
    if "MistralForCausalLM" in config.get("architectures", []):
        context = _within_window(config, context, warnings)
    rope = _Rope(config, head, context, warnings)

    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_layer)

    def target(name: str, shape: tuple[int, ...], heads: int = 0) -> Target:
        place = named.get_name(f"model.{name}" if name != "lm_head.weight" else name, (".weight", ".bias"))
        assert place, name
        change = None if not heads else lambda x: interleave_halves(x, heads)
        return Target(place, shape, (Source(name, shape, change),))

    targets = [target("embed_tokens.weight", (n_vocab, n_embd))]
    if rope.factors is not None:
        targets.append(Target("rope_freqs.weight", (head // 2,), constant=rope.factors))
    biases = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    for i in range(n_layer):
        layer = f"layers.{i}."
        targets.append(target(layer + "input_layernorm.weight", (n_embd,)))
        for part, rows, columns, heads, has_bias in (
            ("self_attn.q_proj", n_head * head, n_embd, n_head, biases[0]),
            ("self_attn.k_proj", n_kv * head, n_embd, n_kv, biases[0]),
            ("self_attn.v_proj", n_kv * head, n_embd, 0, biases[0]),
            ("self_attn.o_proj", n_embd, n_head * head, 0, biases[0]),
            ("mlp.gate_proj", n_ff, n_embd, 0, biases[1]),
            ("mlp.up_proj", n_ff, n_embd, 0, biases[1]),
            ("mlp.down_proj", n_embd, n_ff, 0, biases[1]),
        ):
            targets.append(target(f"{layer}{part}.weight", (rows, columns), heads))
            if has_bias:
                targets.append(target(f"{layer}{part}.bias", (rows,), heads))
        targets.append(target(layer + "post_attention_layernorm.weight", (n_embd,)))
    targets.append(target("norm.weight", (n_embd,)))
    tied = config.flag("tie_word_embeddings", False)
    if not tied:
        targets.append(target("lm_head.weight", (n_vocab, n_embd)))

    def set_metadata(writer: Any) -> None:
        writer.add_context_length(context)
        writer.add_embedding_length(n_embd)
        writer.add_block_count(n_layer)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(n_head)
        writer.add_head_count_kv(n_kv)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", default=1e-6))
        writer.add_vocab_size(n_vocab)
        rope.set_metadata(writer)

    def ignored(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    return Plan("llama", targets, n_vocab, set_metadata, ignored, ("model.",), warnings)


def _within_window(config: Config, context: int, warnings: list[str]) -> int:
    """The context within which Mistral's sliding window hides no token."""
    window = config.values.get("sliding_window", _MISTRAL_WINDOW)
    if not isinstance(window, int) or isinstance(window, bool) or not 0 < window < context:
        return context
    warnings.append(
        f"the context is limited to the sliding window of {window} tokens, because llama.cpp's graph has no window"
    )
    return window


def interleave_halves(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of each head: Hugging Face rotates row i with row i + size/2, llama.cpp with its neighbour."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class _Rope:
    """Rotary positions: the base, and the scaling that stretches them for longer texts.

    transformers 5 stores both in `rope_parameters`; earlier releases use `rope_theta` and `rope_scaling`.
    """

    def __init__(self, config: Config, head: int, context: int, warnings: list[str]) -> None:
        found = config.get("rope_parameters", config.get("rope_scaling", {}))
        if not isinstance(found, dict):
            raise InputError(f"{config.path}: rope_scaling must be an object, got {found!r}")
        self._scaling = Config({**config.values, **found}, config.path)
        self.base = self._scaling.number("rope_theta", default=10000.0)
        self.kind = str(found.get("rope_type", found.get("type", "default")) or "default").lower()
        self.factors: torch.Tensor | None = None

        config.require("partial_rotary_factor", 1.0, 1.0, "LLaMA rotates whole heads")
        self._scaling.require("partial_rotary_factor", 1.0, 1.0, "LLaMA rotates whole heads")
        self.magnitude = 1.0  # factor for rotated queries and keys
        if self.kind in ("linear", "yarn", "llama3"):
            self.factor = self._scaling.number("factor")
        if self.kind == "llama3":
            self.factors = self._llama3_factors(head)
        elif self.kind == "yarn":
            self.factors = self._yarn_factors(head, context)
            self.magnitude = self._yarn_magnitude()
        elif self.kind == "dynamic":
            warnings.append(
                f"the context is limited to {context} tokens, because llama.cpp does not support rope scaling "
                "'dynamic', which starts beyond that"
            )
        elif self.kind not in ("default", "linear"):
            raise InputError(f"{config.path}: rope scaling {self.kind!r} is not supported for LLaMA")

    def _llama3_factors(self, head: int) -> torch.Tensor:
        """Divisors of the frequencies [head/2]: long waves are stretched, short ones kept, with a smooth transition."""
        low, high = self._scaling.number("low_freq_factor"), self._scaling.number("high_freq_factor")
        original = self._scaling.number("original_max_position_embeddings")
        if low >= high:
            raise InputError(f"{self._scaling.path}: low_freq_factor {low} must be below high_freq_factor {high}")
        frequency = self.base ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
        turns = original * frequency / (2 * math.pi)  # within the original context
        return self._divisors(((turns - low) / (high - low)).clamp(0, 1))

    def _yarn_factors(self, head: int, context: int) -> torch.Tensor:
        """The same for YaRN (arXiv 2309.00071, section 3.2), where the transition depends on the channel's number.

        llama.cpp has YaRN, too, but reads its limits from the file only for some architectures, and not for `llama`.
        """
        original = self._scaling.size("original_max_position_embeddings", default=context)

        def channel(turns: float) -> float:
            return head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        first = channel(self._scaling.number("beta_fast", default=32.0))
        last = channel(self._scaling.number("beta_slow", default=1.0))
        if self._scaling.flag("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head - 1)
        width = last - first or 0.001
        ramp = (torch.arange(head // 2, dtype=torch.float64) - first) / width
        return self._divisors(1 - ramp.clamp(0, 1))

    def _divisors(self, kept: torch.Tensor) -> torch.Tensor:
        """Divisors of frequencies: the share `kept` of each is unchanged, the rest is divided by the factor."""
        return (1 / (kept + (1 - kept) / self.factor)).float()

    def _yarn_magnitude(self) -> float:
        """The factor by which YaRN enlarges queries and keys (section 3.4), unless the config sets it."""

        def magnitude(scale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

        usual = magnitude(1.0)
        if self._scaling.get("mscale") and self._scaling.get("mscale_all_dim"):
            usual = magnitude(self._scaling.number("mscale")) / magnitude(self._scaling.number("mscale_all_dim"))
        return self._scaling.number("attention_factor", default=usual)

    def set_metadata(self, writer: Any) -> None:
        """Adds the keys that llama.cpp reads."""
        writer.add_rope_freq_base(self.base)
        if self.kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.factor)
        if self.magnitude != 1.0:
            writer.add_rope_scaling_attn_factors(self.magnitude)
