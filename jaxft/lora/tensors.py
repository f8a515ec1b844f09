"""An adapter as tensors under Hugging Face names, one a layer, out of a decoder and into it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.errors import JaxftError
from jaxft.lora.config import LoraConfig
from jaxft.lora.targets import Module, base_parameters, modules
from jaxft.models.decoder import Decoder
from jaxft.models.labels import is_trainable
from jaxft.models.layers import Linear
from jaxft.models.params import hf_names, stack_shape
from jaxft.quant import QTensor

# The attributes of a module that make up its adapter: how PEFT's name for each ends, and which axis has the rank.
_PARTS: dict[str, tuple[str, int | None]] = {
    "lora_A": ("lora_A.weight", -2),
    "lora_B": ("lora_B.weight", -1),
    "lora_embedding_A": ("lora_embedding_A", -2),
    "lora_embedding_B": ("lora_embedding_B", -1),
    "lora_magnitude_vector": ("lora_magnitude_vector", None),
}
_INITIAL = {"lora_A": "initial_A", "lora_B": "initial_B"}


class _Part(NamedTuple):
    """One variable behind an adapter's tensors.

    Attributes:
      variable: its value may be a stack of layers, and of experts in each.
      stack: its leading axes.
      names: of the tensors, in the stack's order.
      ranks: of each; 0 where there is no tensor. None: every entry is a tensor, all of it.
      axis: which one the rank cuts.
    """

    variable: nnx.Variable
    stack: tuple[int, ...]
    names: list[str]
    ranks: tuple[int, ...] | None
    axis: int | None

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, values) of each."""
        entries = self._entries(np.asarray(self.variable.get_value()))
        for index, (name, entry) in enumerate(zip(self.names, entries, strict=True)):
            rank = None if self.ranks is None else self.ranks[index]
            if rank != 0:
                yield name, entry if rank is None or self.axis is None else _cut(entry, rank, self.axis)

    def set(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The inverse of `tensors`; where there is none the values stay."""
        old = self.variable.get_value()
        new = np.array(old)
        entries = self._entries(new)
        for index, name in enumerate(self.names):
            if name in tensors:
                entry = entries[index]
                (entry if self.axis is None else _cut(entry, tensors[name].shape[self.axis], self.axis))[...] = tensors[
                    name
                ]
        self.variable.set_value(jnp.asarray(new, old.dtype))

    def _entries(self, value: np.ndarray) -> np.ndarray:
        """A view with one axis in the place of the stack's."""
        return value.reshape(len(self.names), *value.shape[len(self.stack) :])


def _cut(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    return array[:rank] if axis == -2 else array[:, :rank]


def _parts(decoder: Decoder) -> Iterator[_Part]:
    """Everything that the adapter is made of, and then the parameters of the base that train."""
    for path, module in modules(decoder).items():
        for attribute, (suffix, axis) in _PARTS.items():
            variable = getattr(module, attribute, None)
            if variable is not None:
                yield _part(decoder, variable, (*path.split("."), suffix), module.lora_ranks, axis)
    yield from (part for part in _base_parts(decoder) if is_trainable((), part.variable))


def _base_parts(decoder: Decoder) -> Iterator[_Part]:
    """The parameters of the base that are not quantized."""
    for path, variable in base_parameters(decoder):
        if not isinstance(variable.get_value(), QTensor):
            yield _part(decoder, variable, path, None, None)


def _part(decoder: Decoder, variable: nnx.Variable, path: tuple[Any, ...], ranks: Any, axis: int | None) -> _Part:
    return _Part(variable, stack_shape(path, decoder.config), hf_names(path, decoder.config), ranks, axis)


def adapter_tensors(decoder: Decoder) -> dict[str, np.ndarray]:
    """The adapter under HF names: 'model.layers.{i}.self_attn.q_proj.lora_A.weight' -> float array, one a layer.

    Parameters of the base that train (modules_to_save, biases) come under their own names.
    """
    return {name: array for part in _parts(decoder) for name, array in part.tensors()}


def load_adapter_tensors(decoder: Decoder, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts an adapter's values (names as `adapter_tensors` gives them) into a decoder that `attach` prepared.

    Other parameters of the base may be among them; peft stores the weights of adapted embeddings.

    Raises:
      JaxftError: missing, unexpected or mis-shaped tensors, all of them listed.
    """
    expected = {name: array.shape for name, array in adapter_tensors(decoder).items()}
    problems = [f"missing {name}" for name in expected if name not in tensors]
    more = [part for part in _base_parts(decoder) if tensors.keys() & set(part.names) - expected.keys()]
    expected |= {name: array.shape for part in more for name, array in part.tensors() if name in tensors}
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise JaxftError("adapter", f"does not fit this model: {'; '.join(problems)}")
    for part in (*_parts(decoder), *more):
        part.set(tensors)


def from_original(decoder: Decoder, config: LoraConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """(settings, tensors) of the adapter that does to the original weights what this one does to the decoder's.

    Where an adapter started as a part of the weights (see `jaxft.lora.start`), s B0 A0, what it learnt is
    s (B A - B0 A0): an adapter of twice the rank, [A; A0] and [B, -B0], as peft converts PiSSA. For PiSSA and OLoRA
    this is exact, for LoftQ up to what its start left of the quantization error. Any other adapter comes as it is.
    """
    tensors = adapter_tensors(decoder)
    starts = {path: m for path, m in modules(decoder).items() if isinstance(m, Linear) and m.initial_A is not None}
    if not starts:
        return config, tensors
    for path, module in starts.items():
        for attribute, initial in _INITIAL.items():
            suffix, axis = _PARTS[attribute]
            variable, parts = getattr(module, initial), (*path.split("."), suffix)
            for name, first in _part(decoder, variable, parts, module.lora_ranks, axis).tensors():
                sign = 1 if attribute == "lora_A" else -1
                tensors[name] = np.concatenate([tensors[name], sign * first], axis=axis)
    growth = math.sqrt(2) if config.use_rslora else 2
    doubled = dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: growth * alpha for pattern, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return doubled, tensors


def as_it_is(decoder: Decoder, config: LoraConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """(settings, tensors) of the adapter beside the decoder's own weights, whatever they are."""
    return dataclasses.replace(config, init_lora_weights=True), adapter_tensors(decoder)


def to_save(decoder: Decoder, config: LoraConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """(settings, tensors) of the adapter to write, for the base as `from_pretrained` loads it.

    LoftQ's base is the quantized original, so its adapter is saved as it is, for a base in 4 bits; PiSSA's and OLoRA's
    base is nobody else's, so theirs are saved `from_original`.
    """
    if config.init_lora_weights == "loftq":
        return as_it_is(decoder, config)
    return from_original(decoder, config)


def without_adapter(decoder: Decoder) -> Decoder:
    """The same parameters without the adapters: what they started from, and what KL terms and DPO compare with.

    Raises:
      JaxftError: parameters of the base train beside an adapter; nobody keeps what they started from.
    """
    base: Decoder = nnx.merge(*nnx.split(decoder))
    adapted = [module for module in modules(base).values() if module.lora_ranks]
    trained = [".".join(map(str, path)) for path, variable in base_parameters(base) if is_trainable(path, variable)]
    if adapted and trained:
        raise JaxftError(
            "reference model",
            f"the base of the adapter trains as well ({', '.join(trained)}), so it is not what it started from",
            "Leave modules_to_save and bias out, or compute the reference first",
        )
    for module in adapted:
        _take_off(module)
    return base


def _take_off(module: Module) -> None:
    started = isinstance(module, Linear) and module.initial_A is not None
    for attribute in _PARTS:
        if getattr(module, attribute, None) is not None:
            initial: Any = getattr(module, _INITIAL.get(attribute, ""), None) if started else None
            setattr(module, attribute, nnx.data(initial))
    if not started:
        module.lora_ranks = ()
