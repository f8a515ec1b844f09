"""DeepSeek-V3, R1 and models of their form: https://huggingface.co/docs/transformers/model_doc/deepseek_v3"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.deepseek import SHARED_EXPERTS, deepseek_fields, deepseek_gguf
from converters.archs.moe import EXPERT_PARAMETERS
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("scoring_func", "sigmoid")
    reader.expect("topk_method", "noaux_tc")
    # Layers behind the last one, which predict more tokens: they are no part of the decoder, and their tensors are
    # refused by name.
    reader.ignore("num_nextn_predict_layers", "num_mtp_layers")
    routing = {
        "scoring_func": "sigmoid",
        "score_correction_bias": True,
        "norm_topk_prob": reader.take("norm_topk_prob", True),
        "n_group": reader.take("n_group", 1),
        "topk_group": reader.take("topk_group", 1),
        "group_score": "top2",
    }
    return DecoderConfig(**deepseek_fields(reader, interleaved=reader.take("rope_interleave", True), routing=routing))


DEEPSEEK_V3 = ArchSpec(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read_config=_read_config,
    gguf=deepseek_gguf("sigmoid", hf={"rope_interleave": True}, score_correction_bias=True),
    models="DeepSeek-V3 and R1 (in 16 bits, without multi-token prediction), Moonlight",
    defaults={
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
    },
    layout=(SHARED_EXPERTS,),
    expert_parameters=EXPERT_PARAMETERS,
)
