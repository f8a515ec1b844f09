"""Attaching an adapter: which modules get one, with what in it, and what trains beside it.

A stack of layers has one A [L, r, in] and one B [L, out, r], whatever its layers have: a rank below the stack's is
filled up with zeros, and a layer without an adapter has rank 0 and scale 0. Zeros stay zeros, since A's gradient is a
product with B and B's a product with A.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import pallas_kernels as pk
from jaxft.errors import JaxftError
from jaxft.lora.config import LoraConfig
from jaxft.lora.start import ReadWeight, Start, layer_of, start
from jaxft.lora.targets import (
    EMBEDDING,
    HEAD,
    Target,
    base_parameters,
    factors,
    modules,
    resolved,
    saved_parameters,
    targets,
)
from jaxft.models.decoder import Decoder
from jaxft.models.labels import set_trainable
from jaxft.models.layers import Constant, Embedding, ExpertLinear, Linear


def attach(
    decoder: Decoder,
    config: LoraConfig,
    *,
    key: jax.Array,
    dtype: DTypeLike = jnp.float32,
    weights: ReadWeight | None = None,
) -> None:
    """Adds a fresh adapter to the targets, in place, and makes it, and what else `config` names, all that trains.

    Args:
      decoder: PiSSA and OLoRA change its base.
      key: for the random values.
      dtype: of A and B. Magnitudes and other parameters that train become float32.
      weights: HF name of a weight -> its value, where the decoder's own are quantized: starts that depend on the
        weights take them from there.

    Raises:
      JaxftError: a target that matches nothing, a decoder that has adapters already, or settings that do not go
        together.
    """
    if any(factors(module)[0] is not None for module in modules(decoder).values()):
        raise JaxftError("get_peft_model", "the model has an adapter already", "Load the base model again")
    config = resolved(decoder, config)
    _untie(decoder, config)
    found = targets(decoder, config)
    saved = saved_parameters(decoder, config)
    _check_settings(config, found)
    for target, module_key in zip(found.values(), jax.random.split(key, max(len(found), 1)), strict=False):
        _attach_to(target, start(target, config, module_key, weights), config, dtype)
    for path, variable in base_parameters(decoder):
        if ".".join(map(str, path)) in saved:
            variable.set_value(jnp.array(variable.get_value(), jnp.float32))  # a copy: train steps give it away
    set_trainable(decoder, {"lora"} if found else set(), saved)


def _attach_to(target: Target, begun: Start, config: LoraConfig, dtype: DTypeLike) -> None:
    module = target.module
    names = ("lora_embedding_A", "lora_embedding_B") if isinstance(module, Embedding) else ("lora_A", "lora_B")
    for name, value in zip(names, (begun.A, begun.B), strict=True):
        setattr(module, name, nnx.LoRAParam(value.astype(dtype)))
    module.lora_scale = target.scales[0]
    if len(set(target.scales)) > 1:
        module.lora_scales = Constant(jnp.asarray(target.scales, jnp.float32).reshape(target.stack))
    module.lora_ranks = target.ranks
    if isinstance(module, Linear):
        module.lora_dropout = config.lora_dropout
        if begun.weight is not None:
            module.weight.set_value(begun.weight)
        if begun.is_base:
            # Copies: train steps give A and B away.
            module.initial_A, module.initial_B = (Constant(jnp.array(x, dtype)) for x in (begun.A, begun.B))
    if config.use_dora:
        weight = module.weight.get_value().T if isinstance(module, Embedding) else module.weight.get_value()
        scales = jnp.asarray(target.scales, jnp.float32).reshape(target.stack)
        squared = _over_layers(_squared_norms, weight, None, begun.A, begun.B, scales)
        module.squared_norms = Constant(squared)
        module.lora_magnitude_vector = nnx.LoRAParam(_over_layers(_norms, weight, squared, begun.A, begun.B, scales))


@functools.partial(jax.jit, static_argnums=0)
def _over_layers(function: Callable[..., jax.Array], weight: Any, *arrays: Any) -> jax.Array:
    """function(weight, squared_norms, A, B, scale) of each layer of a stack, one weight decoded at a time."""
    scale = arrays[-1]
    if scale.ndim == 0:
        return function(weight, *arrays)
    layers = jnp.arange(scale.shape[0], dtype=jnp.int32)
    return jax.lax.map(lambda inputs: function(layer_of(weight, inputs[0]), *inputs[1:]), (layers, *arrays))


def _squared_norms(weight: Any, squared: None, A: jax.Array, B: jax.Array, scale: Any) -> jax.Array:
    return jnp.sum(jnp.square(pk.decoded(weight, jnp.float32)), axis=1)


def _norms(weight: Any, squared: jax.Array, A: jax.Array, B: jax.Array, scale: Any) -> jax.Array:
    """DoRA's first magnitudes; 0 where there is no adapter, which nothing, weight decay neither, moves."""
    norms = pk.row_norms(weight, squared, A, B, scale, jnp.float32)
    return jnp.where(jnp.asarray(scale, jnp.float32).reshape(1) == 0, 0, norms)


def _check_settings(config: LoraConfig, found: dict[str, Target]) -> None:
    experts = {path: target for path, target in found.items() if isinstance(target.module, ExpertLinear)}
    if any(len(set(target.scales)) > 1 for target in experts.values()):
        raise JaxftError("target_modules", "experts have one rank and one scale in all layers, or no adapters")
    for name, plain in (("lora_dropout", 0.0), ("use_dora", False)):
        if experts and getattr(config, name) != plain:
            raise JaxftError(name, "is not there for experts", f"Set it to {plain}, or target no experts")
    if experts and config.init_lora_weights not in (True, "gaussian"):
        raise JaxftError("init_lora_weights", "of experts can be True or gaussian only", "Or target no experts")
    partial = [path for path, target in found.items() if not all(target.ranks)]
    if config.bias == "lora_only" and any(getattr(found[path].module, "bias", None) is not None for path in partial):
        raise JaxftError("bias", "lora_only needs all layers of a module or none", "Leave layers_to_transform out")
    if HEAD in found and config.lora_dropout:
        raise JaxftError(
            "lora_dropout", "an adapter of lm_head has none", "Set it to 0, or put lm_head into modules_to_save"
        )


def _untie(decoder: Decoder, config: LoraConfig) -> None:
    """Gives the decoder a head of its own where head and embedding, which were one, part by what `config` trains."""
    parts = config.is_target(HEAD) or config.is_saved(HEAD) or config.is_saved(EMBEDDING)
    if decoder.lm_head is not None or not parts or config.ensure_weight_tying:
        return
    c, weight = decoder.config, decoder.model.embed_tokens.weight.get_value()
    make = lambda: Linear(  # noqa: E731
        "lm_head", c.hidden_size, c.vocab_size, bias=False, stack=(), dtype=weight.dtype, rngs=nnx.Rngs(0)
    )
    head = nnx.eval_shape(make)
    head.weight.set_value(weight)
    decoder.lm_head = head
    decoder.config = dataclasses.replace(c, tie_word_embeddings=False)
