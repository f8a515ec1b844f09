"""Models whose tensor types are compared with llama.cpp's, and a compact way of writing those types down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.archs import ARCHS
from converters.gguf_mixes import ModelFacts
from converters.gguf_tensors import gguf_tensors
from tiny import hf_config, tensor_shapes

# Fields of config.json, a llama's where it does not say.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True},
    # Rows of multiples of 256, four queries a key, an own head; 17 layers have a first sixteenth and eighth.
    "whole_blocks": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 17, "num_attention_heads": 8,
                     "head_dim": 32},
    # Tied, two queries a key; the rows of attn_output and ffn_down are no multiple of 256, the latter's not of 32.
    "odd_rows": {"hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 9, "head_dim": 24,
                 "tie_word_embeddings": True},
    # What llama.cpp takes for a 70B.
    "eighty_layers": {"hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 80, "num_attention_heads": 2,
                      "num_key_value_heads": 1, "head_dim": 32},
    # Experts, whose number of eight counts; all rows whole blocks.
    "eight_experts": {"model_type": "mixtral", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9,
                      "num_attention_heads": 8, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
    "shared_expert": {"model_type": "qwen2_moe", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9,
                      "num_attention_heads": 8, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
                      "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "qkv_bias": False},
}  # fmt: skip


def shapes_and_facts(fields: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], ModelFacts]:
    """GGUF name -> shape of the model's tensors, and what else decides about their types."""
    config = mix_config(**fields)
    spec = ARCHS[config["model_type"]]
    decoder = spec.decoder_config(config, "test")
    assert spec.gguf is not None
    tensors = gguf_tensors(tensor_shapes(config), spec.tensors(decoder), spec.gguf, decoder)
    queries_per_key = config["num_attention_heads"] // config["num_key_value_heads"]
    experts = config.get("num_local_experts", config.get("num_experts", 0))
    facts = ModelFacts(config["num_hidden_layers"], queries_per_key, n_experts=experts)
    return {tensor.name: tensor.shape for tensor in tensors}, facts


def mix_config(**fields: Any) -> dict[str, Any]:
    """config.json of a model of `MODELS`; "mlp_bias" and "attention_bias" are llama's own."""
    config = hf_config(**fields)
    if config["model_type"] != "llama":
        del config["mlp_bias"], config["attention_bias"]
    return config


def compact(types: Mapping[str, str]) -> dict[str, str]:
    """Tensor -> type as part -> types, one for each layer unless all are the same."""
    parts: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        *layer, part, _ = name.split(".")
        parts.setdefault(part, {})[int(layer[1]) if layer else 0] = kind
    ordered = {part: [kinds[layer] for layer in sorted(kinds)] for part, kinds in sorted(parts.items())}
    return {part: kinds[0] if len(set(kinds)) == 1 else " ".join(kinds) for part, kinds in ordered.items()}
