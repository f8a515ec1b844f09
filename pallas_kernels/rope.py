"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), Hugging Face's "rotate half" convention.

Value i of a head is paired with value i + R/2; each pair is rotated by its position's angle:

    y[i]       = x[i] cos - x[i + R/2] sin
    y[i + R/2] = x[i + R/2] cos + x[i] sin        i < R/2 <= H/2

Values from R on pass through. q [B, T, N, H], k [B, T, K, H], cos and sin float32 [B, T, R/2].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.op import Case, Implementation, Op, normal, register


def rope(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rotates q [B, T, N, H] and k [B, T, K, H] by cos and sin [B, T, R/2]; float32 inside, input dtypes out.

    Raises:
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    return ROPE(q, k, cos, sin, implementation=implementation)


def _reference(q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)


def _case(name: str, q_shape: tuple[int, int, int, int], num_kv_heads: int, half: int) -> Case:
    batch, length, _, head_dim = q_shape

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        angle = rng.uniform(0, 2 * np.pi, (batch, length, half)).astype(np.float32)
        return {
            "q": normal(rng, q_shape, dtype),
            "k": normal(rng, (batch, length, num_kv_heads, head_dim), dtype),
            "cos": jnp.asarray(np.cos(angle)),
            "sin": jnp.asarray(np.sin(angle)),
        }

    return Case(name, make, reduction=2, differentiable=("q", "k"))


ROPE = register(
    Op(
        name="rope",
        implementations={"xla": Implementation(_reference)},
        cases=(_case("whole heads", (2, 7, 4, 64), 2, 32), _case("part of each head", (1, 5, 3, 18), 3, 5)),
    )
)
