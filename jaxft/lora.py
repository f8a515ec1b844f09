"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): attach them, mask optimizers, name their tensors as PEFT does.

A linear with an adapter computes W x + scale * B A x, where A is [r, in], B is [out, r] and scale = lora_alpha / r
(lora_alpha / sqrt(r) with rsLoRA, arXiv:2312.03732). A starts uniform in +-1/sqrt(in), as PEFT's does, and B at zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike

from jaxft.errors import JaxftError
from jaxft.models.decoder import Decoder
from jaxft.models.labels import labels, set_trainable
from jaxft.models.layers import ExpertLinear, Linear
from jaxft.models.params import LAYERS, hf_names, stack, unstack

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What an adapter is; the field names are PEFT's.

    Attributes:
      r: rank.
      lora_alpha: numerator of the scale.
      lora_dropout: probability of dropping a value of the adapter's input in training.
      target_modules: names of the linears to adapt, as they end in the HF name.
      use_rslora: scale by 1/sqrt(r) instead of 1/r.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise JaxftError("r", f"the rank must be at least 1, not {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise JaxftError("lora_dropout", f"must be in [0, 1), not {self.lora_dropout}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def linears(decoder: Decoder) -> dict[str, Linear]:
    """The linears inside the layers by path: 'model.layers.self_attn.q_proj' -> Linear."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(decoder)
        if isinstance(module, Linear) and LAYERS in path
    }


def targets(decoder: Decoder, target_modules: tuple[str, ...]) -> dict[str, Linear]:
    """The linears whose path ends in one of `target_modules`.

    Raises:
      JaxftError: a name that matches none, with the names there are (an MLP without a gate is forgiven ALL_LINEAR).
    """
    found: dict[str, Linear] = {}
    available = linears(decoder)
    for target in target_modules:
        matches = {path: m for path, m in available.items() if path == target or path.endswith(f".{target}")}
        if not matches and target_modules != ALL_LINEAR:
            names = ", ".join(sorted({path.rsplit(".", 1)[1] for path in available}))
            raise JaxftError("target_modules", f"{target!r} matches no linear of the model", f"There are: {names}")
        found |= matches
    return {path: module for path, module in available.items() if path in found}


def attach(decoder: Decoder, config: LoraConfig, *, key: jax.Array, dtype: DTypeLike = jnp.float32) -> None:
    """Adds a fresh adapter to the targets, in place, and makes it the only thing that trains.

    Raises:
      JaxftError: a target that matches nothing, or a decoder that has adapters already.
    """
    modules = targets(decoder, config.target_modules)
    if config.lora_dropout and any(isinstance(module, ExpertLinear) for module in modules.values()):
        raise JaxftError("lora_dropout", "has no meaning for experts, as in PEFT", "Set it to 0, or target no experts")
    if any(module.lora_A is not None for module in linears(decoder).values()):
        raise JaxftError("get_peft_model", "the model has an adapter already", "Load the base model again")
    for module, module_key in zip(modules.values(), jax.random.split(key, len(modules)), strict=True):
        bound = 1.0 / math.sqrt(module.in_features)
        shape = (*module.stack, config.r, module.in_features)
        module.lora_A = nnx.LoRAParam(jax.random.uniform(module_key, shape, dtype, -bound, bound))
        module.lora_B = nnx.LoRAParam(jnp.zeros((*module.stack, module.out_features, config.r), dtype))
        module.lora_scale = config.scale
        module.lora_dropout = config.lora_dropout
    set_trainable(decoder, {"lora"})


def without_adapter(decoder: Decoder) -> Decoder:
    """The same parameters without the adapters: what they started from, and what KL terms and DPO compare with."""
    base: Decoder = nnx.merge(*nnx.split(decoder))
    for module in linears(base).values():
        module.lora_A = module.lora_B = nnx.data(None)
    return base


def adapter_tensors(decoder: Decoder) -> dict[str, np.ndarray]:
    """The adapter under HF names: 'model.layers.{i}.self_attn.q_proj.lora_A.weight' -> float array, one a layer."""
    found: dict[str, np.ndarray] = {}
    for path, module in linears(decoder).items():
        for part in ("lora_A", "lora_B"):
            variable = getattr(module, part)
            if variable is not None:
                names = hf_names((*path.split("."), part, "weight"), decoder.config)
                values = unstack(np.asarray(variable.get_value()), len(module.stack))
                found |= dict(zip(names, values, strict=True))
    return found


def load_adapter_tensors(decoder: Decoder, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts an adapter's values (names as `adapter_tensors` gives them) into a decoder that `attach` prepared.

    Raises:
      JaxftError: missing, unexpected or mis-shaped tensors, all of them listed.
    """
    expected = {name: array.shape for name, array in adapter_tensors(decoder).items()}
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise JaxftError("adapter", f"does not fit this model: {'; '.join(problems)}")
    for path, module in linears(decoder).items():
        for part in ("lora_A", "lora_B"):
            variable = getattr(module, part)
            if variable is not None:
                names = hf_names((*path.split("."), part, "weight"), decoder.config)
                dtype = variable.get_value().dtype
                values = [jnp.asarray(tensors[name], dtype) for name in names]
                variable.set_value(stack(values, module.stack))


def optimizer_mask(params: nnx.State) -> Any:
    """A tree of bools over a whole parameter tree: True where a leaf trains. For `optax.masked` and friends."""
    return jax.tree.map(lambda label: label != "frozen", labels(params))


def masked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for the trainable leaves of a whole parameter tree, and zero updates for the frozen ones.

    Bare `optax.masked` passes the raw gradient through where its mask is False; this does not.
    """
    return optax.partition(
        {"train": tx, "frozen": optax.set_to_zero()},
        lambda params: jax.tree.map(lambda label: "frozen" if label == "frozen" else "train", labels(params)),
    )
