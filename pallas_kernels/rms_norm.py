"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight        x [..., D], weight [D]

Computed in float32, returned in x's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.op import Case, Implementation, Op, normal, register


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
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {"x": normal(rng, shape, dtype), "weight": normal(rng, shape[-1:], dtype), "eps": 1e-5}

    return Case(name, make, reduction=max(math.prod(shape[:-1]), shape[-1]), differentiable=("x", "weight"))


RMS_NORM = register(
    Op(
        name="rms_norm",
        implementations={"xla": Implementation(_reference)},
        cases=(_case("one row", (1, 64)), _case("odd sizes", (3, 7, 129)), _case("long rows", (5, 2048))),
    )
)
