"""NF4 weights, exactly as bitsandbytes stores them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import JaxftError
from jaxft.quant.base import register
from pallas_kernels import nf4, nf4_matmul


@register("nf4")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Tensor:
    """A weight [out, in] in NF4 (see pallas_kernels/nf4.py for the format), or a stack of L of them.

    Attributes:
      codes: uint8 [out, in / 2].
      absmax: uint8 [blocks], or float32 without double quantization.
      nested_absmax: float32 [nested blocks], or None without double quantization.
      nested_offset: float32 [], or None.
      quant_map: float32 [16].
      nested_quant_map: float32 [256], or None.
      layer: which weight of a stack this is a view of (int32 scalar), or None.
      shape: (out, in).
      block_size, nested_block_size: values an absmax, absmax a nested_absmax.

    Of a stack every array has a leading axis [L].
    """

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    nested_offset: jax.Array | None
    quant_map: jax.Array
    nested_quant_map: jax.Array | None
    layer: jax.Array | None = None
    shape: tuple[int, int] = dataclasses.field(kw_only=True, metadata={"static": True})
    block_size: int = dataclasses.field(default=nf4.BLOCK_SIZE, metadata={"static": True})
    nested_block_size: int = dataclasses.field(default=nf4.NESTED_BLOCK_SIZE, metadata={"static": True})

    @classmethod
    def quantize(cls, w: jax.Array, double_quantization: bool = True) -> NF4Tensor:
        """Quantizes a float weight [out, in]; may be jitted.

        Raises:
          JaxftError: w is not a matrix with an even number of columns.
        """
        if w.ndim != 2 or w.shape[1] % 2:
            raise JaxftError(
                f"weight of shape {tuple(w.shape)}",
                "NF4 needs a matrix with an even number of columns",
                "Keep this weight out of the quantized ones",
            )
        rows, columns = w.shape
        nested_quant_map = jnp.asarray(nf4.NESTED_QUANT_MAP) if double_quantization else None
        return cls(
            *nf4.quantize(w, double_quantization=double_quantization),
            quant_map=jnp.asarray(nf4.QUANT_MAP),
            nested_quant_map=nested_quant_map,
            shape=(rows, columns),
        )

    @classmethod
    def stack(cls, tensors: list[NF4Tensor]) -> NF4Tensor:
        """Joins L weights of one shape into a stack.

        Raises:
          JaxftError: they differ in shape, block sizes or double quantization, or there is none.
        """
        if len({jax.tree.structure(t) for t in tensors}) != 1 or tensors[0].is_view:
            kinds = sorted({f"{t.shape}, blocks of {t.block_size}" for t in tensors})
            raise JaxftError("NF4 stack", f"needs weights of one kind, not {kinds}")
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *tensors)

    def unstack(self) -> list[NF4Tensor]:
        """The inverse of `stack`."""
        if not self.is_stack:
            raise JaxftError("NF4 weight", "is not a stack")
        return [jax.tree.map(lambda array, i=i: array[i], self) for i in range(self.codes.shape[0])]

    def at_layer(self, layer: jax.Array | int) -> NF4Tensor:
        """A view of one weight of a stack: the same arrays, read at `layer` when it is decoded."""
        if not self.is_stack:
            raise JaxftError("NF4 weight", "is not a stack, so it has no layers")
        return dataclasses.replace(self, layer=jnp.asarray(layer, jnp.int32))

    @property
    def is_stack(self) -> bool:
        return self.codes.ndim == 3 and self.layer is None

    @property
    def is_view(self) -> bool:
        return self.layer is not None

    def dequantize(self, dtype: Any = jnp.float32, row_scale: jax.Array | None = None) -> jax.Array:
        """The weight [out, in] in `dtype`, its rows times `row_scale` (float32 [out]), rounded once from float32."""
        return nf4.dequantize(**self.nf4_arguments(), dtype=dtype, row_scale=row_scale)

    def matmul(self, x: jax.Array) -> jax.Array:
        """x [T, in] times the weight's transpose, [T, out] in x's dtype; a GPU decodes the weight while it reads it."""
        return nf4_matmul(x, **self.nf4_arguments())

    def nf4_arguments(self) -> dict[str, Any]:
        """The weight as the ops of `pallas_kernels` take it."""
        if self.is_stack:
            raise JaxftError("NF4 stack", "has no single value", "Take a layer with at_layer first")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "shape"}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
