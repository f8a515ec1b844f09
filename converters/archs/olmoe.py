"""OLMoE: https://huggingface.co/docs/transformers/model_doc/olmoe"""

from __future__ import annotations

from operator import itemgetter

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common
from converters.archs.moe import EXPERT_PARAMETERS, expert_keys, read_moe
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=False)
    reader.expect("clip_qkv", None)  # no published checkpoint has it
    return DecoderConfig(
        **fields,
        qk_norm="full",
        moe=read_moe(reader, fields, norm_topk_prob=reader.take("norm_topk_prob", False)),
    )


OLMOE = ArchSpec(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "olmoe",
        gguf_rows(*expert_keys()),
        graph={
            "qk_norm": "full",
            "num_key_value_heads": itemgetter("num_attention_heads"),
            "tie_word_embeddings": False,
        },
    ),
    models="OLMoE-1B-7B",
    defaults={"router_aux_loss_coef": 0.01},
    expert_parameters=EXPERT_PARAMETERS,
)
