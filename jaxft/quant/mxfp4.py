"""MXFP4 weights, as gpt-oss checkpoints store their experts. The format, and its decoding: pallas_kernels/mxfp4.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import JaxftError
from jaxft.quant.base import register
from pallas_kernels import mxfp4
from pallas_kernels.mxfp4 import BLOCK_SIZE, VALUES

_LARGEST_EXPONENT = 2  # of 6 = 1.5 * 2^2
_BIAS = 127


@register("mxfp4")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4Tensor:
    """A weight [out, in] in MXFP4, or a stack of such weights: [L] of them, or [L, E] of a model's experts.

    Attributes:
      codes: uint8 [out, in / 2].
      scales: uint8 [out, in / 32].
      layer: which layer of a stack this is a view of (int32 scalar), or None.
      shape: (out, in) of one weight.

    Of a stack both arrays have the leading axes.
    """

    codes: jax.Array
    scales: jax.Array
    layer: jax.Array | None = None
    shape: tuple[int, int] = dataclasses.field(kw_only=True, metadata={"static": True})

    @classmethod
    def quantize(cls, w: jax.Array) -> MXFP4Tensor:
        """Quantizes a float weight [out, in]: the scale as of section 6.3, values to the nearest, ties to even codes.

        Raises:
          JaxftError: w is not a matrix whose rows are whole blocks.
        """
        if w.ndim != 2 or w.shape[1] % BLOCK_SIZE:
            raise JaxftError(
                f"weight of shape {tuple(w.shape)}",
                f"MXFP4 needs a matrix whose rows are whole blocks of {BLOCK_SIZE}",
                "Keep this weight out of the quantized ones",
            )
        rows, columns = w.shape
        blocks = w.astype(jnp.float32).reshape(rows, -1, BLOCK_SIZE)
        _, exponent = jnp.frexp(jnp.max(jnp.abs(blocks), axis=-1))
        scales = jnp.clip(exponent - 1 - _LARGEST_EXPONENT + _BIAS, 0, 254).astype(jnp.uint8)
        scaled = blocks / mxfp4.power_of_two(scales)[..., None]
        # Halfway between two values decides; a tie goes to the one whose code is even.
        magnitude, codes = jnp.abs(scaled), jnp.signbit(scaled).astype(jnp.uint8) << 3
        for code, middle in enumerate((VALUES[:7] + VALUES[1:8]) / 2):
            above = magnitude >= middle if code % 2 else magnitude > middle
            codes = codes + above.astype(jnp.uint8)
        pairs = codes.reshape(rows, columns // 2, 2)
        return cls(pairs[..., 0] | (pairs[..., 1] << 4), scales, shape=(rows, columns))

    @classmethod
    def stack(cls, tensors: list[MXFP4Tensor]) -> MXFP4Tensor:
        """Joins L weights of one shape into a stack.

        Raises:
          JaxftError: they differ in shape, or there is none.
        """
        if len({jax.tree.structure(t) for t in tensors}) != 1 or tensors[0].layer is not None:
            raise JaxftError("MXFP4 stack", f"needs weights of one kind, not {sorted({t.shape for t in tensors})}")
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *tensors)

    def unstack(self) -> list[MXFP4Tensor]:
        """The inverse of `stack`."""
        if self.codes.ndim < 3 or self.layer is not None:
            raise JaxftError("MXFP4 weight", "is not a stack")
        return [jax.tree.map(lambda array, i=i: array[i], self) for i in range(self.codes.shape[0])]

    def at_layer(self, layer: jax.Array | int) -> MXFP4Tensor:
        """A view of one layer of a stack: the same arrays, read at `layer` when it is decoded."""
        if self.codes.ndim < 3 or self.layer is not None:
            raise JaxftError("MXFP4 weight", "is not a stack, so it has no layers")
        return dataclasses.replace(self, layer=jnp.asarray(layer, jnp.int32))

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values in `dtype`: [out, in], with the leading axes of a stack ([E, out, in] of a layer of experts).

        bfloat16 and float32 hold every one exactly.
        """
        return mxfp4.dequantize(jnp.asarray(self.codes), jnp.asarray(self.scales), layer=self.layer, dtype=dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        """x [T, in] times the weight's transpose, [T, out] in x's dtype."""
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        product = jnp.einsum(
            "ti,oi->to", x, self.dequantize(x.dtype), precision=precision, preferred_element_type=jnp.float32
        )
        return product.astype(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
