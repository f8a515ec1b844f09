"""Gemma 3, text: https://huggingface.co/docs/transformers/model_doc/gemma3"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.common import gguf_rows, window_keys
from converters.archs.gemma_shared import GEMMA_ACTIVATION, GEMMA_DEFAULTS, gemma_fields, gemma_gguf
from converters.archs.gguf_rope import LOCAL_THETA, Rope
from converters.archs.rope import rope_of
from jaxft.models.config import DecoderConfig


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


GEMMA3 = ArchSpec(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read_config=_read_config,
    gguf=gemma_gguf(
        "gemma3",
        gguf_rows(GEMMA_ACTIVATION, *window_keys(6), LOCAL_THETA, rope=Rope(("default", "linear"))),
        largest=62,
        qk_norm="head",
    ),
    models="Gemma 3 270M, 1B, and the text model of 4B to 27B",
    defaults={**GEMMA_DEFAULTS, "rope_theta": 1_000_000.0},
)
