"""Which modules of a decoder an adapter's settings mean, and which parameters beside them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flax import nnx

from jaxft.errors import JaxftError
from jaxft.lora.config import ALL_LINEAR, EVERY_LINEAR, LoraConfig, matches
from jaxft.models.decoder import Decoder
from jaxft.models.layers import LAYERS, Embedding, Linear
from jaxft.models.params import hf_names, stack_shape
from jaxft.quant import QTensor

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

Module = Linear | Embedding


class Target(NamedTuple):
    """A module that gets an adapter.

    Attributes:
      module: the Linear (of a stack of layers, but for the head) or the Embedding.
      names: the HF paths of the modules behind it, one a layer, of experts one for each of them in each layer.
      ranks, scales: of each; 0 where there is no adapter.
      stack: the leading axes of its parameters: (), (L,), or of experts (L, E).
    """

    module: Module
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stack: tuple[int, ...]


def modules(decoder: Decoder) -> dict[str, Module]:
    """Whatever could have an adapter, by path: 'model.layers.self_attn.q_proj' -> Linear."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(decoder)
        if isinstance(module, Linear | Embedding)
    }


def factors(module: Module) -> tuple[Any, Any]:
    """The variables A and B of a module, or (None, None)."""
    if isinstance(module, Embedding):
        return module.lora_embedding_A, module.lora_embedding_B
    return module.lora_A, module.lora_B


def linears(decoder: Decoder) -> dict[str, Linear]:
    """The linears inside the layers, by path."""
    return {
        path: module
        for path, module in modules(decoder).items()
        if isinstance(module, Linear) and LAYERS in path.split(".")
    }


def resolved(decoder: Decoder, config: LoraConfig) -> LoraConfig:
    """`config` with the names of the architecture's linears in the place of "all-linear" or ALL_LINEAR."""
    if config.target_modules not in (EVERY_LINEAR, (EVERY_LINEAR,), ALL_LINEAR):  # on a command line it is a list
        return config
    names = {path.rsplit(".", 1)[1] for path in linears(decoder)}
    usual = [name for name in ALL_LINEAR if name in names]
    return dataclasses.replace(config, target_modules=(*usual, *sorted(names - set(usual))))


def targets(decoder: Decoder, config: LoraConfig) -> dict[str, Target]:
    """The modules that `config` adapts, by path.

    Raises:
      JaxftError: a name among target_modules that matches none, with the names there are.
    """
    config = resolved(decoder, config)
    found: dict[str, Target] = {}
    for path, module in modules(decoder).items():
        parts = tuple(path.split("."))
        names = tuple(hf_names(parts, decoder.config))
        ranks = tuple(config.rank_of(name) if config.is_target(name) else 0 for name in names)
        if any(ranks):
            scales = tuple(config.scale_of(name) if rank else 0.0 for name, rank in zip(names, ranks, strict=True))
            found[path] = Target(module, names, ranks, scales, stack_shape(parts, decoder.config))
    _check_names(decoder, config, found)
    return found


def _check_names(decoder: Decoder, config: LoraConfig, found: dict[str, Target]) -> None:
    wanted = config.target_modules
    every = [name for path in modules(decoder) for name in hf_names(tuple(path.split(".")), decoder.config)]
    for name in (wanted,) if isinstance(wanted, str) else wanted:
        if not any(matches(wanted if isinstance(wanted, str) else (name,), one) for one in every):
            there = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in modules(decoder)}))
            raise JaxftError("target_modules", f"{name!r} matches no linear of the model", f"There are: {there}")
    if wanted and not found:
        how = "Look at exclude_modules, layers_to_transform and modules_to_save"
        raise JaxftError("target_modules", f"nothing of {wanted!r} is left to adapt", how)


def base_parameters(decoder: Decoder) -> list[tuple[tuple[Any, ...], nnx.Param]]:
    """The parameters that a checkpoint of the base holds, with their paths."""
    return [
        (path, variable)
        for path, variable in nnx.iter_graph(decoder)
        if isinstance(variable, nnx.Param) and not isinstance(variable, nnx.LoRAParam)
    ]


def saved_parameters(decoder: Decoder, config: LoraConfig) -> frozenset[str]:
    """Paths of the parameters of the base that train: those of modules_to_save and the biases that `bias` means.

    Raises:
      JaxftError: a name among modules_to_save that matches nothing, means some layers of a stack only, or a quantized
        weight.
    """
    found: set[str] = set()
    unmatched = set(config.modules_to_save)
    adapted = targets(decoder, config)
    for path, variable in base_parameters(decoder):
        module, name = ".".join(map(str, path[:-1])), str(path[-1])
        names = hf_names(path[:-1], decoder.config)
        if decoder.lm_head is None and module == EMBEDDING and config.is_saved("lm_head"):
            names = ["lm_head"]  # they are one
        chosen = [config.is_saved(one) for one in names]
        if any(chosen) and not all(chosen):
            raise JaxftError("modules_to_save", f"means only some layers' {module}", "Layers train together or not")
        unmatched -= {end for end in unmatched if any(one.endswith(end) for one in names)}
        biased = name == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in adapted))
        if not all(chosen) and not biased:
            continue
        if isinstance(variable.get_value(), QTensor):
            raise JaxftError(f"{module}.{name}", "is quantized and cannot train", "Load with load_in_4bit=False")
        found.add(f"{module}.{name}")
    if unmatched:
        there = sorted({str(path[-2]) for path, _ in base_parameters(decoder)})
        raise JaxftError("modules_to_save", f"{sorted(unmatched)} match nothing", f"There are: {', '.join(there)}")
    return frozenset(found)
