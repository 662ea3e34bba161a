"""Models that predict no next token: an encoder with a decoder, a model of embeddings, and diffusion models."""

from __future__ import annotations

from pathlib import Path

import gguf

from architectures.parts import HEADS, VOCAB, WINDOW, E, Keys, Layered, heads, rms


def write_t5(path: Path | str) -> Path:
    """T5: an encoder, and a decoder that looks at it; positions by a table of relative distances."""
    keys: Keys = {"attention.relative_buckets_count": 32, "decoder_start_token_id": 1}
    m = Layered(path, "t5", heads(), rms(), keys, kv=HEADS, pre="spm")
    for side, parts in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        for i in range(2):
            block = f"{side}.blk.{i}."
            for part in parts:
                m.norm(block + part + "_norm", E)
                for name in "qkvo":
                    m.matrix(f"{block}{part}_{name}", E, E, gain=0.3)
            if i == 0:
                m.matrix(block + "attn_rel_b", 32, HEADS)
            m.gated(block)
        m.norm(f"{side}.output_norm", E, outliers=False)
    m.embedding("token_embd", VOCAB, E)
    m.output("output", VOCAB, E, quiet=m.quiet)
    return m.finish()


def write_gemma_embedding(path: Path | str) -> Path:
    """EmbeddingGemma: attention in both directions, mean pooling, two dense layers behind it."""
    widths = {"2_feat_in": E, "2_feat_out": 512, "3_feat_in": 512, "3_feat_out": E}
    keys: Keys = {"attention.sliding_window_pattern": 2, **{f"dense_{key}": size for key, size in widths.items()}}
    m = Layered(path, "gemma-embedding", heads(), rms(), WINDOW, keys, pre="spm")
    m.writer.add_pooling_type(gguf.PoolingType.MEAN)
    for block in m.blocks:
        m.attention(block, qk_norm=True)
        m.gated(block)
        m.norms(block, "post_attention_norm", "post_ffw_norm")
    m.matrix("dense_2", 512, E)
    m.matrix("dense_3", E, 512)
    return m.ends(tied=True)


def write_diffusion(path: Path | str, arch: str) -> Path:
    """Dream or LLaDA, whose attention sees all tokens; only llama.cpp's code says so, no key of the file."""
    m = Layered(path, arch, heads(), rms(), pre="qwen2")
    for block in m.blocks:
        m.attention(block)
        m.gated(block)
    return m.ends()
