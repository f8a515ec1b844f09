"""Gemma 3, text: https://huggingface.co/docs/transformers/model_doc/gemma3"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.gemma_shared import GEMMA_DEFAULTS, gemma_fields, read_gemma_gguf, write_gemma_gguf
from converters.archs.rope import rope_of
from converters.tensor_ops import ADD_ONE_TO_NORMS
from jaxft.models.config import DecoderConfig

_LOCAL_THETA, _LARGEST = "rope.freq_base_swa", 62


def _read_config(reader: ConfigReader) -> DecoderConfig:
    """Two rotations: nested in `rope_parameters`, or `rope_theta` with `rope_scaling`, and `rope_local_base_freq`."""
    period = reader.take("sliding_window_pattern", None) or reader.take("_sliding_window_pattern", 6)
    reader.take("_sliding_window_pattern", None)
    nested = reader.take("rope_parameters", {})
    outer = {"rope_theta": reader.take("rope_theta")}
    scaling = reader.take("rope_scaling", {})
    local = {"rope_theta": reader.take("rope_local_base_freq", 10_000.0)}
    fields = gemma_fields(reader, period)
    longest = fields["max_position_embeddings"]
    fields["attention_soft_cap"] = None  # transformers' class has Gemma 2's field, and does not look at it
    fields["rope"] = rope_of(nested.get("full_attention") or scaling, outer, longest)
    return DecoderConfig(
        **fields, qk_norm="head", local_rope=rope_of(nested.get("sliding_attention") or {}, local, longest)
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": reader.number(_LOCAL_THETA, 10_000.0)}
    fields = read_gemma_gguf(reader, largest=_LARGEST)
    return {**fields, "rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": local}}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    graph = {"said": ("local_rope",), "qk_norm": "head", "rope_kinds": ("default", "linear")}
    keys = write_gemma_gguf(config, period=6, largest=_LARGEST, **graph)
    assert config.local_rope is not None
    return {**keys, _LOCAL_THETA: config.local_rope.theta}


GEMMA3 = ArchSpec(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("gemma3", _read_gguf, _write_gguf, ADD_ONE_TO_NORMS),
    models="Gemma 3 270M, 1B, and the text model of 4B to 27B",
    defaults={**GEMMA_DEFAULTS, "rope_theta": 1_000_000.0},
)
