"""Llama 1 to 3.3, TinyLlama, SmolLM2, Yi: https://huggingface.co/docs/transformers/model_doc/llama"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, write_common_gguf
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.ignore("pretraining_tp")  # how the reference splits its matmuls, not what they compute
    return DecoderConfig(
        **read_common(reader, attention_bias=False),
        mlp_bias=reader.take("mlp_bias", False),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {
        **read_common_gguf(reader),
        "attention_bias": "blk.0.attn_q.bias" in reader.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in reader.tensors,
    }


def write_llama_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    """llama.cpp's llama graph: SiLU, whole heads rotated, q.k scaled by head_dim ** -0.5, full attention."""
    return write_common_gguf(config, said=("qkv_bias", "o_bias", "mlp_bias"))


LLAMA = ArchSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("llama", _read_gguf, write_llama_gguf, PERMUTE_QK),
    models="Llama 1 to 3.3, TinyLlama, SmolLM2, Yi",
    no_greedy=("dynamic",),
)
