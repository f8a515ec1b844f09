"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight        x [..., D], weight [D]

Computed in float32, returned in x's dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.op import Case, Implementation, Op, register


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, implementation: str | None = None) -> jax.Array:
    """Returns x [..., D] divided by its root mean square over D, times weight [D], in x's dtype.

    Raises:
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    return RMS_NORM(x, weight, eps=eps, implementation=implementation)


def _reference(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    x_f32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * scale * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)).astype(x.dtype)


def _case(name: str, shape: tuple[int, ...]) -> Case:
    def make(key: jax.Array, dtype: Any) -> dict[str, Any]:
        key_x, key_weight = jax.random.split(key)
        return {
            "x": jax.random.normal(key_x, shape, dtype),
            "weight": 1 + jax.random.normal(key_weight, shape[-1:], dtype) / 4,
            "eps": 1e-5,
        }

    rows = 1
    for size in shape[:-1]:
        rows *= size
    return Case(name, make, reduction=max(rows, shape[-1]), differentiable=("x", "weight"))


RMS_NORM = register(
    Op(
        name="rms_norm",
        implementations={"xla": Implementation(_reference)},
        cases=(_case("one row", (1, 64)), _case("odd sizes", (3, 7, 129)), _case("long rows", (5, 2048))),
    )
)
