"""gpt-oss 20b and 120b: https://huggingface.co/docs/transformers/model_doc/gpt_oss

Their experts come in MXFP4 (`converters.mxfp4`) or, once converted, in the layout below.
"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import every, gguf_rows, read_common, read_windows, window_keys
from converters.archs.gguf_rope import Rope
from converters.archs.moe import expert_keys, expert_stacks, read_moe
from converters.expert_layout import Rename
from jaxft.models.config import DecoderConfig, MoEConfig

# Of transformers' GptOssConfig.
_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
# What the class and llama.cpp's graph fix.
_EXPERTS = {"norm_topk_prob": True, "router_bias": True, "expert_bias": True, "expert_act": "clamped_swiglu"}


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=True)
    layers = fields["num_hidden_layers"]
    reader.ignore("experts_per_token", "initial_context_length")  # older names of fields that are there
    swiglu = {name: float(reader.take(name, getattr(MoEConfig, name))) for name in ("swiglu_alpha", "swiglu_limit")}
    moe = read_moe(reader, fields, experts="num_local_experts", **_EXPERTS, **swiglu)
    return DecoderConfig(**fields, **read_windows(reader, layers, every(layers, 2)), attention_sinks=True, moe=moe)


# gate and up in turn: columns 0, 2, 4, ... and 1, 3, 5, ...; weights are [in, out].
_WEIGHTS = expert_stacks((0, 3, 2, 1))

GPT_OSS = ArchSpec(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "gpt-oss",
        gguf_rows(
            *expert_keys(num_experts="num_local_experts", moe_intermediate_size="intermediate_size"),
            *window_keys(2),
            rope=Rope(("default", "yarn"), truncate=False),
        ),
        graph={**_EXPERTS, "attention_sinks": True, "qkv_bias": True, "o_bias": True},
    ),
    models="gpt-oss-20b, gpt-oss-120b",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 150_000.0,
        "rope_scaling": _ROPE,
    },
    layout=(Rename("mlp.router", "mlp.gate"), *_WEIGHTS, *expert_stacks((0, 2, 1), kind="bias")),
    expert_parameters=_WEIGHTS,
)
