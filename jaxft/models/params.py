"""Between tensors under Hugging Face names, one a layer, and a decoder's parameters, stacked over layers.

A parameter path is the HF name without numbers: ``model.layers.mlp.up_proj.weight`` [L, out, in] holds
``model.layers.{i}.mlp.up_proj.weight`` [out, in], and ``model.layers.mlp.experts.up_proj.weight`` [L, E, out, in] holds
``model.layers.{i}.mlp.experts.{e}.up_proj.weight``. Where blocks are of several kinds, ``layers`` is followed by the
kind, and L counts its layers. Stacking happens in `stack`, unstacking in `unstack`, nowhere else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig, MLPLayerType
from jaxft.models.decoder import Decoder, abstract_decoder
from jaxft.models.layers import EXPERTS, LAYERS, Constant, is_linear_weight, is_quantizable
from jaxft.quant import QUANTIZATIONS, QTensor


def stack_shape(path: tuple[Any, ...], config: DecoderConfig) -> tuple[int, ...]:
    """The leading axes of a parameter, each of whose entries is an HF tensor: (), (L,) or (L, E)."""
    return tuple(len(numbers) for _, numbers in _axes(path, config))


def hf_names(path: tuple[Any, ...], config: DecoderConfig) -> list[str]:
    """The HF tensors behind one parameter, in the order of its leading axes."""
    axes = _axes(path, config)
    names = []
    for numbers in itertools.product(*(numbers for _, numbers in axes)):
        number_of = {axis: str(number) for (axis, _), number in zip(axes, numbers, strict=True)}
        parts = (part for part in map(str, path) if part not in get_args(MLPLayerType))
        names.append(".".join(f"{part}.{number_of[part]}" if part in number_of else part for part in parts))
    return names


def _axes(path: tuple[Any, ...], config: DecoderConfig) -> list[tuple[str, Sequence[int]]]:
    """(part of the path, the numbers that follow it in HF names) for each leading axis."""
    if LAYERS not in path:
        return []
    kind = path[path.index(LAYERS) + 1]
    layers = config.layers_of(kind) if kind in get_args(MLPLayerType) else range(config.num_hidden_layers)
    experts = [(EXPERTS, range(config.moe.num_experts))] if config.moe and EXPERTS in path else []
    return [(LAYERS, layers), *experts]


def parameters(decoder: Decoder) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    """Every parameter with its path, in the module's order."""
    return list(nnx.to_flat_state(nnx.state(decoder)))


def stack(values: list[Any], shape: tuple[int, ...]) -> Any:
    """HF tensors' values, all arrays or all QTensors, as one with leading axes `shape`, (L,) or (L, E)."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), stacked)


def unstack(value: Any, axes: int) -> list[Any]:
    """The inverse of `stack`, of so many leading axes."""
    leaves, structure = jax.tree.flatten(value)
    shape = leaves[0].shape[:axes]
    return [structure.unflatten([leaf[index] for leaf in leaves]) for index in np.ndindex(shape)]


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor that a checkpoint of this config must hold, in the model's order."""
    found: dict[str, tuple[int, ...]] = {}
    for path, shape in _shapes(config):
        for name in hf_names(path, config):
            found[name] = shape[len(stack_shape(path, config)) :]
    return found


def quantizable_tensors(config: DecoderConfig) -> list[str]:
    """HF names of the weights of the layers' linears, which quantization applies to."""
    return [name for path, _ in _shapes(config) if is_quantizable(path) for name in hf_names(path, config)]


@functools.lru_cache(maxsize=8)
def _shapes(config: DecoderConfig) -> tuple[tuple[tuple[Any, ...], tuple[int, ...]], ...]:
    """(path, shape) of every parameter. Tracing a decoder takes 50 ms, and a conversion asks more than once."""
    return tuple((path, v.get_value().shape) for path, v in parameters(abstract_decoder(config, jnp.float32)))


