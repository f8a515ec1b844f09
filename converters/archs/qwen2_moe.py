"""Qwen1.5-MoE and Qwen2-57B-A14B: https://huggingface.co/docs/transformers/model_doc/qwen2_moe"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common, read_optional_windows
from converters.archs.gguf_keys import Present
from converters.archs.moe import EXPERT_PARAMETERS, expert_keys, read_moe, read_sparse_layers
from jaxft.models.config import DecoderConfig, LayerType


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader)
    layers, late = fields["num_hidden_layers"], reader.take("max_window_layers", 28)
    types: list[LayerType] = [
        "sliding_attention" if (i + 1) % 2 and i < late else "full_attention" for i in range(layers)
    ]
    return DecoderConfig(
        **fields,
        **read_optional_windows(reader, layers, types),
        qkv_bias=reader.take("qkv_bias", True),
        moe=read_moe(
            reader,
            fields,
            moe_intermediate_size=reader.take("moe_intermediate_size"),
            norm_topk_prob=reader.take("norm_topk_prob", False),
            shared_expert_intermediate_size=reader.take("shared_expert_intermediate_size"),
            shared_expert_gate=True,
        ),
        mlp_layer_types=read_sparse_layers(reader, layers),
    )


QWEN2_MOE = ArchSpec(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "qwen2moe",
        gguf_rows(
            *expert_keys("moe_intermediate_size", "shared_expert_intermediate_size"),
            Present("blk.0.attn_q.bias", "qkv_bias"),
        ),
        graph={"shared_expert_gate": True, "tie_word_embeddings": False},
    ),
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    defaults={"num_key_value_heads": 16, "sliding_window": 4096, "router_aux_loss_coef": 0.001},
    expert_parameters=EXPERT_PARAMETERS,
)
