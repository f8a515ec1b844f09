"""Linears that share a few tokens, over NF4 weights with low-rank adapters, for decoding text: one launch for all.

    y_i = x W_i^T + scale_i (x A_i^T) B_i^T + bias_i

The low-rank product x A_i^T is rounded to x's dtype, the rest is summed in float32 and rounded once. There is no
gradient: `lora_linear`, `lora_qkv` and `lora_mlp` run this where nothing is differentiated. Kernels: nf4_kernels.py,
and from three tokens of 16 bits on nf4_tensor_kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend, nf4, nf4_kernels, nf4_tensor_kernels
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32

KNOWN = {"weight", "bias", "lora_A", "lora_B", "scale"}  # what of a LoraWeights the kernels compute


def nf4_linears(
    x: jax.Array,
    linears: Sequence[Any],
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Returns y_i [..., out_i] of every linear, in x's dtype.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import LoraWeights, nf4, nf4_linears
    >>> weight = nf4.Weight(*nf4.quantize(jax.random.normal(jax.random.key(0), (64, 128))))
    >>> lora_A, lora_B = jnp.ones((1, 128)), jnp.ones((64, 1))
    >>> y, z = nf4_linears(jnp.ones((1, 128)), (LoraWeights(weight), LoraWeights(weight, None, lora_A, lora_B)))
    >>> bool(jnp.allclose(z - y, 128, atol=1e-3))
    True

    Args:
      x: [..., in], float32, bfloat16 or float16.
      linears: `LoraWeights` whose weight has a method `nf4_arguments`: the arguments of `nf4.dequantize`.
      implementation: "xla", "pallas" (up to 128 tokens, of float32 up to four) or None.

    Raises:
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    return NF4_LINEARS(x, tuple(linears), implementation=implementation)


def takes(x: jax.Array, linears: Sequence[Any]) -> bool:
    """Whether `nf4_linears` runs its kernels for these, of any weights."""
    if not all(hasattr(linear.weight, "nf4_arguments") for linear in linears):
        return False
    return NF4_LINEARS.choose(x, tuple(linears)).implementation != "xla"


def plain(linears: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with factors that are arrays, for who cannot read them from a stack."""
    return tuple(
        linear._replace(**{name: _array(getattr(linear, name)) for name in ("lora_A", "lora_B")}) for linear in linears
    )


def _array(factor: Any) -> jax.Array | None:
    return factor.dequantize(factor.dtype) if hasattr(factor, "dequantize") else factor


def _stacked(linear: Any) -> tuple[Any, ...]:
    """(lora_A [L, r, in], lora_B [L, out, r], layer int32 [1]), or Nones."""
    if linear.lora_A is None:
        return None, None, None
    if not hasattr(linear.lora_A, "stack"):
        return linear.lora_A[None], linear.lora_B[None], jnp.zeros(1, jnp.int32)
    return linear.lora_A.stack, linear.lora_B.stack, linear.lora_A.layer.reshape(1)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _reference(x: jax.Array, linears: Sequence[Any]) -> tuple[jax.Array, ...]:
    found = []
    for linear in plain(tuple(linears)):
        weight = nf4.dequantize(**linear.weight.nf4_arguments(), dtype=x.dtype, implementation="xla")
        y = einsum_float32("ti,oi->to", _flat(x), weight)
        if linear.lora_A is not None:
            low = einsum_float32("ti,ri->tr", _flat(x), linear.lora_A.astype(x.dtype)) * jnp.float32(linear.scale)
            y += einsum_float32("tr,or->to", low.astype(x.dtype), linear.lora_B.astype(x.dtype))
        if linear.bias is not None:
            y += jnp.broadcast_to(linear.bias.astype(jnp.float32), y.shape)
        found.append(y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1]))
    return tuple(found)


