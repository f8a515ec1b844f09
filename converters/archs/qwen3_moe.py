"""Qwen3 with experts (30B-A3B, 235B-A22B): https://huggingface.co/docs/transformers/model_doc/qwen3_moe"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, read_optional_windows, write_common_gguf
from converters.archs.moe import EXPERT_PARAMETERS, read_moe, read_moe_gguf, read_sparse_layers, write_moe_gguf
from jaxft.models.config import DecoderConfig

_WIDTHS = ("moe_intermediate_size",)


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
            moe_intermediate_size=reader.take("moe_intermediate_size"),
            norm_topk_prob=reader.take("norm_topk_prob", False),
            expert_act=fields["hidden_act"],
        ),
        mlp_layer_types=read_sparse_layers(reader, layers),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    fields = {**read_common_gguf(reader, moe=True), **read_moe_gguf(reader, widths=_WIDTHS)}
    return {**fields, "attention_bias": False, "norm_topk_prob": True}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    keys = write_common_gguf(config, said=("moe",), qk_norm="head")
    return {**keys, **write_moe_gguf(config, widths=_WIDTHS, norm_topk_prob=True)}


QWEN3_MOE = ArchSpec(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("qwen3moe", _read_gguf, _write_gguf, experts=True),
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    defaults={"num_key_value_heads": 4, "sliding_window": 4096, "router_aux_loss_coef": 0.001},
    expert_parameters=EXPERT_PARAMETERS,
)
