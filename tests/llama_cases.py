"""Inputs that our tests and the torch scripts in vectors/ make alike from numpy seeds: configs, tokens, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tiny import hf_config, tensor_shapes

RANK, ALPHA = 4, 8

CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied, biases, llama3 rope": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "one kv head, odd sizes, linear rope": {
        "vocab_size": 263,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "num_hidden_layers": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
FIRST, *OTHERS = CASES
TOKENS = (2, 23)
STEPS = 10
SMOLLM2_LEARNING_RATE = 2e-4


def case_config(name: str) -> dict[str, Any]:
    """The HF config of a case."""
    return hf_config(**CASES[name])


def case_tokens(config: dict[str, Any], shape: tuple[int, int] = TOKENS, seed: int = 7) -> np.ndarray:
    """Token ids int64 of `shape`."""
    return np.random.default_rng(seed).integers(0, config["vocab_size"], shape)


def adapter(config: dict[str, Any], rank: int, size: float = 0.3, seed: int = 11) -> dict[str, np.ndarray]:
    """Non-zero A [r, in] and B [out, r] for every linear of the layers, under HF names with lora_A and lora_B.

    `size` is B's standard deviation: on a trained model of many layers a large one makes the loss chaotic, and then
    nothing can be compared.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            out, inputs = shape
            found[f"{module}.lora_A.weight"] = rng.standard_normal((rank, inputs), np.float32) * inputs**-0.5
            found[f"{module}.lora_B.weight"] = rng.standard_normal((out, rank), np.float32) * np.float32(size)
    return found


def smollm2_adapter(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A non-zero adapter of rank 16 for SmolLM2."""
    return adapter({**config, "attention_bias": False, "mlp_bias": False}, 16, size=0.02)


def smollm2_tokens() -> np.ndarray:
    """Two rows of 24 tokens of ordinary text, int64."""
    reference = json.loads((Path(__file__).parent / "vectors" / "smollm2_reference.json").read_text())
    return np.asarray(reference["paragraph"]["input_ids"][:48]).reshape(2, 24)


def probes(name: str, shape: tuple[int, ...], count: int = 4) -> np.ndarray:
    """float64 [count, *shape] of +-1, fixed by the leaf's name: projections on them stand in for a stored gradient."""
    seed = np.frombuffer(name.encode(), np.uint8).tolist()
    return np.random.default_rng(seed).choice([-1.0, 1.0], (count, *shape))


def gradient_summary(name: str, gradient: np.ndarray) -> np.ndarray:
    """float64 [5]: the gradient's norm and its projections on `probes`."""
    values = np.asarray(gradient, np.float64)
    return np.asarray([np.linalg.norm(values), *np.tensordot(probes(name, values.shape), values, values.ndim)])
