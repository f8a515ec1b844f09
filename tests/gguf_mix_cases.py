"""Models whose tensor types are compared with llama.cpp's, and a compact way of writing those types down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.gguf_mixes import ModelFacts
from converters.gguf_tensors import gguf_names
from tiny import hf_config, tensor_shapes

# Fields of a llama's config.json.
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
}  # fmt: skip


def shapes_and_facts(fields: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], ModelFacts]:
    """GGUF name -> shape of the model's tensors, and what else decides about their types."""
    config = hf_config(**fields)
    shapes = tensor_shapes(config)
    names = gguf_names(shapes, "llama", config["num_hidden_layers"])
    queries_per_key = config["num_attention_heads"] // config["num_key_value_heads"]
    facts = ModelFacts(config["num_hidden_layers"], queries_per_key)
    return {names[hf]: shape for hf, shape in shapes.items()}, facts


def compact(types: Mapping[str, str]) -> dict[str, str]:
    """Tensor -> type as part -> types, one for each layer unless all are the same."""
    parts: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        *layer, part, _ = name.split(".")
        parts.setdefault(part, {})[int(layer[1]) if layer else 0] = kind
    ordered = {part: [kinds[layer] for layer in sorted(kinds)] for part, kinds in sorted(parts.items())}
    return {part: kinds[0] if len(set(kinds)) == 1 else " ".join(kinds) for part, kinds in ordered.items()}
