"""The leaves of the decoder: linear (with its LoRA pair), norms, embedding. Weights stay ``[out, in]`` as in HF."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

import pallas_kernels as pk
from jaxft.models.config import DecoderConfig
from jaxft.quant import QTensor


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Random weights of standard deviation 0.02."""
    return (0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer of a frozen stack of weights [L, out, in] or [L, E, out, in], read where it is used.

    It has the `dequantize` of a QTensor, so a linear saves the stack and the index for its backward pass, which a scan
    over layers shares, instead of a slice, which it would copy once a layer.
    """

    stack: jax.Array
    layer: jax.Array

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The layer's weight, [out, in] or [E, out, in], in `dtype`."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False).astype(dtype)


def at_layer(frozen: nnx.State, layer: jax.Array) -> nnx.State:
    """One layer of a frozen stack of parameters: weights of linears as views, the small rest as slices."""

    def view(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QTensor):
            return variable.replace(value.at_layer(layer))
        if path[-1] == "weight" and str(path[-2]).endswith("_proj"):
            return variable.replace(LayerView(value, layer))
        return variable.replace(jax.lax.dynamic_index_in_dim(value, layer, keepdims=False))

    return nnx.map_state(view, frozen)


class Linear(nnx.Module):
    """y = x W^T + b, plus scale * (x A^T) B^T once `jaxft.lora.attach` has added the pair.

    `weight` [out, in] is an array or a QTensor; a stack of layers has a leading [L] on every parameter (`stack`).
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
        self.stack = stack
        self.weight = nnx.Param(normal(rngs, (*stack, out_features, in_features), dtype))
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


class ExpertLinear(Linear):
    """E linears side by side, of which each row of x goes through one.

    Every parameter has a leading [E], behind the [L] of a stack of layers. The adapters are split, too: for each expert
    (x A^T) B^T, never W + B A.
    """

    def __call__(self, x: jax.Array, group_sizes: jax.Array, row_scale: jax.Array | None = None) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [M, in] -> [M, out], sorted by expert: int32 [E] rows for each; rows beyond them give zeros.

        Args:
          row_scale: float32 [M, 1], what x was multiplied by: the bias is multiplied by it, too.
        """
        weight, bias, lora_A, lora_B, scale, _ = self.parameters()
        y = pk.grouped_matmul(x, weight, group_sizes, lora_A, lora_B, scale=scale)
        if bias is None:
            return y
        ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
        expert = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=jnp.int32), side="right")
        bias = jnp.take(bias, expert, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
        return (y.astype(jnp.float32) + (bias if row_scale is None else bias * row_scale)).astype(x.dtype)


def dropout_rate(*linears: Linear) -> float:
    """The dropout of those linears that have an adapter; `jaxft.lora.attach` gives them all the same."""
    return max(linear.lora_dropout for linear in linears)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(
        self, features: int, eps: float, *, stack: tuple[int, ...], dtype: DTypeLike, weight_offset: float = 0.0
    ) -> None:
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nnx.Param(jnp.full((*stack, features), 1 - weight_offset, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.rms_norm(x, self.weight.get_value(), eps=self.eps, weight_offset=self.weight_offset)

    def add(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the norm of x + residual, x + residual), in one pass."""
        weight = self.weight.get_value()
        return pk.add_rms_norm(x, residual, weight, eps=self.eps, weight_offset=self.weight_offset)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450).

    Computed in float32, returned in x's dtype. `shape` is the weight's: [features], or [heads, features] for weights of
    each head's own.
    """

    def __init__(
        self, shape: tuple[int, ...], eps: float, *, bias: bool, stack: tuple[int, ...], dtype: DTypeLike
    ) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((*stack, *shape), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((*stack, *shape), dtype)) if bias else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        centred = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        normed = normed * jnp.broadcast_to(self.weight.get_value().astype(jnp.float32), x.shape)
        if self.bias is not None:
            normed = normed + jnp.broadcast_to(self.bias.get_value().astype(jnp.float32), x.shape)
        return normed.astype(x.dtype)

    def add(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the norm of x + residual, x + residual)."""
        total = checkpoint_name(x + residual, "mid")
        return self(total), total


Norm = RMSNorm | LayerNorm


def make_norm(config: DecoderConfig, *shape: int, stack: tuple[int, ...], dtype: DTypeLike) -> Norm:
    """The config's kind of norm; `shape` is its weight's."""
    if config.norm == "layer_norm":
        return LayerNorm(shape, config.rms_norm_eps, bias=config.norm_bias, stack=stack, dtype=dtype)
    (features,) = shape
    return RMSNorm(features, config.rms_norm_eps, stack=stack, dtype=dtype, weight_offset=config.norm_weight_offset)


class Embedding(nnx.Module):
    """Rows of `weight` [V, D] by token id."""

    def __init__(self, vocab_size: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(normal(rngs, (vocab_size, features), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.weight.get_value(), tokens, axis=0)
