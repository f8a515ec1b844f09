"""What families with experts share: how config.json spells them, and how GGUF does."""

from __future__ import annotations

from typing import Any

from converters.archs.base import ConfigReader, MetadataReader
from converters.expert_layout import StackExperts
from jaxft.models.config import DecoderConfig, MLPLayerType, MoEConfig

EXPERT_PARAMETERS = (
    StackExperts(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        (0, 1, 2, 3),
    ),
    StackExperts("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",), (0, 1, 2, 3)),
)


def read_moe(reader: ConfigReader, *, experts: str = "num_experts", aux_loss: float = 0.001, **facts: Any) -> MoEConfig:
    """The experts of a config.

    Args:
      reader: of the model's config.
      experts: how the family spells their number.
      aux_loss: the family's default of `router_aux_loss_coef`.
      **facts: the other fields of MoEConfig.
    """
    reader.take("output_router_logits", False)  # whether a forward pass returns them
    return MoEConfig(
        num_experts=reader.take(experts),
        num_experts_per_tok=reader.take("num_experts_per_tok"),
        router_aux_loss_coef=float(reader.take("router_aux_loss_coef", aux_loss)),
        **facts,
    )


def read_sparse_layers(reader: ConfigReader, layers: int) -> tuple[MLPLayerType, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    step, dense = reader.take("decoder_sparse_step", 1), reader.take("mlp_only_layers", [])
    return tuple("dense" if i in dense or (i + 1) % step else "sparse" for i in range(layers))


def read_moe_gguf(reader: MetadataReader) -> dict[str, int]:
    """The experts' fields of an HF config from a GGUF file's metadata."""
    return {"num_experts": reader.size("expert_count"), "num_experts_per_tok": reader.size("expert_used_count")}


def write_moe_gguf(config: DecoderConfig) -> dict[str, int]:
    """The inverse, with the experts' own size where it is not the MLP's."""
    assert config.moe is not None
    return {"expert_count": config.moe.num_experts, "expert_used_count": config.moe.num_experts_per_tok}