def _pallas(x: jax.Array, linears: Sequence[Any]) -> tuple[jax.Array, ...]:
    parts, formats = [], []
    for linear in linears:
        arguments = linear.weight.nf4_arguments()
        formats.append(nf4_kernels.Format(*(arguments.pop(name) for name in nf4_kernels.Format._fields)))
        lora_A, lora_B, layer = _stacked(linear)
        parts.append(nf4_kernels.Linear(nf4.as_stack(**arguments), lora_A, lora_B, layer, linear.bias))
    scales = [linear.scale for linear in linears]
    flat = _flat(x)
    kernels = nf4_kernels if flat.shape[0] <= nf4_kernels.matvec_tokens(x.dtype) else nf4_tensor_kernels
    found = kernels.linears(flat, parts, scales, formats[0])
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in found)


def _refuses(platform: str, x: jax.Array, linears: Sequence[Any], **kwargs: Any) -> str | None:
    tokens = math.prod(x.shape[:-1])
    if tokens > nf4_tensor_kernels.MAX_TOKENS:
        return f"it takes up to {nf4_tensor_kernels.MAX_TOKENS} tokens, not {tokens}"
    for linear in linears:
        others = [name for name in linear._fields if name not in KNOWN and getattr(linear, name) is not None]
        if others:
            return f"it does not compute {', '.join(others)}"
        if math.prod(getattr(linear.scale, "shape", ())) != 1:
            return f"a scale has the shape {linear.scale.shape}"
        reason = nf4_kernels.refuses(x, **linear.weight.nf4_arguments())
        if reason:
            return reason
    arguments = [linear.weight.nf4_arguments() for linear in linears]
    if len({tuple(one[name] for name in nf4_kernels.Format._fields) for one in arguments}) > 1:
        return "the weights have several block sizes"
    return backend.refuses_platform(platform)


def _rank(platform: str, x: jax.Array, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform != "gpu":
        return (Choice("xla", "the kernels are for GPUs"),)
    return (
        Choice(
            "pallas",
            "one launch for all linears and adapters: 8B on an H100, 26 kernels a layer instead of 41 for one token",
        ),
    )


def _case(
    name: str,
    tokens: int,
    size_in: int,
    parts: tuple[tuple[int, int | None, bool], ...],
    *,
    layers: int | None = None,
) -> Case:
    """`parts`: rows, rank and whether there is a bias, of each linear."""

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        from pallas_kernels.lora_parts import LoraWeights  # it imports this file

        def linear(rows: int, rank: int | None, bias: bool) -> LoraWeights:
            shape = (rows, size_in) if layers is None else (layers, rows, size_in)
            w = normal(rng, shape, jnp.float32, size_in**-0.5)
            arrays = jax.jit(nf4.quantize if layers is None else jax.vmap(nf4.quantize))(w)
            return LoraWeights(
                nf4.Weight(*arrays, layer=None if layers is None else jnp.int32(layers - 1)),
                normal(rng, (rows,), dtype) if bias else None,
                normal(rng, (rank, size_in), jnp.float32, size_in**-0.5) if rank else None,
                normal(rng, (rows, rank), jnp.float32, rank**-0.5) if rank else None,
                scale=0.75,
            )

        x = normal(rng, (tokens, size_in), dtype)
        return {"x": x, "linears": tuple(linear(*part) for part in parts)}

    return Case(name, make, reduction=max(size_in, *(rows for rows, *_ in parts)))


NF4_LINEARS = register(
    Op(
        name="nf4_linears",
        replaces="a launch for each product and adapter",
        saves="decoded weights; most launches of a layer",
        implementations={"xla": Implementation(_reference), "pallas": Implementation(_pallas, refuses=_refuses)},
        rank=_rank,
        cases=(
            _case("one token, of a stack", 1, 128, ((4, 3, False), (2, None, True)), layers=2),
            _case("columns not whole tiles", 3, 328, ((10, 3, True), (10, None, False))),
            _case("tensor cores, of a stack", 9, 256, ((70, 16, False), (33, 3, True), (10, None, True)), layers=2),
            _case("tensor cores, programs share columns", 17, 2688, ((40, 40, True),)),
            _case("several tiles of columns", 2, 2112, ((5, 5, True), (3, 17, False))),
        ),
        roundings=4,
    )
)
