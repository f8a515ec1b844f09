"""OLMoE: https://huggingface.co/docs/transformers/model_doc/olmoe"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, write_common_gguf
from converters.archs.moe import EXPERT_PARAMETERS, read_moe, read_moe_gguf, write_moe_gguf
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=False)
    reader.expect("clip_qkv", None)  # no published checkpoint has it
    return DecoderConfig(
        **fields,
        qk_norm="full",
        moe=read_moe(
            reader,
            moe_intermediate_size=fields["intermediate_size"],
            norm_topk_prob=reader.take("norm_topk_prob", False),
            expert_act=fields["hidden_act"],
        ),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {**read_common_gguf(reader, moe=True), **read_moe_gguf(reader)}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    """llama.cpp's graph has a key head for each query head, and a head of its own."""
    keys = write_common_gguf(
        config, said=("moe",), qk_norm="full", num_key_value_heads=config.num_attention_heads, tie_word_embeddings=False
    )
    return {**keys, **write_moe_gguf(config)}


OLMOE = ArchSpec(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("olmoe", _read_gguf, _write_gguf, experts=True),
    models="OLMoE-1B-7B",
    defaults={"router_aux_loss_coef": 0.01},
    expert_parameters=EXPERT_PARAMETERS,
)
