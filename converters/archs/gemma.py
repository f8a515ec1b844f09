"""Gemma 1: https://huggingface.co/docs/transformers/model_doc/gemma"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, write_common_gguf
from converters.tensor_ops import ADD_ONE_TO_NORMS
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("use_bidirectional_attention", False)
    # The first releases say "gelu" where they mean its tanh approximation; transformers corrects that, too.
    activation = reader.take("hidden_activation", None)
    fields = read_common(reader, attention_bias=False)
    fields["hidden_act"] = activation or {"gelu": "gelu_pytorch_tanh"}.get(fields["hidden_act"], fields["hidden_act"])
    return DecoderConfig(
        **fields,
        norm_weight_offset=1.0,
        embedding_multiplier=fields["hidden_size"] ** 0.5,
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {**read_common_gguf(reader, hidden_act="gelu_pytorch_tanh"), "attention_bias": False}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return write_common_gguf(
        config,
        hidden_act="gelu_pytorch_tanh",
        norm_weight_offset=1.0,
        embedding_multiplier=config.hidden_size**0.5,
    )


GEMMA = ArchSpec(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("gemma", _read_gguf, _write_gguf, ADD_ONE_TO_NORMS),
    models="Gemma 2B, 7B; CodeGemma",
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
)