def build_decoder(
    config: DecoderConfig,
    read: Callable[[str], np.ndarray | QTensor],
    *,
    dtype: DTypeLike,
    quantization: str | None = None,
    expert_quantization: str | None = None,
) -> Decoder:
    """A Decoder from tensors under HF names, never holding more than the finished parameters and one tensor.

    Stacks are allocated once and written in place, a layer at a time, and the layers come before embedding and head:
    the passing copies of a layer's weight then never meet the largest tensors.

    Args:
      config: the decoder's facts.
      read: called once for each name of `expected_tensors`; its array is cast to `dtype`. A weight that is quantized
        already comes as a QTensor and stays as it is.
      dtype: of every parameter that is not quantized, but for those that are always in float32.
      quantization: a name in `QUANTIZATIONS` for the weights of the layers' linears, quantized one layer at a time from
        the tensor as it was read; embedding, norms and head stay in `dtype`. None: nothing is quantized.
      expert_quantization: the same for the experts' linears.
    """
    decoder = abstract_decoder(config, dtype)

    def load(name: str, quantization: str | None, dtype: DTypeLike) -> jax.Array | QTensor:
        value = read(name)
        if isinstance(value, QTensor):
            return value
        if quantization:
            return QUANTIZATIONS[quantization].quantize(jnp.asarray(value))
        return jnp.asarray(value, dtype)

    for path, variable in sorted(parameters(decoder), key=lambda item: LAYERS not in item[0]):
        names = hf_names(path, config)
        of_linear = expert_quantization if EXPERTS in path else quantization
        quantized = of_linear if LAYERS in path and is_linear_weight(path) else None
        values = (load(name, quantized, variable.get_value().dtype) for name in names)
        shape = stack_shape(path, config)
        variable.set_value(_stack_one_by_one(names, values, shape) if shape else next(values))
    nnx.update(decoder, nnx.from_flat_state(parameters(decoder)))
    return decoder


def _stack_one_by_one(names: list[str], values: Iterator[Any], shape: tuple[int, ...]) -> Any:
    """`stack` of values of one kind, each of which is let go before the next one is made."""
    stacked, structure = None, None
    for index, name in zip(np.ndindex(shape), names, strict=True):
        value = next(values)
        if stacked is None:
            structure = jax.tree.structure(value)
            stacked = jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape), leaf.dtype), value)
        elif jax.tree.structure(value) != structure:
            raise JaxftError(f"tensor {name}", f"is quantized in another way than {names[0]}")
        stacked = jax.block_until_ready(_set(stacked, value, np.asarray(index, np.int32)))
        del value
    return stacked


@partial(jax.jit, donate_argnums=0)
def _set(stacked: Any, value: Any, index: jax.Array) -> Any:
    """`stacked` with `value` at `index` of every array's leading axes, written in place."""

    def write(every: jax.Array, one: jax.Array) -> jax.Array:
        start = (*index, *(jnp.int32(0) for _ in one.shape))
        return jax.lax.dynamic_update_slice(every, one.reshape((1,) * len(index) + one.shape), start)

    return jax.tree.map(write, stacked, value)


class TensorView(NamedTuple):
    """One HF tensor of a decoder's base: what a parameter holds at `index` of its leading axes."""

    value: jax.Array | QTensor
    index: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, without the stack's leading axes."""
        whole = isinstance(self.value, QTensor)  # a stack of QTensors has one weight's shape
        return tuple(self.value.shape if whole else self.value.shape[len(self.index) :])

    def quantized(self) -> QTensor | None:
        """The weight as it is held, on its device; None where it is not quantized."""
        if not isinstance(self.value, QTensor):
            return None
        return jax.tree.map(lambda array: array[self.index], self.value)

    def read(self) -> np.ndarray:
        """The values on the host; a quantized weight comes dequantized, in float32."""
        if isinstance(self.value, QTensor):
            return np.asarray(jax.tree.map(lambda array: array[self.index], self.value).dequantize(jnp.float32))
        return np.asarray(self.value[self.index])


def tensor_views(decoder: Decoder) -> dict[str, TensorView]:
    """HF name -> view of every tensor of the decoder's base, adapters left out."""
    views: dict[str, TensorView] = {}
    for path, variable in parameters(decoder):
        if not isinstance(variable, nnx.LoRAParam | Constant):
            indices = np.ndindex(stack_shape(path, decoder.config))
            for index, name in zip(indices, hf_names(path, decoder.config), strict=True):
                views[name] = TensorView(variable.get_value(), index)
    return views
