"""MXFP4: values of four bits in blocks of 32 of a row that share a power of two. `dequantize` decodes them.

OCP Microscaling Formats v1.0 (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf):
a value is in E2M1, a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 (section 5.3.3), a block's scale in E8M0, 2^(s - 127)
and NaN for 255 (section 5.4.1). Two codes a byte, the first in the low bits, as gpt-oss checkpoints have them.

Every value times its scale is exact in bfloat16 and float32, so all implementations agree to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.op import Case, Choice, Implementation, Op, register

BLOCK_SIZE = 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PER_WORD = 8  # codes in an int32
_WORDS = 256  # that one program decodes


def dequantize(
    codes: jax.Array,
    scales: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """The values in `dtype`, [..., out, in] of codes uint8 [..., out, in / 2] and scales uint8 [..., out, in / 32].

    Args:
      codes, scales: with `layer`, of all layers: one more leading axis [L].
      layer: which layer to decode (int32 scalar); the kernel reads it out of the stack.
      implementation: "pallas", "xla" or None for the fastest.

    Raises:
      ValueError: the shapes do not fit each other.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import mxfp4
    >>> codes = jnp.full((1, 16), 0x52, jnp.uint8)  # 1 and 3, which come in turns
    >>> mxfp4.dequantize(codes, jnp.full((1, 1), 128, jnp.uint8))[0, :4].tolist()
    [2.0, 6.0, 2.0, 6.0]
    """
    if codes.shape[:-1] != scales.shape[:-1] or 2 * codes.shape[-1] != BLOCK_SIZE * scales.shape[-1]:
        raise ValueError(f"mxfp4: codes {codes.shape} and scales {scales.shape} do not fit")
    return MXFP4_DEQUANTIZE(codes, scales, layer=layer, dtype=dtype, implementation=implementation)


def power_of_two(scales: jax.Array) -> jax.Array:
    """2^(s - 127), float32; 255 means NaN."""
    bits = scales.astype(jnp.int32) << 23
    bits = jnp.where(scales == 0, jnp.int32(1 << 22), bits)  # 2^-127 is subnormal
    bits = jnp.where(scales == 255, jnp.int32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _reference(
    codes: jax.Array, scales: jax.Array, *, layer: jax.Array | int | None = None, dtype: Any = jnp.float32
) -> jax.Array:
    if layer is not None:
        codes, scales = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (codes, scales))
    both = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, BLOCK_SIZE)
    values = jnp.take(jnp.asarray(VALUES), both) * power_of_two(scales)[..., None]
    return values.reshape(*codes.shape[:-1], 2 * codes.shape[-1]).astype(dtype)


def _pallas(
    codes: jax.Array, scales: jax.Array, *, layer: jax.Array | int | None = None, dtype: Any = jnp.float32
) -> jax.Array:
    """One program decodes `_WORDS` int32 words of eight codes each, from the whole stack."""
    layers = 1 if layer is None else codes.shape[0]
    shape = codes.shape if layer is None else codes.shape[1:]
    total = math.prod(shape) * 2 // _PER_WORD
    values = backend.call(
        _mxfp4_dequantize,
        jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        # As words: offsets of bytes would overflow 32 bits in a stack of 2 GiB.
        jax.lax.bitcast_convert_type(codes.reshape(-1, _PER_WORD // 2), jnp.int32).reshape(layers, total),
        scales.reshape(layers, total * _PER_WORD // BLOCK_SIZE),
        jnp.asarray(VALUES),
        out=jax.ShapeDtypeStruct((total, _PER_WORD), dtype),
        grid=(-(-total // _WORDS),),
        num_warps=1,
    )
    return values.reshape(*shape[:-1], 2 * shape[-1])


def _mxfp4_dequantize(layer_ref: Any, codes_ref: Any, scales_ref: Any, values_ref: Any, out_ref: Any) -> None:
    layer, start = layer_ref[0], backend.program_id(0) * _WORDS
    total, shape = out_ref.shape[0], (_WORDS, _PER_WORD)
    word = start + jax.lax.iota(jnp.int32, _WORDS)
    mask = None if total % _WORDS == 0 else word < total
    other = None if mask is None else 0
    codes = backend.load(codes_ref.at[layer, backend.ds(start, _WORDS)], mask=mask, other=other)
    scales = backend.load(scales_ref.at[layer, word // (BLOCK_SIZE // _PER_WORD)], mask=mask, other=other)
    values = backend.load(values_ref.at[backend.nibbles(codes, jax.lax.iota(jnp.int32, _PER_WORD))])
    values *= jnp.broadcast_to(power_of_two(scales)[:, None], shape)
    out_mask = None if mask is None else jnp.broadcast_to(mask[:, None], shape)
    backend.store(out_ref.at[backend.ds(start, _WORDS), :], values.astype(out_ref.dtype), mask=out_mask)


def _refuses(platform: str, *args: Any, **kwargs: Any) -> str | None:
    return backend.refuses_platform(platform)


def _rank(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        return (Choice("pallas", "one pass over the codes: 0.25 ms, XLA 0.98 (32 x 2880 x 2880 on an H100)"),)
    return (Choice("xla", "the kernel is for GPUs"),)


def _case(name: str, shape: tuple[int, ...], *, layers: int | None = None) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        stack = shape if layers is None else (layers, *shape)
        codes = rng.integers(256, size=(*stack[:-1], stack[-1] // 2), dtype=np.uint8)
        scales = rng.integers(100, 140, size=(*stack[:-1], stack[-1] // BLOCK_SIZE), dtype=np.uint8)
        layer = None if layers is None else jnp.int32(layers - 1)
        return {"codes": jnp.asarray(codes), "scales": jnp.asarray(scales), "layer": layer, "dtype": dtype}

    return Case(name, make, reduction=1)


MXFP4_DEQUANTIZE = register(
    Op(
        name="mxfp4_dequantize",
        replaces="gathers, and a pass that joins even and odd values",
        saves="a float32 array of the weight's size; a slice of the stack",
        implementations={"xla": Implementation(_reference), "pallas": Implementation(_pallas, refuses=_refuses)},
        rank=_rank,
        cases=(
            _case("experts, layer of a stack", (3, 5, 96), layers=2),
            _case("whole blocks", (16, 256)),
        ),
    )
)
