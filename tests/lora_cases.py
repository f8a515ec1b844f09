"""Kinds of adapters for our tests and the torch script in vectors/ alike: settings, values, what dropout drops."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from llama_cases import case_tokens
from tiny import hf_config

# One layer: everything that an adapter can do happens in it.
CONFIG = hf_config(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_bias=True,
    pad_token_id=None,  # torch would give that token's embedding no gradient
)
TOKENS = case_tokens(CONFIG, (2, 11))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DROPOUT_SEED = 5

# Fields of peft's LoraConfig and of ours. Those with a start of their own keep what they start from.
CASES: dict[str, dict[str, Any]] = {
    "rslora, patterns, whole modules": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 5},
        "alpha_pattern": {"down_proj": 3},
        "bias": "all",
        "modules_to_save": ["embed_tokens", "lm_head", "norm"],
    },
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.25},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.25},
    "bias of what is adapted": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    "embedding, head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq"},
}
STARTS = ("pissa", "olora", "loftq")
SLOW = ("dora, dropout", "bias of what is adapted", "embedding, head", "olora")  # what others and the ops' cases show


def settings(case: str) -> dict[str, Any]:
    """The keywords of either LoraConfig."""
    return {"r": 3, "lora_alpha": 5, "target_modules": LINEARS, **CASES[case]}


def value(name: str, old: np.ndarray) -> np.ndarray:
    """What a tensor of the adapter holds: random factors of B A and magnitudes near 1; the rest near what it was."""
    seed = zlib.crc32(name.encode())
    noise = np.random.default_rng(seed).standard_normal(old.shape, np.float32)
    if "magnitude" in name:
        return 1 + 0.2 * noise
    if "lora_" in name:
        return noise * np.float32(0.3 if "B" in name.rsplit("lora_", 1)[1] else old.shape[1] ** -0.5)
    return old + 0.1 * noise


def dropout_mask(module: str, shape: tuple[int, int]) -> np.ndarray:
    """bool [tokens, in]: which values of the input of 'model.layers.{i}.mlp.up_proj' ours keeps."""
    import jax

    from pallas_kernels import dropout

    layer, name = int(module.split(".")[2]), module.rsplit(".", 1)[1]
    key = jax.random.fold_in(jax.random.key(DROPOUT_SEED), layer)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return np.asarray(dropout.keep_mask(dropout.seed(key), shape, 0.25))
