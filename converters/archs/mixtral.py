"""Mixtral 8x7B and 8x22B: https://huggingface.co/docs/transformers/model_doc/mixtral"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.common import read_common, read_windows
from converters.archs.moe import EXPERT_PARAMETERS, read_moe
from converters.expert_layout import Rename
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, theta=1000000.0)
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


MIXTRAL = ArchSpec(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=_read_config,
    gguf=None,
    models="Mixtral 8x7B and 8x22B",
    layout=(
        Rename("block_sparse_moe.gate", "mlp.gate"),
        Rename("block_sparse_moe.experts.{}.w1", "mlp.experts.{}.gate_proj"),
        Rename("block_sparse_moe.experts.{}.w2", "mlp.experts.{}.down_proj"),
        Rename("block_sparse_moe.experts.{}.w3", "mlp.experts.{}.up_proj"),
    ),
    expert_parameters=EXPERT_PARAMETERS,
)
