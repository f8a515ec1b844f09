"""Llama 4 in GGUF: https://github.com/ggml-org/llama.cpp/blob/master/src/models/llama4.cpp

The graph fixes what the config says of chunks, of layers without positions and of their queries' temperature.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from converters.archs.base import GGUFArch, MetadataReader
from converters.archs.common import WINDOW, read_common_gguf, write_common_gguf
from converters.archs.moe import read_moe_gguf, write_moe_gguf
from jaxft.models.config import DecoderConfig, LayerType, MLPLayerType, TemperatureConfig

_WIDTHS, STEP = ("moe_intermediate_size",), "interleave_moe_layer_step"
# Of transformers' class, too.
POSITIONS = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True}
# llama.cpp knows the models whose experts come without a norm of q and k by how many there are.
_WITHOUT_NORM = 128


def chunked_layers(rotates: Sequence[bool]) -> tuple[LayerType, ...]:
    """`layer_types`: layers that rotate see a chunk, the others all."""
    return tuple("chunked_attention" if each else "full_attention" for each in rotates)


def sparse_layers(layers: int, sparse: Collection[int]) -> tuple[MLPLayerType, ...]:
    """`mlp_layer_types`."""
    return tuple("sparse" if i in sparse else "dense" for i in range(layers))


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    reader.expect(WINDOW, POSITIONS["attention_chunk_size"])
    moe = read_moe_gguf(reader, experts="num_local_experts", widths=_WIDTHS)
    common, width = read_common_gguf(reader, moe=True), moe.pop("moe_intermediate_size")
    return {
        **common,
        **moe,
        **POSITIONS,
        "intermediate_size_mlp": common["intermediate_size"],
        "intermediate_size": width,
        "attention_bias": False,
        "use_qk_norm": moe["num_local_experts"] != _WITHOUT_NORM,
        "no_rope_layer_interval": 4,
        STEP: reader.size(STEP),
    }


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    layers, moe = config.num_hidden_layers, config.moe
    assert moe is not None
    step = next(iter(config.layers_of("sparse")), 0) + 1
    rotates = [(i + 1) % 4 != 0 for i in range(layers)]
    keys = write_common_gguf(
        config,
        said=("moe",),
        interleaved=True,
        rope_kinds=("default", "linear", "llama3"),
        qk_norm=None if moe.num_experts == _WITHOUT_NORM else "rotated",
        layer_types=chunked_layers(rotates),
        attention_chunk_size=POSITIONS["attention_chunk_size"],
        nope_layers=tuple(range(3, layers, 4)),
        attn_temperature_tuning=TemperatureConfig(POSITIONS["floor_scale"], POSITIONS["attn_scale"]),
    )
    experts = write_moe_gguf(
        config,
        widths=_WIDTHS,
        scoring_func="sigmoid",
        scale_inputs=True,
        shared_expert_intermediate_size=moe.moe_intermediate_size,
        layers=sparse_layers(layers, range(step - 1, layers, step)),
    )
    return {**keys, **experts, STEP: step}


LLAMA4_GGUF = GGUFArch("llama4", _read_gguf, _write_gguf, experts=True)
