"""Rotary position tables: the frequencies of every RoPE kind, and cos/sin for the positions of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequencies, float32 [R/2], where R = head_dim * partial_rotary_factor values are rotated.

    f_i = theta^(-2i/R) (arXiv:2104.09864, section 3.2.2). "linear" divides all by `factor` (position interpolation,
    arXiv:2306.15595). "llama3" divides those whose wavelength exceeds original_max / low_freq_factor, keeps those below
    original_max / high_freq_factor, and blends linearly in between (Llama 3.1's rope scaling).
    """
    rotated = int(head_dim * rope.partial_rotary_factor)
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    wavelengths = 2 * np.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return ((1 - keep) * frequencies / rope.factor + keep * frequencies).astype(np.float32)


def rope_tables(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, R/2], for int32 positions [B, T]."""
    angles = jnp.einsum(
        "bt,r->btr",
        positions.astype(jnp.float32),
        inverse_frequencies(rope, head_dim),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.cos(angles), jnp.sin(angles)
