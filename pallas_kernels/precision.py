"""The one place that says how a matmul rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum_float32(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, summed and returned in float32.

    float32 inputs are multiplied exactly (`Precision.HIGHEST`): by default a GPU would round them to TF32 first.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
