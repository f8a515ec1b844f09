"""Mixtral 8x7B and 8x22B: https://huggingface.co/docs/transformers/model_doc/mixtral"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common, read_windows
from converters.archs.moe import EXPERT_PARAMETERS, expert_keys, read_moe
from converters.expert_layout import Rename
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader)
    reader.expect("router_jitter_noise", 0.0)  # noise in training, which jaxft does not add
    return DecoderConfig(
        **fields,
        **read_windows(reader, fields["num_hidden_layers"]),
        moe=read_moe(reader, fields, experts="num_local_experts", norm_topk_prob=True),
    )


MIXTRAL = ArchSpec(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "llama",
        gguf_rows(*expert_keys(num_experts="num_local_experts")),
        graph={"norm_topk_prob": True},
        tensor_ops=PERMUTE_QK,
    ),
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
