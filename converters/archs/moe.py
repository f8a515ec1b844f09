"""What families with experts share: how config.json spells them, and how GGUF does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from converters.archs.base import GATING, ConfigReader
from converters.archs.gguf_keys import Facts, Key, check_fact
from converters.expert_layout import StackExperts
from jaxft.errors import JaxftError
from jaxft.models.config import MLPLayerType, MoEConfig


def expert_stacks(
    axes: tuple[int, ...], *, hf: str = "mlp.experts.", kind: str = "weight", peft_exchanges: bool = False
) -> tuple[StackExperts, ...]:
    """The experts' gate and up in one tensor, and down in another.

    Args:
      axes, peft_exchanges: as of `StackExperts`.
      hf: what stands before gate_up_proj and down_proj in HF's names.
      kind: "weight", or "bias", whose names end in _bias.
    """
    end = "" if kind == "weight" else f"_{kind}"
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    ends = {f"{hf}{name}{end}": [f"mlp.experts.{{}}.{part}.{kind}" for part in parts] for name, parts in names.items()}
    return tuple(StackExperts(name, tuple(parts), axes, peft_exchanges) for name, parts in ends.items())


EXPERT_PARAMETERS = expert_stacks((0, 1, 2, 3))

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_moe(reader: ConfigReader, fields: dict[str, Any], *, experts: str = "num_experts", **facts: Any) -> MoEConfig:
    """The experts of a config: where `facts` do not say otherwise, each is a whole MLP with the MLP's activation.

    Args:
      reader: of the model's config.
      fields: of `read_common`.
      experts: how the family spells their number; transformers writes some families' under another's name.
      **facts: the other fields of MoEConfig.
    """
    reader.take("output_router_logits", False)  # whether a forward pass returns them
    spelling = next((name for name in (experts, *_EXPERTS) if reader.peek(name) is not None), experts)
    return MoEConfig(
        num_experts=reader.take(spelling),
        num_experts_per_tok=reader.take("num_experts_per_tok"),
        router_aux_loss_coef=float(reader.take("router_aux_loss_coef", 0.0)),
        **{"moe_intermediate_size": fields["intermediate_size"], "expert_act": fields["hidden_act"], **facts},
    )


def read_sparse_layers(reader: ConfigReader, layers: int) -> tuple[MLPLayerType, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    step, dense = reader.take("decoder_sparse_step", 1), reader.take("mlp_only_layers", [])
    return tuple("dense" if i in dense or (i + 1) % step else "sparse" for i in range(layers))


def read_interleaved_layers(reader: ConfigReader, layers: int) -> tuple[MLPLayerType, ...]:
    """The same where they are `moe_layers`, and without it every `interleave_moe_layer_step`-th."""
    step = reader.take("interleave_moe_layer_step")
    return sparse_layers(layers, reader.take("moe_layers", range(step - 1, layers, step)))


def read_late_layers(reader: ConfigReader, layers: int) -> tuple[MLPLayerType, ...]:
    """The same where they are all but the first `first_k_dense_replace`."""
    return sparse_layers(layers, range(reader.take("first_k_dense_replace", 0), layers))


def sparse_layers(layers: int, sparse: Collection[int]) -> tuple[MLPLayerType, ...]:
    """`mlp_layer_types`, where these have experts."""
    return tuple("sparse" if i in sparse else "dense" for i in range(layers))


def expert_keys(*fields: str, **spelled: str | None) -> tuple[Key, ...]:
    """The rows of an architecture with experts: their number, how many a token uses, and these fields of an HF config.

    Args:
      *fields: of `_KEYS`, as they are called there.
      **spelled: more of those, and what the family's HF config calls them; None: it has no such field, and a file may
        only say the default.
    """
    wanted = sorted({"num_experts", "num_experts_per_tok", *fields, *spelled}, key=list(_KEYS).index)
    return tuple(
        dataclasses.replace(_KEYS[name], hf=spelled.get(name, name), of=_KEYS[name].of or name) for name in wanted
    )


def _leading(facts: Facts) -> int:
    """How many layers before the others have no experts."""
    types = facts["mlp_layer_types"]
    dense = types.count("dense")
    check_fact("mlp_layer_types", types, (sparse_layers(len(types), range(dense, len(types))),))
    return dense


def _interleaved(facts: Facts) -> int:
    """How many layers there are for each with experts, which is the last of them."""
    types = facts["mlp_layer_types"]
    step = types.index("sparse") + 1 if "sparse" in types else 1
    check_fact("mlp_layer_types", types, (sparse_layers(len(types), range(step - 1, len(types), step)),))
    return step


def two_best_of_groups(facts: Facts) -> str:
    """`group_score` of llama.cpp's graphs, whatever a file says; of one group it may be any."""
    if facts["n_group"] > 1 and facts["group_score"] != "top2":
        raise JaxftError(
            "config field topk_method",
            "this GGUF architecture cannot say group_limited_greedy: llama.cpp chooses groups by the sum of their two "
            "best experts, whatever the file says, and this model by their best one",
        )
    return facts["group_score"]


def _grouped(field: str) -> Callable[[Facts], int | None]:
    """The field, where there are groups."""
    return lambda facts: facts[field] if facts["n_group"] > 1 else None


def _by_field(*keys: Key) -> dict[str, Key]:
    return {key.hf: key for key in keys if key.hf}


# Beside the number of experts: F is the MLP's where no key says it, and the router's loss is no part of a file's model.
_IMPLIED = "moe_intermediate_size router_aux_loss_coef"

# llama.cpp's keys of experts, in its converter's order, by what most HF configs call them.
_KEYS = _by_field(
    Key("expert_count", "num_experts", f"num_experts {_IMPLIED}"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    Key("leading_dense_block_count", "first_k_dense_replace", "mlp_layer_types", "count", default=0, value=_leading),
    Key(
        "expert_shared_count",
        "n_shared_experts",
        "shared_expert_intermediate_size",
        "count",
        value=lambda facts: facts["shared_expert_intermediate_size"] // facts["moe_intermediate_size"],
    ),
    Key("expert_weights_scale", "routed_scaling_factor", kind="number", default=1.0),
    Key("expert_weights_norm", "norm_topk_prob", kind="flag", default=False),
    Key("expert_gating_func", "scoring_func", value=lambda facts: GATING[facts["scoring_func"]]),
    Key("expert_group_count", "n_group", default=1, value=_grouped("n_group")),
    Key("expert_group_used_count", "topk_group", default=1, value=_grouped("topk_group")),
    Key("interleave_moe_layer_step", "interleave_moe_layer_step", "mlp_layer_types", value=_interleaved),
)
