"""Llama 4, text: https://huggingface.co/docs/transformers/model_doc/llama4"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.common import read_common, read_nope_layers
from converters.archs.llama4_gguf import LLAMA4_GGUF, POSITIONS, ROUTING, chunked_layers
from converters.archs.moe import expert_stacks, read_interleaved_layers, read_moe
from converters.expert_layout import Rename
from jaxft.models.config import DecoderConfig, TemperatureConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.ignore("router_jitter_noise", "for_llm_compression")
    fields = read_common(reader, interleaved=True, attention_bias=False)
    layers, width = fields["num_hidden_layers"], fields["intermediate_size"]
    nope, chunk = read_nope_layers(reader, layers), reader.take("attention_chunk_size", None)
    temperature = TemperatureConfig(reader.take("floor_scale"), float(reader.take("attn_scale")))
    return DecoderConfig(
        **{**fields, "intermediate_size": reader.take("intermediate_size_mlp")},
        qk_norm="rotated" if reader.take("use_qk_norm") else None,
        layer_types=tuple(reader.take("layer_types", None) or (chunked_layers(layers, nope) if chunk else ())),
        attention_chunk_size=chunk,
        nope_layers=nope,
        attn_temperature_tuning=temperature if reader.take("attn_temperature_tuning") else None,
        moe=read_moe(reader, fields, experts="num_local_experts", shared_expert_intermediate_size=width, **ROUTING),
        mlp_layer_types=read_interleaved_layers(reader, layers),
    )


# gate beside up; weights are [in, out].
_EXPERTS = expert_stacks((0, 3, 1, 2), hf="feed_forward.experts.", peft_exchanges=True)

LLAMA4 = ArchSpec(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    read_config=_read_config,
    gguf=LLAMA4_GGUF,
    models="the text model of Llama 4 Scout and Maverick",
    defaults={
        **POSITIONS,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 500_000.0,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "router_aux_loss_coef": 0.001,
    },
    layout=(*_EXPERTS, Rename("feed_forward.router", "mlp.gate"), Rename("feed_forward", "mlp")),
    expert_parameters=_EXPERTS,
)
