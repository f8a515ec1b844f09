"""Llama 4 in GGUF: https://github.com/ggml-org/llama.cpp/blob/master/src/models/llama4.cpp

The graph fixes what the config says of chunks, of layers without positions and of their queries' temperature.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import itemgetter

from converters.archs.base import GGUFArch
from converters.archs.common import WHOLE_CONTEXT, WINDOW, every_fourth, gguf_rows
from converters.archs.gguf_keys import Key
from converters.archs.gguf_rope import Rope
from converters.archs.moe import expert_keys
from jaxft.models.config import LayerType, TemperatureConfig

# Of transformers' class, too.
POSITIONS = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True}
# llama.cpp knows the models whose experts come without a norm of q and k by how many there are.
_WITHOUT_NORM = 128
# Of the experts in HF's config, and of the layers without them in the decoder's.
_WIDTH = "intermediate_size"
# What the class fixes, too.
ROUTING = {"scoring_func": "sigmoid", "scale_inputs": True}


def chunked_layers(layers: int, nope: Collection[int]) -> tuple[LayerType, ...]:
    """`layer_types`: layers without positions see all, the others a chunk."""
    return tuple("full_attention" if i in nope else "chunked_attention" for i in range(layers))


LLAMA4_GGUF = GGUFArch(
    "llama4",
    gguf_rows(
        *expert_keys("interleave_moe_layer_step", num_experts="num_local_experts", moe_intermediate_size=_WIDTH),
        Key("feed_forward_length", "intermediate_size_mlp", _WIDTH),
        WHOLE_CONTEXT,
        Key(WINDOW, None, default=POSITIONS["attention_chunk_size"]),
        rope=Rope(("default", "linear", "llama3"), interleaved=True),
    ),
    graph={
        "qk_norm": lambda facts: None if facts["num_experts"] == _WITHOUT_NORM else "rotated",
        "layer_types": lambda facts: chunked_layers(facts["num_hidden_layers"], every_fourth(facts)),
        "attention_chunk_size": POSITIONS["attention_chunk_size"],
        "nope_layers": every_fourth,
        "attn_temperature_tuning": TemperatureConfig(POSITIONS["floor_scale"], POSITIONS["attn_scale"]),
        **ROUTING,
        "shared_expert_intermediate_size": itemgetter("moe_intermediate_size"),
    },
    hf={
        **POSITIONS,
        "attention_bias": False,
        "use_qk_norm": lambda fields: fields["num_local_experts"] != _WITHOUT_NORM,
        "no_rope_layer_interval": 4,
    },
)
