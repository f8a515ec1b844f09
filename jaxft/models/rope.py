"""Rotary position tables: the frequencies of every RoPE kind, and cos/sin for the positions of a batch.

Of R rotated values pair i turns by f_i = theta^(-2i/R) a position (arXiv:2104.09864, section 3.2.2). To reach beyond
the L0 = original_max_position_embeddings tokens of pretraining, with s = `factor`:

    linear     f_i / s                                       position interpolation, arXiv:2306.15595
    llama3     f_i / s for wavelengths beyond L0 / low_freq_factor, f_i below L0 / high_freq_factor, blended between
    yarn       the same with a blend that is linear in i, between the pairs that turn beta_fast and beta_slow times in
               L0 tokens (NTK by parts, arXiv:2309.00071, section 3.2); cos and sin are multiplied by attention_factor
    longrope   f_i / short_factor_i in documents of up to L0 tokens, f_i / long_factor_i in longer ones
               (arXiv:2402.13753); attention_factor as above
    dynamic    theta (s L / L0 - s + 1)^(R/(R-2)) for theta in documents of L > L0 tokens (NTK-aware scaling)

The last two depend on the length of the token's own document, so a packed document is rotated as it would be alone.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.config import RopeConfig


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, R/2].

    Args:
      rope: the rotation.
      head_dim: H.
      positions: int32 [B, T].
      lengths: int32 [B, T] or [B, 1], tokens of each token's document; only where `rope.depends_on_length`.
    """
    if rope.depends_on_length:
        assert lengths is not None
        angles = positions.astype(jnp.float32)[..., None] * _frequencies_by_length(rope, head_dim, lengths)
    else:
        angles = jnp.einsum(
            "bt,r->btr",
            positions.astype(jnp.float32),
            inverse_frequencies(rope, head_dim),
            precision=jax.lax.Precision.HIGHEST,
        )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor == 1.0:
        return cos, sin
    return cos * jnp.float32(rope.attention_factor), sin * jnp.float32(rope.attention_factor)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequencies, float32 [R/2]; those of short documents where they depend on the length."""
    frequencies = (1.0 / np.float32(rope.theta) ** _exponents(rope, head_dim)).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _blend(rope, frequencies, _llama3_share(rope, frequencies))
    if rope.kind == "yarn":
        return _blend(rope, frequencies, _yarn_share(rope, rope.rotated(head_dim)))
    if rope.kind == "longrope":
        return frequencies / np.asarray(rope.short_factor, np.float32)
    return frequencies


def _exponents(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """2i / R, float32 [R/2]."""
    rotated = rope.rotated(head_dim)
    return np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)


def _blend(rope: RopeConfig, frequencies: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Frequencies divided by `factor`, except for the share of each that is kept as it is."""
    return ((1 - keep) * frequencies / rope.factor + keep * frequencies).astype(np.float32)


def _llama3_share(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    wavelengths = 2 * np.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    # Llama 4 has no band in between: both factors are 1.
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor or 1e-9), 0.0, 1.0)


def _yarn_share(rope: RopeConfig, rotated: int) -> np.ndarray:
    def pair_that_turns(times: float) -> float:
        per_radian = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return rotated * math.log(per_radian) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = (np.arange(rotated // 2, dtype=np.float32) - low) / (high - low or 0.001)
    return (1 - np.clip(ramp, 0, 1)).astype(np.float32)


def _frequencies_by_length(rope: RopeConfig, head_dim: int, lengths: jax.Array) -> jax.Array:
    """float32 [B, T, R/2] or [B, 1, R/2]."""
    limit, rotated, exponents = (
        rope.original_max_position_embeddings,
        rope.rotated(head_dim),
        _exponents(rope, head_dim),
    )
    if rope.kind == "longrope":
        plain = np.float32(rope.theta) ** -exponents
        short, long = (plain / np.asarray(f, np.float32) for f in (rope.short_factor, rope.long_factor))
        return jnp.where((lengths > limit)[..., None], long[None, None], short[None, None])
    stretch = rope.factor * jnp.maximum(lengths, limit).astype(jnp.float32) / limit - (rope.factor - 1)
    theta = rope.theta * stretch ** (rotated / (rotated - 2))
    return theta[..., None] ** -exponents[None, None]
