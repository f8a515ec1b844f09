"""Llama 1 to 3.3, TinyLlama, SmolLM2, Yi: https://huggingface.co/docs/transformers/model_doc/llama"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.rope import read_rope
from converters.tensor_ops import PermuteRope
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    heads, hidden = reader.take("num_attention_heads"), reader.take("hidden_size")
    attention_bias = reader.take("attention_bias", False)
    # Changes only how the reference splits its matmuls, not what they compute.
    reader.take("pretraining_tp", 1)
    reader.expect("attention_dropout", 0.0)
    return DecoderConfig(
        vocab_size=reader.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.take("intermediate_size"),
        num_hidden_layers=reader.take("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.take("num_key_value_heads", heads),
        head_dim=reader.take("head_dim", hidden // heads),
        max_position_embeddings=reader.take("max_position_embeddings", 2048),
        hidden_act=reader.take("hidden_act", "silu"),
        rms_norm_eps=reader.take("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.take("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=reader.take("mlp_bias", False),
        rope=read_rope(reader),
    )


LLAMA = ArchSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_config,
    gguf=None,
)
