"""Phi-3, Phi-3.5-mini and Phi-4 (also mini): https://huggingface.co/docs/transformers/model_doc/phi3"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, read_windows, write_common_gguf
from converters.layout import Fuse
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("embd_pdrop", 0.0)
    reader.expect("resid_pdrop", 0.0)
    reader.expect("attention_bias", False)
    reader.expect("mlp_bias", False)
    fields = read_common(reader)
    return DecoderConfig(**fields, **read_windows(reader, fields["num_hidden_layers"]))


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    fields = read_common_gguf(reader, whole_heads=False)
    original = fields["rope_parameters"].get("original_max_position_embeddings")
    return fields if original is None else {**fields, "original_max_position_embeddings": original}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return write_common_gguf(config, whole_heads=False, rope_kinds=("default", "longrope"))


PHI3 = ArchSpec(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("phi3", _read_gguf, _write_gguf),
    models="Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini",
    layout=(
        Fuse("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fuse("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ),
)
