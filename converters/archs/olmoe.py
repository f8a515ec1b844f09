"""OLMoE: https://huggingface.co/docs/transformers/model_doc/olmoe"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.common import read_common
from converters.archs.moe import EXPERT_PARAMETERS, read_moe
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader)
    bias = reader.take("attention_bias", False)
    reader.expect("clip_qkv", None)  # no published checkpoint has it
    return DecoderConfig(
        **fields,
        qk_norm="full",
        qkv_bias=bias,
        o_bias=bias,
        moe=read_moe(
            reader,
            moe_intermediate_size=fields["intermediate_size"],
            norm_topk_prob=reader.take("norm_topk_prob", False),
            expert_act=fields["hidden_act"],
        ),
    )


OLMOE = ArchSpec(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=_read_config,
    gguf=None,
    models="OLMoE-1B-7B",
    expert_parameters=EXPERT_PARAMETERS,
)
