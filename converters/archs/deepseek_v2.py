"""DeepSeek-V2 and V2-Lite: https://huggingface.co/docs/transformers/model_doc/deepseek_v2"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.deepseek import SHARED_EXPERTS, deepseek_fields, deepseek_gguf
from converters.archs.moe import EXPERT_PARAMETERS
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("scoring_func", "softmax")
    reader.expect("norm_topk_prob", False)
    method, groups = reader.take("topk_method", "greedy"), reader.take("n_group", 1)
    chosen = reader.take("topk_group", 1)
    if method not in ("greedy", "group_limited_greedy"):
        raise reader.refuse("topk_method", method, "greedy and group_limited_greedy")
    grouped = {"n_group": groups, "topk_group": chosen} if method == "group_limited_greedy" else {}
    return DecoderConfig(
        **deepseek_fields(reader, interleaved=True, routing=grouped), mlp_bias=reader.take("mlp_bias", False)
    )


DEEPSEEK_V2 = ArchSpec(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read_config=_read_config,
    gguf=deepseek_gguf(
        "softmax",
        fixed=("norm_topk_prob", "n_group", "topk_group"),
        hf={"topk_method": "greedy", "mlp_bias": False},
    ),
    models="DeepSeek-V2, DeepSeek-V2-Lite, DeepSeek-Coder-V2",
    defaults={"q_lora_rank": 1536},
    layout=(SHARED_EXPERTS,),
    expert_parameters=EXPERT_PARAMETERS,
)
