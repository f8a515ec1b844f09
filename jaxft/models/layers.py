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


LAYERS, EXPERTS = "layers", "experts"  # in the paths of parameters
ROW_NORMS = "dora_norms"  # checkpoint name of the norms of W + scale B A's rows: tiny, and a product with W to make


class Constant(nnx.Variable):
    """What attaching an adapter computed from the base. It never trains, and no checkpoint holds it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer of a frozen stack of weights [L, out, in] or [L, E, out, in], read where it is used.

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

    def dequantize(self, dtype: DTypeLike, row_scale: jax.Array | None = None) -> jax.Array:
        """The layer's weight, [out, in] or [E, out, in], in `dtype`; of one [out, in] the rows times `row_scale`
        (float32 [out]) where there is one."""
        weight = jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)
        if row_scale is not None:
            weight = weight.astype(jnp.float32) * row_scale[:, None]
        return weight.astype(dtype)


def is_linear_weight(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a linear's weight, by Hugging Face's names: q_proj, kv_a_proj_with_mqa."""
    return path[-1] == "weight" and "_proj" in str(path[-2])


def is_quantizable(path: tuple[Any, ...]) -> bool:
    """Whether this parameter is the weight of a linear inside a layer, experts left out."""
    return LAYERS in path and is_linear_weight(path) and EXPERTS not in path


def at_layer(frozen: nnx.State, layer: jax.Array) -> nnx.State:
    """One layer of a frozen stack of parameters: weights and factors of linears as views, the small rest as slices."""

    def view(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QTensor):
            return variable.replace(value.at_layer(layer))
        factor = path[-1] in ("lora_A", "lora_B") and value.ndim == 3  # experts have one more
        if factor or is_linear_weight(path):
            return variable.replace(LayerView(value, layer))
        return variable.replace(jax.lax.dynamic_index_in_dim(value, layer, keepdims=False))

    return nnx.map_state(view, frozen)


class Linear(nnx.Module):
    """y = x W^T + b, plus scale * (x A^T) B^T once `jaxft.lora.attach` has added the pair.

    `weight` [out, in] is an array or a QTensor; a stack of layers has a leading [L] on every parameter (`stack`). With
    a magnitude (DoRA) the rows of W + scale B A are brought to it.
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
        self.dtype = dtype
        self.stack = stack
        self.weight = nnx.Param(normal(rngs, (*stack, out_features, in_features), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((*stack, out_features), dtype)) if bias else None)
        self.lora_A: nnx.LoRAParam | None = nnx.data(None)
        self.lora_B: nnx.LoRAParam | None = nnx.data(None)
        self.lora_magnitude_vector: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_scales: Constant | None = nnx.data(None)
        self.lora_dropout = 0.0
        self.lora_ranks: tuple[int, ...] = ()
        self.squared_norms: Constant | None = nnx.data(None)
        self.initial_A: Constant | None = nnx.data(None)
        self.initial_B: Constant | None = nnx.data(None)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]; LoRA dropout is applied only with a key."""
        return pk.lora_linear(x, **self.parameters(dropout_key)._asdict(), dropout=self.lora_dropout)

    def parameters(self, dropout_key: jax.Array | None = None) -> pk.LoraWeights:
        """What `pallas_kernels` computes with; the dropout key becomes this linear's own."""
        if dropout_key is not None:
            dropout_key = jax.random.fold_in(dropout_key, zlib.crc32(self.name.encode()) & 0x7FFFFFFF)
        parts = (self.bias, self.lora_A, self.lora_B)
        return pk.LoraWeights(
            self.weight.get_value(),
            *(None if part is None else part.get_value() for part in parts),
            scale=adapter_scale(self),
            dropout_key=dropout_key,
            row_scale=self._row_scale(),
        )

    def _row_scale(self) -> jax.Array | None:
        """DoRA's magnitude over the norm of each row of W + scale B A, float32 [out]."""
        if self.lora_magnitude_vector is None:
            return None
        assert self.lora_A is not None
        assert self.lora_B is not None
        assert self.squared_norms is not None
        scale = adapter_scale(self)
        lora_A, lora_B = (pk.decoded(pair.get_value(), jnp.float32) for pair in (self.lora_A, self.lora_B))
        norms = pk.row_norms(self.weight.get_value(), self.squared_norms.get_value(), lora_A, lora_B, scale, self.dtype)
        return magnitude_over_norm(self.lora_magnitude_vector.get_value(), norms, scale)

    def effective_weight(self) -> jax.Array:
        """The one weight [out, in] that computes the same, in float32: a head's, which losses take as a matrix."""
        linear = self.parameters()
        weight = pk.decoded(linear.weight, jnp.float32)
        if linear.lora_A is None or linear.lora_B is None:
            return weight
        A, B = (factor.astype(jnp.float32) for factor in (linear.lora_A, linear.lora_B))
        weight = weight + linear.scale * jnp.einsum("or,ri->oi", B, A, precision="highest")
        return weight if linear.row_scale is None else weight * linear.row_scale[:, None]


