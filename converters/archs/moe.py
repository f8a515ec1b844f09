"""What families with experts share: how config.json spells them, and how GGUF does."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from converters.archs.base import ConfigReader, MetadataReader
from converters.archs.common import check_fact
from converters.expert_layout import StackExperts
from jaxft.models.config import DecoderConfig, MLPLayerType, MoEConfig


def expert_stacks(axes: tuple[int, ...], *, hf: str = "mlp.experts.", kind: str = "weight") -> tuple[StackExperts, ...]:
    """The experts' gate and up in one tensor, and down in another.

    Args:
      axes: as of `StackExperts`.
      hf: what stands before gate_up_proj and down_proj in HF's names.
      kind: "weight", or "bias", whose names end in _bias.
    """
    end = "" if kind == "weight" else f"_{kind}"
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    return tuple(
        StackExperts(f"{hf}{name}{end}", tuple(f"mlp.experts.{{}}.{part}.{kind}" for part in parts), axes)
        for name, parts in names.items()
    )


EXPERT_PARAMETERS = expert_stacks((0, 1, 2, 3))

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

# Fields of MoEConfig, and of HF's configs -> keys.
WIDTHS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def read_moe(reader: ConfigReader, *, experts: str = "num_experts", **facts: Any) -> MoEConfig:
    """The experts of a config.

    Args:
      reader: of the model's config.
      experts: how the family spells their number; transformers writes some families' under another's name.
      **facts: the other fields of MoEConfig.
    """
    reader.take("output_router_logits", False)  # whether a forward pass returns them
    spelling = next((name for name in (experts, *_EXPERTS) if reader.peek(name) is not None), experts)
    return MoEConfig(
        num_experts=reader.take(spelling),
        num_experts_per_tok=reader.take("num_experts_per_tok"),
        router_aux_loss_coef=float(reader.take("router_aux_loss_coef", 0.0)),
        **facts,
    )


def read_sparse_layers(reader: ConfigReader, layers: int) -> tuple[MLPLayerType, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    step, dense = reader.take("decoder_sparse_step", 1), reader.take("mlp_only_layers", [])
    return tuple("dense" if i in dense or (i + 1) % step else "sparse" for i in range(layers))


def read_moe_gguf(
    reader: MetadataReader, *, experts: str = "num_experts", widths: Collection[str] = ()
) -> dict[str, Any]:
    """The experts' fields of an HF config, from the keys of `write_moe_gguf`.

    Args:
      reader: of the file's metadata.
      experts: how the family spells their number.
      widths: fields of `WIDTHS` that are in the file.
    """
    return {
        experts: reader.size("expert_count"),
        "num_experts_per_tok": reader.size("expert_used_count"),
        **{width: reader.size(WIDTHS[width]) for width in widths},
    }


# What the keys say; the loss of the router is no part of a file's model.
_SAID = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef")


def write_moe_gguf(
    config: DecoderConfig,
    *,
    widths: Collection[str] = (),
    said: Collection[str] = (),
    layers: Sequence[MLPLayerType] | None = None,
    **graph: Any,
) -> dict[str, int]:
    """The keys of experts, after a check that llama.cpp's graph of the architecture has everything else.

    Args:
      config: the decoder's facts.
      widths: fields of `WIDTHS` that the architecture's files have.
      said: fields of MoEConfig that the architecture's own keys, or its tensors, say.
      layers: which of the graph's layers have experts; None: all.
      **graph: the values of fields of MoEConfig that it fixes; others must have the default.

    Raises:
      JaxftError: a field that llama.cpp's graph of the architecture does not have.
    """
    moe = config.moe
    assert moe is not None
    for field in dataclasses.fields(moe):
        if field.name not in (*_SAID, *widths, *said):
            check_fact(field.name, getattr(moe, field.name), (graph.get(field.name, field.default),))
    check_fact("mlp_layer_types", config.mlp_layer_types, (tuple(layers or ("sparse",) * config.num_hidden_layers),))
    return {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.num_experts_per_tok,
        **{WIDTHS[width]: getattr(moe, width) for width in widths},
    }
