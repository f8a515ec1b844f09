"""Llama 1 to 3.3, TinyLlama, SmolLM2, Yi: https://huggingface.co/docs/transformers/model_doc/llama"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import ATTENTION_BIAS, MLP_BIAS, gguf_rows, read_common
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.ignore("pretraining_tp")  # how the reference splits its matmuls, not what they compute
    return DecoderConfig(
        **read_common(reader, attention_bias=False),
        mlp_bias=reader.take("mlp_bias", False),
    )


LLAMA = ArchSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("llama", gguf_rows(ATTENTION_BIAS, MLP_BIAS), tensor_ops=PERMUTE_QK),
    models="Llama 1 to 3.3, TinyLlama, SmolLM2, Yi",
    no_greedy=("dynamic",),
)
