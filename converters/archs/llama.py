"""Llama 1 to 3.3, TinyLlama, SmolLM2, Yi: https://huggingface.co/docs/transformers/model_doc/llama"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.gguf_rope import read_gguf_rope, write_gguf_rope
from converters.archs.rope import read_rope
from converters.tensor_ops import PermuteRope
from jaxft.errors import JaxftError
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


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    hidden, heads = reader.size("embedding_length"), reader.size("attention.head_count")
    head_dim = reader.size("attention.key_length", hidden // heads)
    reader.expect("attention.value_length", head_dim)
    reader.expect("rope.dimension_count", head_dim)
    for experts in ("expert_count", "expert_used_count"):
        reader.expect(experts, 0)
    reader.ignore("tensor_data_layout")
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.size("feed_forward_length"),
        "num_hidden_layers": reader.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": reader.size("context_length"),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": read_gguf_rope(reader),
        "attention_bias": "blk.0.attn_q.bias" in reader.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in reader.tensors,
        "tie_word_embeddings": "output.weight" not in reader.tensors,
    }


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    _refuse_what_llama_cpp_lacks(config)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **write_gguf_rope(config.rope),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
    }


def _refuse_what_llama_cpp_lacks(config: DecoderConfig) -> None:
    """llama.cpp's llama graph: SiLU, whole heads rotated, q.k scaled by head_dim ** -0.5, full attention."""
    facts = {
        "hidden_act": (config.hidden_act, "silu"),
        "partial_rotary_factor": (config.rope.partial_rotary_factor, 1.0),
        "attention_scale": (config.attention_scale, None),
        "qk_norm": (config.qk_norm, False),
        "layer_types": (set(config.layer_types), {"full_attention"}),
    }
    for name, (value, supported) in facts.items():
        if value != supported:
            raise JaxftError(
                f"config field {name}", f"GGUF's llama architecture cannot say {value!r} (only {supported!r})"
            )


_GGUF = GGUFArch(
    name="llama",
    read_config=_read_gguf,
    write_metadata=_write_gguf,
    tensor_ops=tuple(
        PermuteRope(f"self_attn.{projection}.{kind}", heads)
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
        for kind in ("weight", "bias")
    ),
)

LLAMA = ArchSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_config,
    gguf=_GGUF,
)
