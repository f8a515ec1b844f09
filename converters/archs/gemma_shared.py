"""What Gemma 2 and 3 share: norms on both sides, scales, soft caps, windows in all but every so-manieth layer."""

from __future__ import annotations

from typing import Any

from converters.archs.base import ConfigReader, GGUFArch
from converters.archs.common import every, read_common, read_windows
from converters.archs.gguf_keys import Facts, Fixed, Row, values_of
from converters.tensor_ops import ADD_ONE_TO_NORMS

# What the classes and llama.cpp's graphs fix.
GEMMA_SCALES = {"norm_weight_offset": 1.0, "embedding_multiplier": lambda facts: facts["hidden_size"] ** 0.5}
_FIXED = {"norm_placement": "sandwich", **GEMMA_SCALES}
GEMMA_ACTIVATION = Fixed("hidden_act", "hidden_activation", "gelu_pytorch_tanh")

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
        **values_of(_FIXED, fields),
        "attention_scale": reader.take("query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": reader.take("attn_logit_softcapping", None),
        "logit_soft_cap": reader.take("final_logit_softcapping", None),
        **read_windows(reader, fields["num_hidden_layers"], every(fields["num_hidden_layers"], period)),
    }


def gemma_gguf(name: str, rows: tuple[Row, ...], *, largest: int, **graph: Any) -> GGUFArch:
    """The architecture `name`; `graph` is beside what all of them fix.

    In the model of `largest` layers q.k is scaled by hidden_size / heads, in others by head_dim.
    """

    def scaled_by(facts: Facts) -> float:
        by_width = facts["num_hidden_layers"] == largest
        return facts["hidden_size"] / facts["num_attention_heads"] if by_width else facts["head_dim"]

    scale = {"attention_scale": lambda facts: scaled_by(facts) ** -0.5}
    return GGUFArch(
        name,
        rows,
        graph={**_FIXED, **scale, **graph},
        hf={"attention_bias": False, "query_pre_attn_scalar": lambda fields: round(scaled_by(fields))},
        tensor_ops=ADD_ONE_TO_NORMS,
    )
