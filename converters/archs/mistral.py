"""Mistral 7B, Mistral Nemo and Mistral Small (text): https://huggingface.co/docs/transformers/model_doc/mistral

GGUF has no architecture of this name: llama.cpp's converter writes "llama", and so do we.
"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common, read_windows
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader)
    return DecoderConfig(**fields, **read_windows(reader, fields["num_hidden_layers"]))


MISTRAL = ArchSpec(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("llama", gguf_rows(), hf={"sliding_window": None}, tensor_ops=PERMUTE_QK),
    models="Mistral 7B, Nemo and Small (text)",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
