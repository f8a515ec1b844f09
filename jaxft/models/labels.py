"""What kind of parameter each path is, and which kinds train. Everything that treats parameters apart asks here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import jax
from flax import nnx

from jaxft.errors import JaxftError

Kind = Literal["lora", "norm", "embedding", "head", "router", "base"]
KINDS: tuple[Kind, ...] = ("lora", "norm", "embedding", "head", "router", "base")


def kind_of(path: tuple[Any, ...], variable: nnx.Variable) -> Kind:
    """The kind of one parameter from its path and type."""
    names = [str(part) for part in path]
    if isinstance(variable, nnx.LoRAParam):
        return "lora"
    if any(name.endswith("norm") for name in names):
        return "norm"
    if "embed_tokens" in names:
        return "embedding"
    if "gate" in names:
        return "router"
    return "head" if "lm_head" in names else "base"


def is_trainable(path: tuple[Any, ...], variable: Any) -> bool:
    """An nnx filter: the variables that `set_trainable` chose."""
    return isinstance(variable, nnx.Variable) and bool(variable.get_metadata("trainable", False))


def set_trainable(decoder: nnx.Module, kinds: Collection[Kind], also: Collection[str] = ()) -> None:
    """Makes the parameters of these kinds trainable, and those of these paths ("model.norm.weight"); freezes the rest.

    Raises:
      JaxftError: an unknown kind, a kind that the decoder has none of, or a quantized base that should train.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise JaxftError("trainable kinds", f"unknown: {', '.join(sorted(unknown))}", f"Known: {', '.join(KINDS)}")
    variables = [(path, v) for path, v in nnx.iter_graph(decoder) if isinstance(v, nnx.Param)]
    missing = set(kinds) - {kind_of(path, variable) for path, variable in variables}
    if missing:
        raise JaxftError("trainable kinds", f"the decoder has no parameter of kind {', '.join(sorted(missing))}")
    for path, variable in variables:
        name = ".".join(map(str, path))
        trains = kind_of(path, variable) in kinds or name in also
        if trains and not isinstance(variable.get_value(), jax.Array):
            raise JaxftError(name, "is quantized and cannot train", "Load with load_in_4bit=False to train the base")
        variable.set_metadata(trainable=trains)


def base_kinds(decoder: nnx.Module) -> set[Kind]:
    """The kinds of the decoder's own parameters, adapters left out: what full fine-tuning trains."""
    found: set[Kind] = {kind_of(path, v) for path, v in nnx.iter_graph(decoder) if isinstance(v, nnx.Variable)}
    found.discard("lora")
    return found


def trained_kinds(decoder: nnx.Module) -> set[Kind]:
    """The kinds of the parameters that train."""
    return {kind_of(path, v) for path, v in nnx.iter_graph(decoder) if is_trainable(path, v)}


def split(decoder: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, trainable, frozen): what a train step takes apart once and merges inside."""
    graphdef, trainable, frozen = nnx.split(decoder, is_trainable, ...)
    return graphdef, trainable, frozen


def labels(params: nnx.State) -> Any:
    """A tree like `params` with, for each leaf, its kind or "frozen": the labels of `optax.partition`."""

    def label(path: tuple[Any, ...], variable: nnx.Variable) -> Any:
        text = kind_of(path, variable) if is_trainable(path, variable) else "frozen"
        return jax.tree.map(lambda _: text, variable)

    return nnx.map_state(label, params)
