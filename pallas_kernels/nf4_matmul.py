"""A few tokens times an NF4 weight, decoded on the way to the multiplication: y = x W^T, for decoding text.

With map and absmax of pallas_kernels/nf4.py, W[o, i] = map[codes[o, i]] * absmax[block of (o, i)]. One or
two tokens run on ordinary cores in float32 (nf4_kernels.py), more of 16 bits on tensor cores, with W rounded to 11 bits
(nf4_tensor_kernels.py). Sums are float32, rounded to x's dtype once.

Backward, for x only (the codes are frozen): dx = dy W, with W decoded again; nothing but the codes is kept.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend, nf4, nf4_kernels, nf4_tensor_kernels
from pallas_kernels.nf4_kernels import Format, Linear
from pallas_kernels.nf4_tensor_kernels import MAX_TOKENS
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_rounded

LARGE_WEIGHT = 8192  # rows


def nf4_matmul(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None = None,
    nested_offset: jax.Array | None = None,
    *,
    layer: jax.Array | int | None = None,
    quant_map: jax.Array | None = None,
    nested_quant_map: jax.Array | None = None,
    block_size: int = nf4.BLOCK_SIZE,
    nested_block_size: int = nf4.NESTED_BLOCK_SIZE,
    implementation: str | None = None,
) -> jax.Array:
    """Returns x W^T [..., out] in x's dtype, for an NF4 weight W [out, in]; differentiable in x.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import nf4, nf4_matmul
    >>> w = jax.random.normal(jax.random.key(0), (64, 128))
    >>> x = jnp.ones((1, 128))
    >>> arrays = nf4.quantize(w)
    >>> y = nf4_matmul(x, *arrays)
    >>> y.shape
    (1, 64)
    >>> bool(jnp.allclose(y, x @ nf4.dequantize(*arrays).T, atol=1e-4))
    True

    Args:
      x: [..., in], float32, bfloat16 or float16.
      codes, absmax, nested_absmax, nested_offset, layer, quant_map, nested_quant_map, block_size, nested_block_size:
        the weight, as in `nf4.dequantize`.
      implementation: "xla", "dequantize" (`nf4.dequantize` by its kernel, then a plain matmul), "pallas" (of float32
        up to four tokens) or None.

    Raises:
      ValueError: x's last axis is not the weight's.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    if x.ndim < 1 or x.shape[-1] != 2 * codes.shape[-1]:
        shape = (codes.shape[-2], 2 * codes.shape[-1])
        raise ValueError(f"nf4_matmul: x {x.shape} and a weight {shape} do not fit")
    return NF4_MATMUL(
        x,
        codes,
        absmax,
        nested_absmax,
        nested_offset,
        layer=layer,
        quant_map=quant_map,
        nested_quant_map=nested_quant_map,
        block_size=block_size,
        nested_block_size=nested_block_size,
        implementation=implementation,
    )


