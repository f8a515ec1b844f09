"""Qwen3 with experts (30B-A3B, 235B-A22B): https://huggingface.co/docs/transformers/model_doc/qwen3_moe"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.common import read_common, read_optional_windows
from converters.archs.moe import EXPERT_PARAMETERS, read_moe, read_sparse_layers
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader)
    layers, bias = fields["num_hidden_layers"], reader.take("attention_bias", False)
    reader.take("max_window_layers", layers)  # transformers' class does not look at it
    return DecoderConfig(
        **fields,
        **read_optional_windows(reader, layers, ("sliding_attention",) * layers),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        moe=read_moe(
            reader,
            moe_intermediate_size=reader.take("moe_intermediate_size"),
            norm_topk_prob=reader.take("norm_topk_prob", False),
            expert_act=fields["hidden_act"],
        ),
        mlp_layer_types=read_sparse_layers(reader, layers),
    )


QWEN3_MOE = ArchSpec(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=_read_config,
    gguf=None,
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    expert_parameters=EXPERT_PARAMETERS,
)
