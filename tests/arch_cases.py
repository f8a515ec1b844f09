"""Random tiny configs of every family of the registry, several each; the first one of a family is its smallest.

`tiny.random_tensors` makes the same weights for torch and for us, `tokens` the same batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_cases import CASES as LLAMA_CASES
from llama_cases import case_tokens
from moe_cases import MOE_CASES
from tiny import hf_config

TOKENS = (2, 13)
# Grouped heads whose size is not hidden / heads; sizes that are no powers of two.
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_DERIVED_HEADS = {**_SIZES, "hidden_size": 48, "head_dim": None}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

# model_type -> case -> what its config.json has beside `hf_config`'s fields.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "small": {**_SIZES, "head_dim": 12},
        **LLAMA_CASES,
        "yarn": {**_SIZES, "head_dim": 12, "rope_theta": None, "rope_parameters": _YARN},
        "dynamic": {**_SIZES, "head_dim": 12, "max_position_embeddings": 6, "rope_scaling": _DYNAMIC},
    },
    "mistral": {
        "window": {**_SIZES, "head_dim": 12, "sliding_window": 5},
        "no window, one kv head": {**_SIZES, "head_dim": 16, "sliding_window": None, "num_key_value_heads": 1},
        "derived heads, tied": {**_DERIVED_HEADS, "sliding_window": None, "tie_word_embeddings": True},
    },
    "qwen2": {
        "biases": {**_DERIVED_HEADS, "use_sliding_window": False, "sliding_window": 4},
        "windows in late layers, tied": {
            **_DERIVED_HEADS,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        "yarn, no grouping": {**_DERIVED_HEADS, "num_key_value_heads": 4, "rope_scaling": _YARN},
    },
    **MOE_CASES,
}
# Fields of `hf_config`, llama's, that other families do not have.
_LLAMAS_OWN = ("attention_bias", "mlp_bias", "head_dim")


def families() -> list[str]:
    """Every family with cases."""
    return list(CASES)


def smallest(family: str) -> str:
    """The case of the default tier."""
    return next(iter(CASES[family]))


def arch_config(family: str, case: str) -> dict[str, Any]:
    """config.json of a case."""
    config = hf_config(**CASES[family][case])
    if family != config["model_type"]:
        given = CASES[family][case]
        config = {name: value for name, value in config.items() if name in given or name not in _LLAMAS_OWN}
        config |= {"model_type": family, "architectures": [_architecture(family)]}
    return {name: value for name, value in config.items() if value is not None}


def _architecture(family: str) -> str:
    from converters.archs import ARCHS

    return ARCHS[family].architecture


def tokens(config: dict[str, Any]) -> np.ndarray:
    """int64 [2, 13]."""
    return case_tokens(config, TOKENS)
