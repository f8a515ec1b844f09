"""What a quantized weight is, and the registry of quantizations by name."""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import jax


@runtime_checkable
class QTensor(Protocol):
    """A frozen weight [out, in] in fewer bits, or a stack of L such weights; a JAX pytree.

    Attributes:
      shape: (out, in), of one weight.
    """

    shape: tuple[int, int]

    @classmethod
    def quantize(cls, w: jax.Array) -> Self:
        """Quantizes a float weight [out, in]."""
        ...

    @classmethod
    def stack(cls, tensors: list[Self]) -> Self:
        """Joins L weights of one shape; every array gets a leading axis [L]."""
        ...

    def unstack(self) -> list[Self]:
        """The inverse of `stack`."""
        ...

    def at_layer(self, layer: jax.Array | int) -> Self:
        """A view of one weight of a stack: the same arrays, read at an index when the weight is decoded."""
        ...

    def dequantize(self, dtype: Any, row_scale: jax.Array | None = None) -> jax.Array:
        """The weight [out, in] in `dtype`, its rows times `row_scale` (float32 [out]) where there is one."""
        ...

    def matmul(self, x: jax.Array) -> jax.Array:
        """x [T, in] times the weight's transpose, [T, out] in x's dtype, for few tokens and without a gradient."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        ...


QTensorClass = TypeVar("QTensorClass", bound=type[QTensor])

QUANTIZATIONS: dict[str, type[QTensor]] = {}


def register(name: str) -> Any:
    """Class decorator: makes a quantization available by name."""

    def add(cls: QTensorClass) -> QTensorClass:
        QUANTIZATIONS[name] = cls
        return cls

    return add