def adapter_scale(module: Linear | Embedding) -> float | jax.Array:
    """What B A x is multiplied by: one number, or of a layer of a stack whose layers differ, a float32 scalar."""
    return module.lora_scale if module.lora_scales is None else module.lora_scales.get_value()


def magnitude_over_norm(magnitude: jax.Array, norms: jax.Array, scale: float | jax.Array) -> jax.Array:
    """DoRA's factor of each row; 1 where the scale is 0, which says that this layer of a stack has no adapter."""
    norms = checkpoint_name(norms, ROW_NORMS)
    ratio = magnitude / jnp.where(norms == 0, 1, norms)
    return jnp.where(jnp.asarray(scale, jnp.float32).reshape(1) == 0, 1, ratio)


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
        weight, bias, lora_A, lora_B, scale, *_ = self.parameters()
        y = pk.grouped_matmul(x, weight, group_sizes, lora_A, lora_B, scale=scale)
        if bias is None:
            return y
        ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
        expert = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=jnp.int32), side="right", method="compare_all")
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
    """Rows of `weight` [V, D] by token id, in `dtype`; plus scale * B A[:, token] with an adapter [D, r], [r, V].

    DoRA's magnitude is of the D columns, as PEFT has it.
    """

    def __init__(self, vocab_size: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.in_features = vocab_size
        self.out_features = features
        self.dtype = dtype
        self.weight = nnx.Param(normal(rngs, (vocab_size, features), dtype))
        self.lora_embedding_A: nnx.LoRAParam | None = nnx.data(None)
        self.lora_embedding_B: nnx.LoRAParam | None = nnx.data(None)
        self.lora_magnitude_vector: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_scales: Constant | None = nnx.data(None)
        self.lora_ranks: tuple[int, ...] = ()
        self.squared_norms: Constant | None = nnx.data(None)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        rows = jnp.take(self.weight.get_value(), tokens, axis=0)
        if self.lora_embedding_A is None or self.lora_embedding_B is None:
            return rows.astype(self.dtype)
        A, B, scale = self.lora_embedding_A.get_value(), self.lora_embedding_B.get_value(), adapter_scale(self)
        low = jnp.take(A.astype(jnp.float32), tokens, axis=1)
        change = jnp.einsum("r...,dr->...d", low, B.astype(jnp.float32), precision="highest")
        rows = rows.astype(jnp.float32) + scale * change
        if self.lora_magnitude_vector is not None and self.squared_norms is not None:
            columns = self.weight.get_value().T
            norms = pk.row_norms(columns, self.squared_norms.get_value(), A, B, scale, self.dtype)
            factor = magnitude_over_norm(self.lora_magnitude_vector.get_value(), norms, scale)
            rows = rows * jnp.broadcast_to(factor, rows.shape)
        return rows.astype(self.dtype)
