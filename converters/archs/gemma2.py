"""Gemma 2: https://huggingface.co/docs/transformers/model_doc/gemma2"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import every, read_common, read_common_gguf, read_windows, write_common_gguf
from converters.tensor_ops import ADD_ONE_TO_NORMS
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig

_WINDOW, _CAP, _LOGIT_CAP = "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"

# Of fields that Gemma 2 and 3 share.
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def gemma_fields(reader: ConfigReader, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; every `period`-th layer has full attention, and a soft cap of null is none."""
    bias = reader.take("attention_bias", False)
    reader.expect("use_bidirectional_attention", False)
    reader.expect("hidden_act", "gelu_pytorch_tanh")  # old spelling of the next one, ignored by transformers
    reader.expect("cache_implementation", "hybrid")
    fields = read_common(reader, activation="hidden_activation")
    layers = fields["num_hidden_layers"]
    return {
        **fields,
        "norm_placement": "sandwich",
        "norm_weight_offset": 1.0,
        "embedding_multiplier": fields["hidden_size"] ** 0.5,
        "attention_scale": reader.take("query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": reader.take(_CAP, None),
        "logit_soft_cap": reader.take(_LOGIT_CAP, None),
        "qkv_bias": bias,
        "o_bias": bias,
        **read_windows(reader, layers, every(layers, period)),
    }


def _read_config(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(**gemma_fields(reader, 2))


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    fields = read_common_gguf(reader, hidden_act="gelu_pytorch_tanh", activation="hidden_activation")
    return {
        **fields,
        "attention_bias": False,
        "query_pre_attn_scalar": round(gemma_attention_scale(fields, 46) ** -2),
        "sliding_window": reader.size(_WINDOW, 4096),
        "attn_logit_softcapping": reader.number(_CAP, 50.0),
        "final_logit_softcapping": reader.number(_LOGIT_CAP, 30.0),
    }


def gemma_attention_scale(fields: dict[str, Any], largest: int) -> float:
    """What llama.cpp scales q.k by: in the model of `largest` layers by hidden_size / heads, else by head_dim."""
    by_width = fields["num_hidden_layers"] == largest
    return (fields["hidden_size"] / fields["num_attention_heads"] if by_width else fields["head_dim"]) ** -0.5


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    if not (config.attention_soft_cap and config.logit_soft_cap):
        raise JaxftError("config field attn_logit_softcapping", "this GGUF architecture cannot be without soft caps")
    keys = write_common_gguf(
        config,
        said=("attention_soft_cap", "logit_soft_cap"),
        hidden_act="gelu_pytorch_tanh",
        norm_placement="sandwich",
        norm_weight_offset=1.0,
        embedding_multiplier=config.hidden_size**0.5,
        attention_scale=gemma_attention_scale(vars(config), 46),
        layer_types=every(config.num_hidden_layers, 2),
    )
    caps = {_CAP: config.attention_soft_cap, _LOGIT_CAP: config.logit_soft_cap, _WINDOW: config.sliding_window}
    return {**keys, **{name: value for name, value in caps.items() if value}}


GEMMA2 = ArchSpec(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("gemma2", _read_gguf, _write_gguf, ADD_ONE_TO_NORMS),
    models="Gemma 2 2B, 9B, 27B",
    defaults={**GEMMA_DEFAULTS, _CAP: 50.0, _LOGIT_CAP: 30.0},
)