def _implementation(forward: Any, decode: str | None = None) -> Any:
    """The op's function for a `(x [M, in], nf4.Weight, Format) -> y [M, out]`, with the gradient of x.

    `decode` is the implementation of `nf4.dequantize` that the backward runs; None means the fastest.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def product(x: jax.Array, weight: nf4.Weight, format: Format) -> jax.Array:
        return forward(x, weight, format)

    product.defvjp(lambda x, weight, format: (forward(x, weight, format), weight), functools.partial(_backward, decode))

    def function(
        x: jax.Array,
        codes: jax.Array,
        absmax: jax.Array,
        nested_absmax: jax.Array | None = None,
        nested_offset: jax.Array | None = None,
        *,
        layer: jax.Array | int | None = None,
        quant_map: jax.Array | None = None,
        nested_quant_map: jax.Array | None = None,
        block_size: int = nf4.BLOCK_SIZE,
        nested_block_size: int = nf4.NESTED_BLOCK_SIZE,
    ) -> jax.Array:
        weight = nf4.Weight(codes, absmax, nested_absmax, nested_offset, layer, quant_map, nested_quant_map)
        tokens = math.prod(x.shape[:-1])
        y: Any = product(x.reshape(tokens, x.shape[-1]), weight, Format(block_size, nested_block_size))
        return y.reshape(*x.shape[:-1], codes.shape[-2])

    return function


def _decoded(decode: str | None, weight: nf4.Weight, format: Format, dtype: Any) -> jax.Array:
    return nf4.dequantize(**weight._asdict(), **format._asdict(), dtype=dtype, implementation=decode)


def _decode_and_multiply(x: jax.Array, weight: nf4.Weight, format: Format, *, decode: str | None = None) -> jax.Array:
    return einsum_rounded("mi,oi->mo", x, _decoded(decode, weight, format, x.dtype), x.dtype)


_reference = functools.partial(_decode_and_multiply, decode="xla")


def _backward(decode: str | None, format: Format, weight: nf4.Weight, dy: jax.Array) -> tuple[jax.Array, None]:
    return einsum_rounded("mo,oi->mi", dy, _decoded(decode, weight, format, dy.dtype), dy.dtype), None


def _pallas(x: jax.Array, weight: nf4.Weight, format: Format) -> jax.Array:
    kernels = nf4_kernels if x.shape[0] <= nf4_kernels.matvec_tokens(x.dtype) else nf4_tensor_kernels
    (y,) = kernels.linears(x, (Linear(nf4.as_stack(*weight)),), (1.0,), format)
    return y


def _dequantize_refuses(platform: str, *args: Any, **kwargs: Any) -> str | None:
    return backend.refuses_platform(platform)


def _pallas_refuses(platform: str, x: jax.Array, codes: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    return backend.refuses_platform(platform) or nf4_kernels.refuses(x, codes, *args, **kwargs)


def _rank(platform: str, x: jax.Array, codes: jax.Array, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    tokens = math.prod(x.shape[:-1])
    if platform != "gpu":
        return (Choice("xla", "the kernel is for GPUs"),)
    dequantize = Choice("dequantize", f"{tokens} tokens of {x.dtype} are worth a decoded weight and a plain matmul")
    # With 64 to 128 tokens a small weight leaves the tensor-core kernel too few programs.
    if tokens <= MAX_TOKENS // 2 or (tokens <= MAX_TOKENS and codes.shape[-2] >= LARGE_WEIGHT):
        why = "it reads each code once: on an H100 4.6 times as fast as decoding first at 1 token, 1.1 at 128"
        return (Choice("pallas", why), dequantize)
    return (dequantize,)


def _case(name: str, tokens: int, shape: tuple[int, int], *, layers: int | None = None) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        w = normal(rng, shape if layers is None else (layers, *shape), jnp.float32, shape[1] ** -0.5)
        arrays = jax.jit(nf4.quantize if layers is None else jax.vmap(nf4.quantize))(w)._asdict()
        arrays["layer"] = None if layers is None else jnp.int32(layers - 1)
        return {"x": normal(rng, (tokens, shape[1]), dtype)} | arrays

    return Case(name, make, reduction=max(shape), differentiable=("x",))


NF4_MATMUL = register(
    Op(
        name="nf4_matmul",
        replaces="decoding a weight to multiply few tokens",
        saves="writing and reading the decoded weight",
        implementations={
            "xla": Implementation(_implementation(_reference, decode="xla")),
            "dequantize": Implementation(_implementation(_decode_and_multiply), refuses=_dequantize_refuses),
            "pallas": Implementation(_implementation(_pallas), refuses=_pallas_refuses),
        },
        rank=_rank,
        cases=(
            _case("one token, layer of a stack", 1, (16, 128), layers=2),
            _case("tensor cores, ragged everywhere", 17, (70, 328)),
            _case("tensor cores, a last program with less to do", 5, (24, 2688)),
            _case("blocks across rows, tokens of a matvec", 3, (10, 200)),
        ),
    )
)
