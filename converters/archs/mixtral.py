"""Mixtral 8x7B and 8x22B: https://huggingface.co/docs/transformers/model_doc/mixtral"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, read_windows, write_common_gguf
from converters.archs.moe import EXPERT_PARAMETERS, read_moe, read_moe_gguf, write_moe_gguf
from converters.expert_layout import Rename
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader)
    reader.expect("router_jitter_noise", 0.0)  # noise in training, which jaxft does not add
    return DecoderConfig(
        **fields,
        **read_windows(reader, fields["num_hidden_layers"]),
        moe=read_moe(
            reader,
            experts="num_local_experts",
            moe_intermediate_size=fields["intermediate_size"],
            norm_topk_prob=True,
            expert_act=fields["hidden_act"],
        ),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {**read_common_gguf(reader, moe=True), **read_moe_gguf(reader, experts="num_local_experts")}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return {**write_common_gguf(config, said=("moe",)), **write_moe_gguf(config, norm_topk_prob=True)}


MIXTRAL = ArchSpec(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("llama", _read_gguf, _write_gguf, PERMUTE_QK, experts=True),
    models="Mixtral 8x7B and 8x22B",
    defaults={"num_key_value_heads": 8, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.001},
    layout=(
        Rename("block_sparse_moe.gate", "mlp.gate"),
        Rename("block_sparse_moe.experts.{}.w1", "mlp.experts.{}.gate_proj"),
        Rename("block_sparse_moe.experts.{}.w2", "mlp.experts.{}.down_proj"),
        Rename("block_sparse_moe.experts.{}.w3", "mlp.experts.{}.up_proj"),
    ),
    expert_parameters=EXPERT_PARAMETERS,
)
