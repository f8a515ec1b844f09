"""Qwen3 with experts (30B-A3B, 235B-A22B): https://huggingface.co/docs/transformers/model_doc/qwen3_moe"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common, read_optional_windows
from converters.archs.moe import EXPERT_PARAMETERS, expert_keys, read_moe, read_sparse_layers
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=False)
    layers = fields["num_hidden_layers"]
    reader.ignore("max_window_layers")  # transformers' class does not look at it
    return DecoderConfig(
        **fields,
        **read_optional_windows(reader, layers, ("sliding_attention",) * layers),
        qk_norm="head",
        moe=read_moe(
            reader,
            fields,
            moe_intermediate_size=reader.take("moe_intermediate_size"),
            norm_topk_prob=reader.take("norm_topk_prob", False),
        ),
        mlp_layer_types=read_sparse_layers(reader, layers),
    )


QWEN3_MOE = ArchSpec(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "qwen3moe",
        gguf_rows(*expert_keys("moe_intermediate_size")),
        graph={"qk_norm": "head", "norm_topk_prob": True},
        hf={"attention_bias": False, "norm_topk_prob": True},
    ),
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    defaults={"num_key_value_heads": 4, "sliding_window": 4096, "router_aux_loss_coef": 0.001},
    expert_parameters=EXPERT_PARAMETERS,
)
