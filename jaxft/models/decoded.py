"""Weights of linears that are decoded once and kept, an array for each layer: memory for time.

A scan reads a layer's weights out of their stack, which copies an array of floats and decodes a quantized one in every
pass. Straight code reads each layer's array where it lies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxft.models.config import DecoderConfig
from jaxft.models.layers import LayerView, is_quantizable
from jaxft.models.remat import keeps_weights
from jaxft.quant import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodedLayers:
    """The weights [out, in] of a stack's layers, an array each."""

    layers: tuple[jax.Array, ...]


def frozen_for(decoder: Any, frozen: nnx.State) -> nnx.State:
    """The frozen parameters as the decoder's remat policy wants them; arrays or, under `jax.eval_shape`, shapes."""
    if not keeps_weights(decoder.remat):
        return frozen
    return decode_layers(decoder.config, frozen, decoder.model.embed_tokens.dtype)


def decode_layers(config: DecoderConfig, frozen: nnx.State, dtype: DTypeLike, *, quantized: bool = True) -> nnx.State:
    """The frozen parameters of a decoder with every stack of linears' weights as `DecodedLayers` in `dtype`.

    Experts stay as they are, what is not a layer's, and without `quantized` what is quantized. A decoder that is merged
    with the result runs its layers as straight code, whatever its remat policy says of a scan.
    """

    def decode(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        stack = variable.get_value()
        if not is_quantizable(path) or (isinstance(stack, QTensor) and not quantized):
            return variable
        kinds = config.block_kinds
        of_path = next((index for index, kind in enumerate(kinds) if kind in path), 0)
        layers = range(len(config.layers_of(kinds[of_path])))
        return variable.replace(DecodedLayers(tuple(_decoded(stack, layer, dtype) for layer in layers)))

    return nnx.map_state(decode, frozen)


def decoded_bytes(
    config: DecoderConfig, frozen: nnx.State, dtype: DTypeLike, *, quantized: bool = True
) -> tuple[int, int]:
    """(bytes of the weights that `decode_layers` makes, bytes of the stacks that it makes them of), from shapes."""
    made = jax.eval_shape(lambda frozen: decode_layers(config, frozen, dtype, quantized=quantized), frozen)
    decoded, rest = nnx.split_state(made, is_decoded, ...)
    return _bytes(decoded), _bytes(frozen) - _bytes(rest)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnames="dtype")
def _decoded(stack: Any, layer: Any, dtype: DTypeLike) -> jax.Array:
    view = stack.at_layer(layer) if isinstance(stack, QTensor) else LayerView(stack, layer)
    return view.dequantize(dtype)


def is_decoded(path: tuple[Any, ...], variable: Any) -> bool:
    """An nnx filter: the variables that are `DecodedLayers`."""
    return isinstance(variable, nnx.Variable) and isinstance(variable.get_value(), DecodedLayers)


def layers_of(decoded: nnx.State, which: slice) -> nnx.State:
    """Some of the layers of a state of `DecodedLayers`."""
    return jax.tree.map(
        lambda value: DecodedLayers(value.layers[which]), decoded, is_leaf=lambda x: isinstance(x, DecodedLayers)
    )


def straight_scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` as straight code, over inputs among which there are `DecodedLayers`."""
    leaves, tree = jax.tree.flatten(inputs, is_leaf=lambda x: isinstance(x, DecodedLayers))
    results = []
    for iteration in zip(*map(_each, leaves), strict=True):
        carry, result = body(carry, jax.tree.unflatten(tree, iteration))
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def _each(leaf: jax.Array | DecodedLayers) -> Sequence[jax.Array]:
    """What the iterations get of an input. The gradient of `jax.lax.split` is one array; of indexing, a sum of many."""
    if isinstance(leaf, DecodedLayers):
        return leaf.layers
    return [jnp.squeeze(part, 0) for part in jax.lax.split(leaf, [1] * leaf.shape[0])]
