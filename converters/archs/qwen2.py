"""Qwen2 and Qwen2.5: https://huggingface.co/docs/transformers/model_doc/qwen2"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common, read_optional_windows
from jaxft.models.config import DecoderConfig, LayerType


def read_qwen_windows(reader: ConfigReader, layers: int) -> dict[str, Any]:
    """From layer `max_window_layers` on there is a sliding window, if there is one at all."""
    first = reader.take("max_window_layers", 28)
    types: list[LayerType] = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return read_optional_windows(reader, layers, types)


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader)
    return DecoderConfig(**fields, qkv_bias=True, **read_qwen_windows(reader, fields["num_hidden_layers"]))


QWEN2 = ArchSpec(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("qwen2", gguf_rows(), graph={"qkv_bias": True}),
    models="Qwen2, Qwen2.5",
    defaults={"num_key_value_heads": 32, "sliding_window": 4096},
)
