"""A linear layer with a low-rank adapter (Hu et al. 2021, arXiv:2106.09685), over a plain or a quantized weight.

    y = x W^T + bias + scale (x_lora A^T) B^T      x [..., in], W [out, in], A [r, in], B [out, r]

Every product is of two arrays in x's dtype, summed in float32. Gradients, with g the cotangent of one product x W^T:

    dx = g W        dW = sum over tokens of g^T x, returned in W's dtype without a rounding to x's in between

The rule is written out because autodiff of a mixed-precision product gives a float32 GEMM for dx and a bfloat16 dW.
A quantized weight is decoded again in the backward pass: its residual is the packed weight, never a decoded one, and
it gets no gradient. Nor is x kept for a plain weight that is not being differentiated.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.op import Case, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32


def lora_linear(
    x: jax.Array,
    weight: Any,
    bias: jax.Array | None = None,
    lora_A: jax.Array | None = None,
    lora_B: jax.Array | None = None,
    *,
    scale: float | jax.Array = 1.0,
    lora_x: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Returns x W^T (+ bias) + scale (lora_x A^T) B^T, [..., out] in x's dtype.

    Args:
      x: [..., in].
      weight: array [out, in] of any float dtype, or a pytree with a method `dequantize(dtype) -> [out, in]`, which is
        taken to be frozen.
      bias: [out] or None.
      lora_A, lora_B: [r, in] and [out, r], or both None. Their gradients come in their own dtype.
      scale: lora_alpha / r.
      lora_x: input of the adapter where it differs from x (dropout), [..., in] in x's dtype.
      implementation: "xla" or None.

    Raises:
      ValueError: only one of lora_A and lora_B is given.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_linear: lora_A and lora_B come together, or not at all")
    return LORA_LINEAR(x, weight, bias, lora_A, lora_B, scale=scale, lora_x=lora_x, implementation=implementation)


@jax.custom_vjp
def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times the transpose of weight [out, in], in x's dtype."""
    return einsum_float32("...i,oi->...o", x, weight.astype(x.dtype)).astype(x.dtype)


def _linear_fwd(x, weight):
    return _linear(x.value, weight.value), (x.value if weight.perturbed else None, weight.value)


def _linear_bwd(residuals, g):
    x, weight = residuals
    return _d_x(g, weight.astype(g.dtype)), None if x is None else _d_weight(g, x).astype(weight.dtype)


_linear.defvjp(_linear_fwd, _linear_bwd, symbolic_zeros=True)


@jax.custom_vjp
def _quantized_linear(x: jax.Array, weight: Any) -> jax.Array:
    return _linear(x, weight.dequantize(x.dtype))


def _quantized_linear_fwd(x, weight):
    return _quantized_linear(x, weight), weight


def _quantized_linear_bwd(weight, g):
    return _d_x(g, weight.dequantize(g.dtype)), None


_quantized_linear.defvjp(_quantized_linear_fwd, _quantized_linear_bwd)


def _d_x(g: jax.Array, weight: jax.Array) -> jax.Array:
    return einsum_float32("...o,oi->...i", g, weight).astype(g.dtype)


def _d_weight(g: jax.Array, x: jax.Array) -> jax.Array:
    """float32 [out, in], summed over all leading axes."""
    return einsum_float32("no,ni->oi", g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]))


def _reference(
    x: jax.Array,
    weight: Any,
    bias: jax.Array | None = None,
    lora_A: jax.Array | None = None,
    lora_B: jax.Array | None = None,
    *,
    scale: float | jax.Array = 1.0,
    lora_x: jax.Array | None = None,
) -> jax.Array:
    base = _quantized_linear if hasattr(weight, "dequantize") else _linear
    y = base(x, weight).astype(jnp.float32)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    if lora_A is not None and lora_B is not None:
        low_rank = _linear(x if lora_x is None else lora_x, lora_A)
        y = y + _linear(low_rank, lora_B).astype(jnp.float32) * scale
    return y.astype(x.dtype)


def _case(name: str, batch: tuple[int, ...], sizes: tuple[int, int, int], adapter: bool, bias: bool) -> Case:
    size_in, size_out, rank = sizes

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {
            "x": normal(rng, (*batch, size_in), dtype),
            "weight": normal(rng, (size_out, size_in), dtype, scale=size_in**-0.5),
            "bias": normal(rng, (size_out,), dtype) if bias else None,
            "lora_A": normal(rng, (rank, size_in), jnp.float32, scale=size_in**-0.5) if adapter else None,
            "lora_B": normal(rng, (size_out, rank), jnp.float32, scale=rank**-0.5) if adapter else None,
            "scale": 0.75,
        }

    differentiable = ["x", "weight"] + ["bias"] * bias + ["lora_A", "lora_B"] * adapter
    return Case(name, make, reduction=max(math.prod(batch), size_in, size_out), differentiable=tuple(differentiable))


LORA_LINEAR = register(
    Op(
        name="lora_linear",
        implementations={"xla": Implementation(_reference)},
        cases=(
            _case("adapter", (2, 7), (33, 49, 4), adapter=True, bias=False),
            _case("adapter, bias", (5,), (64, 17, 1), adapter=True, bias=True),
            _case("plain", (3, 1, 5), (19, 23, 1), adapter=False, bias=False),
        ),
        roundings=4,
    )
)
