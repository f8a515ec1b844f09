"""The leaves of the decoder: linear (with its LoRA pair), RMSNorm, embedding. Weights stay ``[out, in]`` as in HF."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import pallas_kernels as pk
from jaxft.quant import QTensor


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return (0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer of a frozen stack of weights [L, out, in], read where it is used.

    It has the `dequantize` of a QTensor, so a linear saves the stack and the index for its backward pass, which a scan
    over layers shares, instead of a slice, which it would copy once a layer.
    """

    stack: jax.Array
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self) -> Any:
        return self.stack.dtype

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The layer's weight [out, in] in `dtype`."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False).astype(dtype)


def at_layer(frozen: nnx.State, layer: jax.Array) -> nnx.State:
    """One layer of a frozen stack of parameters: weights of linears as views, the small rest as slices."""

    def view(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QTensor):
            return variable.replace(value.at_layer(layer))
        if value.ndim == 3:
            return variable.replace(LayerView(value, layer))
        return variable.replace(jax.lax.dynamic_index_in_dim(value, layer, keepdims=False))

    return nnx.map_state(view, frozen)


class Linear(nnx.Module):
    """y = x W^T + b, plus scale * (x A^T) B^T once `jaxft.lora.attach` has added the pair.

    `weight` [out, in] is an array or a QTensor; a stack of layers has a leading [L] on every parameter.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        stack: tuple[int, ...],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.name = name
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nnx.Param(_normal(rngs, (*stack, out_features, in_features), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((*stack, out_features), dtype)) if bias else None)
        self.lora_A: nnx.LoRAParam | None = nnx.data(None)
        self.lora_B: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_dropout = 0.0

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]; LoRA dropout is applied only with a key."""
        return pk.lora_linear(x, **self.parameters(dropout_key)._asdict(), dropout=self.lora_dropout)

    def parameters(self, dropout_key: jax.Array | None = None) -> pk.LoraWeights:
        """What `pallas_kernels` computes with; the dropout key becomes this linear's own."""
        if dropout_key is not None:
            dropout_key = jax.random.fold_in(dropout_key, zlib.crc32(self.name.encode()) & 0x7FFFFFFF)
        return pk.LoraWeights(
            self.weight.get_value(),
            *(None if part is None else part.get_value() for part in (self.bias, self.lora_A, self.lora_B)),
            scale=self.lora_scale,
            dropout_key=dropout_key,
        )


def dropout_rate(*linears: Linear) -> float:
    """The dropout of those linears that have an adapter; `jaxft.lora.attach` gives them all the same."""
    return max(linear.lora_dropout for linear in linears)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, features: int, eps: float, *, stack: tuple[int, ...], dtype: DTypeLike) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((*stack, features), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.rms_norm(x, self.weight.get_value(), eps=self.eps)

    def add(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the norm of x + residual, x + residual), in one pass."""
        return pk.add_rms_norm(x, residual, self.weight.get_value(), eps=self.eps)


class Embedding(nnx.Module):
    """Rows of `weight` [V, D] by token id."""

    def __init__(self, vocab_size: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(_normal(rngs, (vocab_size, features), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.weight.get_value(), tokens, axis=0)
