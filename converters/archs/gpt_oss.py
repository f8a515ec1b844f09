"""gpt-oss 20b and 120b: https://huggingface.co/docs/transformers/model_doc/gpt_oss

Their experts come in MXFP4 (`converters.mxfp4`) or, once converted, in the layout below.
"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import WINDOW, every, read_common, read_common_gguf, read_windows, write_common_gguf
from converters.archs.moe import expert_stacks, read_moe, read_moe_gguf, write_moe_gguf
from converters.expert_layout import Rename
from jaxft.models.config import DecoderConfig

_WIDTHS = ("moe_intermediate_size",)

# Of transformers' GptOssConfig.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=True)
    layers = fields["num_hidden_layers"]
    reader.ignore("experts_per_token", "initial_context_length")  # older names of fields that are there
    return DecoderConfig(
        **fields,
        **read_windows(reader, layers, every(layers, 2)),
        attention_sinks=True,
        moe=read_moe(
            reader,
            experts="num_local_experts",
            moe_intermediate_size=fields["intermediate_size"],
            norm_topk_prob=True,
            router_bias=True,
            expert_bias=True,
            expert_act="clamped_swiglu",
            swiglu_alpha=float(reader.take("swiglu_alpha", 1.702)),
            swiglu_limit=float(reader.take("swiglu_limit", 7.0)),
        ),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    fields = {
        **read_common_gguf(reader, moe=True),
        **read_moe_gguf(reader, experts="num_local_experts", widths=_WIDTHS),
    }
    fields["intermediate_size"] = fields.pop("moe_intermediate_size")
    if fields["rope_parameters"]["rope_type"] == "yarn":
        fields["rope_parameters"]["truncate"] = False
    return {**fields, "sliding_window": reader.size(WINDOW)}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    keys = write_common_gguf(
        config,
        said=("moe",),
        qkv_bias=True,
        o_bias=True,
        attention_sinks=True,
        layer_types=every(config.num_hidden_layers, 2),
        rope_kinds=("default", "yarn"),
        yarn_truncate=False,
    )
    graph = {"norm_topk_prob": True, "router_bias": True, "expert_bias": True, "expert_act": "clamped_swiglu"}
    return {**keys, **write_moe_gguf(config, widths=_WIDTHS, **graph), WINDOW: config.sliding_window or 0}


# gate and up in turn: columns 0, 2, 4, ... and 1, 3, 5, ...; weights are [in, out].
_WEIGHTS = expert_stacks((0, 3, 2, 1))

GPT_OSS = ArchSpec(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("gpt-oss", _read_gguf, _write_gguf, experts=True),
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
