"""Rematerialisation: what each layer keeps for its backward pass, and where.

A policy is text. For one layer: "none" keeps everything, "full" keeps the layer's input, "offload" keeps it in pinned
host memory, and a list such as "attn_out,attn_lse,gate@host" keeps those names beside the input, the ones with @host in
pinned host memory. Layers may differ: "offload+all*4" is "all" for the last four layers and "offload" for the rest.

Beside names a list may hold "tile=2048", for an MLP that takes so many tokens at a time, so that its [tokens, F] arrays
never exist whole, and "unroll=2", for so many layers as straight code in each iteration of the scan ("unroll=all": no
scan; faster by the copies that a scan makes, longer to compile). "prefetch=0" fetches from host memory only once a
layer begins, instead of in the one before it: that spares the memory of what is fetched, and long rows, whose layers
take much longer than the fetching, hardly notice. "weights" keeps the frozen weights of all layers decoded for as long
as the model trains: in bfloat16 2 bytes a parameter more, straight code, and no decoding and copying in a step.

Every name that `jax.ad_checkpoint.checkpoint_name` gives anywhere in the forward pass is listed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxft.errors import JaxftError
from jaxft.models.layers import ROW_NORMS

LAYER_INPUT = "layer_input"
MID = "mid"  # the residual stream between attention and MLP
# What the MLP's last linear gives, where DoRA scales its rows: only the gradient of the magnitudes needs it.
MLP_OUT = "mlp_out"
AUTO = "auto"  # the trainer chooses (`jaxft.train.auto_remat`); where nothing trains it means "full"
# In the order in which a layer makes them.
CHECKPOINT_NAMES = (
    *(LAYER_INPUT, "q", "k", "v", "attn_out", "attn_lse", MID, "gate", "up", MLP_OUT),
    *("lora_low_rank", ROW_NORMS),
)

_LISTS = {"full": (), "offload": (f"{LAYER_INPUT}@host",), "all": CHECKPOINT_NAMES}
_HOST = "@host"
_EVERYTHING = "none"  # as in "no rematerialisation"
_WEIGHTS = "weights"
_SETTINGS = {"tile", "unroll", "prefetch"}


class LayerPolicy(NamedTuple):
    """What one layer keeps.

    Attributes:
      kept, offloaded: names out of CHECKPOINT_NAMES, on the device and in pinned host memory.
      everything: no recomputation at all.
      tile: tokens that the MLP takes at a time; None: all.
      unroll: layers in an iteration of the scan; None: all of the span.
      prefetch: layers ahead of their use that offloaded names are fetched, 0 or 1.
      weights: whether the base's weights are kept decoded, which is a choice for the whole model.
    """

    kept: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    everything: bool = False
    tile: int | None = None
    unroll: int | None = 1
    prefetch: int = 1
    weights: bool = False

    @property
    def recomputes_mlp(self) -> bool:
        """Whether nothing of the MLP is kept, so that its backward pass had better make all of it again itself."""
        return not (self.everything or {"gate", "up"} & {*self.kept, *self.offloaded})

    @property
    def keeps_mlp_out(self) -> bool:
        """Whether the MLP's output is kept for DoRA; to make it again takes a product with the whole weight."""
        return self.everything or MLP_OUT in {*self.kept, *self.offloaded}


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
    if policy != AUTO:
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


def keeps_weights(policy: str) -> bool:
    """Whether the base's weights are kept decoded (`jaxft.models.decoded`)."""
    return any(layer_policy.weights for layer_policy, _ in _parts(policy))


def prefetches(policy: str) -> bool:
    """Whether what is in host memory is fetched a layer ahead; it is a choice for the whole program."""
    return all(layer_policy.prefetch for layer_policy, _ in _parts(policy))


def _parts(policy: str) -> list[tuple[LayerPolicy, int | None]]:
    """Each part with its number of layers; None, which at most one may have, is what the others leave."""
    parts = []
    for text in ("full" if policy == AUTO else policy).split("+"):
        names, star, count = text.strip().partition("*")
        if star and not count.strip().isdigit():
            raise _unknown(policy)
        parts.append((_layer_policy(names.strip(), policy), int(count) if star else None))
    if sum(count is None for _, count in parts) > 1:
        raise JaxftError("remat", f"only one part of {policy!r} may be without a number of layers")
    return parts


def _layer_policy(text: str, policy: str) -> LayerPolicy:
    items = [item.strip() for item in text.split(",")]
    settings = {name: value for name, is_setting, value in (item.partition("=") for item in items) if is_setting}
    listed = [item for item in items if "=" not in item and item != _WEIGHTS]
    names = [name for item in listed for name in _LISTS.get(item, (item,)) if item != _EVERYTHING]
    if settings.get("prefetch", "1") not in ("0", "1"):
        raise _unknown(policy)
    if not text or {name.removesuffix(_HOST) for name in names} - set(CHECKPOINT_NAMES) or set(settings) - _SETTINGS:
        raise _unknown(policy)
    found = LayerPolicy(
        kept=tuple(name for name in names if not name.endswith(_HOST)),
        offloaded=tuple(name.removesuffix(_HOST) for name in names if name.endswith(_HOST)),
        everything=_EVERYTHING in items,
        tile=_positive(settings["tile"], policy) if "tile" in settings else None,
        unroll=None if settings.get("unroll") == "all" else _positive(settings.get("unroll", "1"), policy),
        weights=_WEIGHTS in items,
        prefetch=int(settings.get("prefetch", "1") != "0"),
    )
    if found.everything and len(listed) > 1:
        raise JaxftError("remat", f"{policy!r} keeps everything, so names beside it mean nothing", "Leave them out")
    if found.tile and not found.recomputes_mlp:
        what = "what it keeps of the MLP would be kept for all tokens"
        raise JaxftError("remat", f"{policy!r} has a tile, but {what}", "Leave tile or gate, up and none out")
    return found


def _positive(text: str, policy: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise _unknown(policy)
    return int(text)


def _unknown(policy: object) -> JaxftError:
    known, names = ", ".join((AUTO, _EVERYTHING, *_LISTS)), ", ".join(CHECKPOINT_NAMES)
    return JaxftError(
        "use_gradient_checkpointing",
        f"{policy!r} is not known",
        f"Choose one of {known}, or names out of {names}; {_WEIGHTS}, tile=N, unroll=N and prefetch=0 may stand beside",
    )


def rematerialise(block: Callable[..., Any], policy: LayerPolicy, *, in_scan: bool) -> Callable[..., Any]:
    """`block` under `jax.checkpoint` with `policy`.

    A layer's input is kept on the device unless it is offloaded, and DoRA's norms always are. The CPU's device
    memory *is* host memory, so there what would be offloaded is kept. `in_scan` says that a loop already keeps the
    compiler from merging the recomputation with the forward pass.
    """
    if policy.everything:
        return block
    if policy.offloaded and jax.default_backend() != "cpu":
        saves = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(*policy.kept, ROW_NORMS),
            names_which_can_be_offloaded=policy.offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        saves = jax.checkpoint_policies.save_only_these_names(*policy.kept, *policy.offloaded, ROW_NORMS)
    return jax.checkpoint(block, policy=saves, prevent_cse=not in_scan)
