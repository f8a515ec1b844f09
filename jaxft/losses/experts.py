"""What every loss gets where the model has experts: the load-balancing loss, and how the experts are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft.losses.tokens import LossOutput
from jaxft.models.decoder import Decoder
from jaxft.models.labels import trained_kinds
from jaxft.models.moe import Load, load_balancing_loss, utilisation


def with_experts(output: LossOutput, decoder: Decoder, load: Load | None) -> LossOutput:
    """A loss's output with what concerns the experts; as it is where there are none (`load` is None).

    The load-balancing loss is added where the router trains, times the config's `router_aux_loss_coef` and the output's
    weight, by which the step divides. It is that of a micro-batch: as in other trainers, accumulation averages it.
    """
    moe = decoder.config.moe
    if load is None or moe is None:
        return output
    total, weight, metrics = output
    found = utilisation(jax.lax.stop_gradient(load))
    if "router" in trained_kinds(decoder):
        penalty = load_balancing_loss(load, moe.num_experts)
        found["moe/aux_loss"] = jax.lax.stop_gradient(penalty)
        total = total + moe.router_aux_loss_coef * penalty * jax.lax.stop_gradient(weight)
    return total, weight, {**metrics, **{name: (value, jnp.float32(1)) for name, value in found.items()}}
