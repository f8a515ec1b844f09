"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): attach them, mask optimizers, name their tensors as PEFT does.

A linear with an adapter computes W x + scale * B A x, where A is [r, in], B is [out, r] and scale = lora_alpha / r
(lora_alpha / sqrt(r) with rsLoRA, arXiv:2312.03732). With DoRA (arXiv:2402.09353) each row of W + scale * B A has a
length that trains: m / ||W + scale B A|| * (W x + scale B A x), where the norm counts as a constant.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from jaxft.lora.attach import attach
from jaxft.lora.config import ALL_LINEAR, Bias, LoraConfig
from jaxft.lora.targets import linears, modules, resolved, targets
from jaxft.lora.tensors import adapter_tensors, as_it_is, from_original, load_adapter_tensors, to_save, without_adapter
from jaxft.models.labels import labels

__all__ = [
    "ALL_LINEAR",
    "Bias",
    "LoraConfig",
    "adapter_tensors",
    "as_it_is",
    "attach",
    "from_original",
    "linears",
    "load_adapter_tensors",
    "masked",
    "modules",
    "optimizer_mask",
    "resolved",
    "targets",
    "to_save",
    "without_adapter",
]


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
