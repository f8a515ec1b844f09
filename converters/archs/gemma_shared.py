"""What Gemma 2 and 3 share: norms on both sides, scales, soft caps, windows in all but every so-manieth layer."""

from __future__ import annotations

from typing import Any

from converters.archs.base import ConfigReader, MetadataReader
from converters.archs.common import WINDOW, every, read_common, read_common_gguf, read_windows, write_common_gguf
from jaxft.models.config import DecoderConfig

GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def gemma_fields(reader: ConfigReader, period: int) -> dict[str, Any]:
    """The fields of DecoderConfig; every `period`-th layer has full attention, and a soft cap of null is none."""
    reader.expect("use_bidirectional_attention", False)
    reader.expect("hidden_act", "gelu_pytorch_tanh")  # old spelling of the next one, ignored by transformers
    reader.expect("cache_implementation", "hybrid")
    fields = read_common(reader, activation="hidden_activation", attention_bias=False)
    return {
        **fields,
        "norm_placement": "sandwich",
        "norm_weight_offset": 1.0,
        "embedding_multiplier": fields["hidden_size"] ** 0.5,
        "attention_scale": reader.take("query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": reader.take("attn_logit_softcapping", None),
        "logit_soft_cap": reader.take("final_logit_softcapping", None),
        **read_windows(reader, fields["num_hidden_layers"], every(fields["num_hidden_layers"], period)),
    }


def read_gemma_gguf(reader: MetadataReader, *, largest: int, window: int | None = None) -> dict[str, Any]:
    """The fields of an HF config; `window` is what llama.cpp has where the file says none, `largest` as below."""
    fields = read_common_gguf(reader, hidden_act="gelu_pytorch_tanh", activation="hidden_activation")
    return {
        **fields,
        "attention_bias": False,
        "query_pre_attn_scalar": round(_attention_scale(fields, largest) ** -2),
        "sliding_window": reader.size(WINDOW, window),
    }


def write_gemma_gguf(config: DecoderConfig, *, period: int, largest: int, **graph: Any) -> dict[str, int | float | str]:
    """The keys of `read_gemma_gguf`; `graph` as of `write_common_gguf`."""
    keys = write_common_gguf(
        config,
        hidden_act="gelu_pytorch_tanh",
        norm_placement="sandwich",
        norm_weight_offset=1.0,
        embedding_multiplier=config.hidden_size**0.5,
        attention_scale=_attention_scale(vars(config), largest),
        layer_types=every(config.num_hidden_layers, period),
        **graph,
    )
    return {**keys, WINDOW: config.sliding_window or 0}


def _attention_scale(fields: dict[str, Any], largest: int) -> float:
    """What llama.cpp scales q.k by: in the model of `largest` layers by hidden_size / heads, else by head_dim."""
    by_width = fields["num_hidden_layers"] == largest
    return (fields["hidden_size"] / fields["num_attention_heads"] if by_width else fields["head_dim"]) ** -0.5
