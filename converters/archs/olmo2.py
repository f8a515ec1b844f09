"""OLMo 2: https://huggingface.co/docs/transformers/model_doc/olmo2"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common
from converters.archs.gguf_keys import Facts
from jaxft.models.config import DecoderConfig

# What the class and llama.cpp's graph fix.
_FIXED: Facts = {"norm_placement": "post", "qk_norm": "full"}


def _read_config(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(**read_common(reader, attention_bias=False), **_FIXED)


OLMO2 = ArchSpec(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("olmo2", gguf_rows(), graph=_FIXED, hf={"attention_bias": False}),
    models="OLMo 2 1B to 32B",
)
