"""Rematerialisation: what a layer keeps for its backward pass, and where.

Every name that `jax.ad_checkpoint.checkpoint_name` gives anywhere in the forward pass is listed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from jaxft.errors import JaxftError

RematPolicy = Literal["none", "full", "offload"]

LAYER_INPUT = "layer_input"
CHECKPOINT_NAMES = (LAYER_INPUT, "attn_out", "attn_lse", "gate", "up", "lora_low_rank")


def parse_remat(value: str | bool | None) -> RematPolicy:
    """The policy behind what users write: True is "full", False and None are "none", "unsloth" is "offload".

    Raises:
      JaxftError: for any other spelling.
    """
    spellings = {True: "full", False: "none", None: "none", "unsloth": "offload"}
    policy = spellings.get(value, value)
    if policy not in get_args(RematPolicy):
        raise JaxftError(
            "use_gradient_checkpointing", f"{value!r} is not known", f"Choose one of {', '.join(get_args(RematPolicy))}"
        )
    return policy  # pyright: ignore[reportReturnType]


def rematerialise(block: Callable[..., Any], policy: RematPolicy, *, in_scan: bool) -> Callable[..., Any]:
    """`block` under `jax.checkpoint` with `policy`.

    "none" keeps every residual; "full" keeps the block's input and computes the rest again; "offload" also moves that
    input to pinned host memory until the backward pass asks for it. The CPU's device memory *is* host memory, so
    there "offload" and "full" are the same program. `in_scan` says that a loop already keeps the compiler from merging
    the recomputation with the forward pass.
    """
    if policy == "none":
        return block
    offloads = policy == "offload" and jax.default_backend() != "cpu"
    saves = (
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        if offloads
        else jax.checkpoint_policies.nothing_saveable
    )
    return jax.checkpoint(block, policy=saves, prevent_cse=not in_scan)
