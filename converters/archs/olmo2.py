"""OLMo 2: https://huggingface.co/docs/transformers/model_doc/olmo2"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, write_common_gguf
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(**read_common(reader, attention_bias=False), norm_placement="post", qk_norm="full")


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {**read_common_gguf(reader), "attention_bias": False}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return write_common_gguf(config, norm_placement="post", qk_norm="full")


OLMO2 = ArchSpec(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("olmo2", _read_gguf, _write_gguf),
    models="OLMo 2 1B to 32B",
)
