"""Rematerialisation: what each layer keeps for its backward pass, and where.

A policy is text. For one layer: "none" keeps everything, "full" keeps the layer's input, "offload" keeps it in pinned
host memory, and a list such as "attn_out,attn_lse,gate@host" keeps those names beside the input, the ones with @host in
pinned host memory. Layers may differ: "offload+all*4" is "all" for the last four layers and "offload" for the rest.

Every name that `jax.ad_checkpoint.checkpoint_name` gives anywhere in the forward pass is listed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxft.errors import JaxftError

LAYER_INPUT = "layer_input"
# In the order in which a layer makes them.
CHECKPOINT_NAMES = (LAYER_INPUT, "q", "k", "v", "attn_out", "attn_lse", "mid", "gate", "up", "lora_low_rank")

_LISTS = {"full": "", "offload": f"{LAYER_INPUT}@host", "all": ",".join(CHECKPOINT_NAMES)}
_HOST = "@host"


class LayerPolicy(NamedTuple):
    """What one layer keeps.

    Attributes:
      kept, offloaded: names out of CHECKPOINT_NAMES, on the device and in pinned host memory.
      everything: no recomputation at all.
    """

    kept: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    everything: bool = False


class Span(NamedTuple):
    """Layers `start` to `stop` (exclusive), which share a policy."""

    start: int
    stop: int
    policy: LayerPolicy


def parse_remat(value: str | bool | None) -> str:
    """The policy behind what users write: True is "full", False and None are "none", "unsloth" is "offload".

    Raises:
      JaxftError: for anything that is not a policy.
    """
    spellings = {True: "full", False: "none", None: "none", "unsloth": "offload"}
    policy = spellings.get(value, value)
    if not isinstance(policy, str):
        raise _unknown(policy)
    _parts(policy)
    return policy


@functools.cache
def spans(policy: str, num_layers: int) -> tuple[Span, ...]:
    """The layers by what they keep, in order.

    Raises:
      JaxftError: not a policy, or its counts do not fit the number of layers.
    """
    parts = _parts(policy)
    rest = num_layers - sum(count for _, count in parts if count is not None)
    if rest < 0 or (rest and all(count is not None for _, count in parts)):
        raise JaxftError("remat", f"the counts of {policy!r} do not fit {num_layers} layers", "Leave one count out")
    found, start = [], 0
    for layer_policy, count in parts:
        stop = start + (rest if count is None else count)
        if stop > start:
            found.append(Span(start, stop, layer_policy))
        start = stop
    return tuple(found)


def offloads(policy: str) -> bool:
    """Whether any layer keeps something in host memory."""
    return any(layer_policy.offloaded for layer_policy, _ in _parts(policy))


def _parts(policy: str) -> list[tuple[LayerPolicy, int | None]]:
    """Each part with its number of layers; None, which at most one may have, is what the others leave."""
    parts = []
    for text in policy.split("+"):
        names, star, count = text.strip().partition("*")
        if star and not count.strip().isdigit():
            raise _unknown(policy)
        parts.append((_layer_policy(names.strip(), policy), int(count) if star else None))
    if sum(count is None for _, count in parts) > 1:
        raise JaxftError("remat", f"only one part of {policy!r} may be without a number of layers")
    return parts


def _layer_policy(text: str, policy: str) -> LayerPolicy:
    if text == "none":
        return LayerPolicy(everything=True)
    if not text:
        raise _unknown(policy)
    names = [name.strip() for name in _LISTS.get(text, text).split(",") if name.strip()]
    unknown = {name.removesuffix(_HOST) for name in names} - set(CHECKPOINT_NAMES)
    if unknown:
        raise _unknown(policy)
    return LayerPolicy(
        kept=tuple(name for name in names if not name.endswith(_HOST)),
        offloaded=tuple(name.removesuffix(_HOST) for name in names if name.endswith(_HOST)),
    )


def _unknown(policy: object) -> JaxftError:
    known = ", ".join(("none", *_LISTS))
    return JaxftError(
        "use_gradient_checkpointing",
        f"{policy!r} is not known",
        f"Choose one of {known}, or names out of {', '.join(CHECKPOINT_NAMES)}",
    )


def rematerialise(block: Callable[..., Any], policy: LayerPolicy, *, in_scan: bool) -> Callable[..., Any]:
    """`block` under `jax.checkpoint` with `policy`.

    A layer's input is kept on the device unless it is offloaded. The CPU's device memory *is* host memory, so there
    what would be offloaded is kept. `in_scan` says that a loop already keeps the compiler from merging the
    recomputation with the forward pass.
    """
    if policy.everything:
        return block
    if policy.offloaded and jax.default_backend() != "cpu":
        saves = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=policy.kept,
            names_which_can_be_offloaded=policy.offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        saves = jax.checkpoint_policies.save_only_these_names(*policy.kept, *policy.offloaded)
    return jax.checkpoint(block, policy=saves, prevent_cse=not in_scan)
