"""Qwen3, dense: https://huggingface.co/docs/transformers/model_doc/qwen3"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common
from converters.archs.qwen2 import read_qwen_windows
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=False)
    windows = read_qwen_windows(reader, fields["num_hidden_layers"])
    return DecoderConfig(**fields, qk_norm="head", **windows)


QWEN3 = ArchSpec(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("qwen3", gguf_rows(), graph={"qk_norm": "head"}, hf={"attention_bias": False}),
    models="Qwen3 0.6B to 32B (dense)",
    defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
)
