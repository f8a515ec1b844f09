"""Qwen1.5-MoE and Qwen2-57B-A14B: https://huggingface.co/docs/transformers/model_doc/qwen2_moe"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, read_optional_windows, write_common_gguf
from converters.archs.moe import EXPERT_PARAMETERS, WIDTHS, read_moe, read_moe_gguf, read_sparse_layers, write_moe_gguf
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
            moe_intermediate_size=reader.take("moe_intermediate_size"),
            norm_topk_prob=reader.take("norm_topk_prob", False),
            expert_act=fields["hidden_act"],
            shared_expert_intermediate_size=reader.take("shared_expert_intermediate_size"),
            shared_expert_gate=True,
        ),
        mlp_layer_types=read_sparse_layers(reader, layers),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    biased = "blk.0.attn_q.bias" in reader.tensors
    return {**read_common_gguf(reader, moe=True), **read_moe_gguf(reader, widths=WIDTHS), "qkv_bias": biased}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    keys = write_common_gguf(config, said=("moe", "qkv_bias"), tie_word_embeddings=False)
    return {**keys, **write_moe_gguf(config, widths=WIDTHS, shared_expert_gate=True)}


QWEN2_MOE = ArchSpec(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("qwen2moe", _read_gguf, _write_gguf, experts=True),
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    defaults={"num_key_value_heads": 16, "sliding_window": 4096, "router_aux_loss_coef": 0.001},
    expert_parameters=EXPERT_PARAMETERS,
)
