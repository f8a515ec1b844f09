"""Between tensors under Hugging Face names, one a layer, and a decoder's parameters, stacked over layers.

A parameter path is the HF name without the layer's number: ``model.layers.mlp.up_proj.weight`` [L, out, in] holds
``model.layers.{i}.mlp.up_proj.weight`` [out, in]. Stacking happens in `stack`, unstacking in `unstack`, nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder, abstract_decoder
from jaxft.models.layers import Constant
from jaxft.quant import QUANTIZATIONS, QTensor

LAYERS = "layers"


def hf_name(path: tuple[Any, ...], layer: int | None) -> str:
    """('model', 'layers', 'mlp', ...), 3 -> 'model.layers.3.mlp. ...'."""
    parts = [str(part) for part in path]
    if layer is not None:
        parts.insert(parts.index(LAYERS) + 1, str(layer))
    return ".".join(parts)


def hf_names(path: tuple[Any, ...], n_layers: int) -> list[str]:
    """The HF tensors behind one parameter: one a layer, or the one of that name."""
    if LAYERS in path:
        return [hf_name(path, layer) for layer in range(n_layers)]
    return [hf_name(path, None)]


def parameters(decoder: Decoder) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    """Every parameter with its path, in the module's order."""
    return list(nnx.to_flat_state(nnx.state(decoder)))


def stack(values: list[Any]) -> Any:
    """The layers' values, all arrays or all QTensors, as one with a leading [L]."""
    first = values[0]
    return first.stack(values) if isinstance(first, QTensor) else jnp.stack(values)


def unstack(value: Any) -> list[Any]:
    """The inverse of `stack`."""
    return value.unstack() if isinstance(value, QTensor) else list(value)


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor that a checkpoint of this config must hold, in the model's order."""
    found: dict[str, tuple[int, ...]] = {}
    for path, variable in parameters(abstract_decoder(config, jnp.float32)):
        shape = variable.get_value().shape
        for name in hf_names(path, config.num_hidden_layers):
            found[name] = shape[1:] if LAYERS in path else shape
    return found


def quantizable_tensors(config: DecoderConfig) -> list[str]:
    """HF names of the weights of the layers' linears, which quantization applies to."""
    paths = [path for path, _ in parameters(abstract_decoder(config, jnp.float32)) if is_quantizable(path)]
    return [name for path in paths for name in hf_names(path, config.num_hidden_layers)]


def build_decoder(
    config: DecoderConfig,
    read: Callable[[str], np.ndarray | QTensor],
    *,
    dtype: DTypeLike,
    quantization: str | None = None,
) -> Decoder:
    """A Decoder from tensors under HF names, never holding more than the finished parameters and one tensor.

    Stacks are allocated once and written in place, a layer at a time, and the layers come before embedding and head:
    the passing copies of a layer's weight then never meet the largest tensors.

    Args:
      config: the decoder's facts.
      read: called once for each name of `expected_tensors`; its array is cast to `dtype`. A weight that is quantized
        already comes as a QTensor and stays as it is.
      dtype: of every parameter that is not quantized.
      quantization: a name in `QUANTIZATIONS` for the weights of the layers' linears, quantized one layer at a time from
        the tensor as it was read; embedding, norms and head stay in `dtype`. None: nothing is quantized.
    """
    decoder = abstract_decoder(config, dtype)
    quantize = QUANTIZATIONS[quantization].quantize if quantization else None

    def load(name: str, quantized: bool) -> jax.Array | QTensor:
        value = read(name)
        if isinstance(value, QTensor):
            return value
        return quantize(jnp.asarray(value)) if quantized and quantize else jnp.asarray(value, dtype)

    for path, variable in sorted(parameters(decoder), key=lambda item: LAYERS not in item[0]):
        names = hf_names(path, config.num_hidden_layers)
        values = (load(name, is_quantizable(path)) for name in names)
        variable.set_value(_stack_one_by_one(names, values) if LAYERS in path else next(values))
    nnx.update(decoder, nnx.from_flat_state(parameters(decoder)))
    return decoder


def _stack_one_by_one(names: list[str], values: Iterator[Any]) -> Any:
    """`stack` of values of one kind, each of which is let go before the next one is made."""
    stacked, structure = None, None
    for index, name in enumerate(names):
        value = next(values)
        if stacked is None:
            structure = jax.tree.structure(value)
            stacked = jax.tree.map(lambda leaf: jnp.zeros((len(names), *leaf.shape), leaf.dtype), value)
        elif jax.tree.structure(value) != structure:
            raise JaxftError(f"tensor {name}", f"is quantized in another way than {names[0]}")
        stacked = jax.block_until_ready(_set_layer(stacked, value, jnp.int32(index)))
        del value
    return stacked


@partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: Any, value: Any, layer: jax.Array) -> Any:
    """`stacked` with `value` at index `layer` of every array, written in place."""
    return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, layer, 0), stacked, value)


def is_quantizable(path: tuple[Any, ...]) -> bool:
    """Whether this parameter is the weight of a linear inside a layer."""
    return LAYERS in path and str(path[-2]).endswith("_proj") and path[-1] == "weight"


class TensorView(NamedTuple):
    """One HF tensor of a decoder's base: one layer of a parameter, or the whole of it where `layer` is None."""

    value: jax.Array | QTensor
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, without the stack's leading [L]."""
        whole = self.layer is None or isinstance(self.value, QTensor)  # a stack of QTensors has one weight's shape
        return tuple(self.value.shape if whole else self.value.shape[1:])

    def quantized(self) -> QTensor | None:
        """The weight as it is held, on its device; None where it is not quantized."""
        if not isinstance(self.value, QTensor):
            return None
        return self.value if self.layer is None else jax.tree.map(lambda array: array[self.layer], self.value)

    def read(self) -> np.ndarray:
        """The values on the host; a quantized weight comes dequantized, in float32."""
        if isinstance(self.value, QTensor):
            view = self.value if self.layer is None else self.value.at_layer(jnp.int32(self.layer))
            return np.asarray(view.dequantize(jnp.float32))
        return np.asarray(self.value if self.layer is None else self.value[self.layer])


def tensor_views(decoder: Decoder) -> dict[str, TensorView]:
    """HF name -> view of every tensor of the decoder's base, adapters left out."""
    views: dict[str, TensorView] = {}
    for path, variable in parameters(decoder):
        if not isinstance(variable, nnx.LoRAParam | Constant):
            stacked = LAYERS in path
            for layer, name in enumerate(hf_names(path, decoder.config.num_hidden_layers)):
                views[name] = TensorView(variable.get_value(), layer if stacked else None)
    return views
