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
_GEMMA = {**_SIZES, "head_dim": 12, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
_GEMMA2 = {
    **_GEMMA,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "sliding_window": 5,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = {
    **_GEMMA2,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 100000.0,
    "rope_local_base_freq": 10000.0,
}
_SHORT, _LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
_STARCODER2 = {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": None, "norm_epsilon": 1e-5}
_STABLELM = {"rms_norm_eps": None, "layer_norm_eps": 1e-5}

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
    "qwen3": {
        "q/k norm": {**_SIZES, "head_dim": 12},
        "no grouping, tied, windows": {
            **_SIZES,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        "yarn, biases": {**_SIZES, "head_dim": 12, "attention_bias": True, "rope_scaling": _YARN},
    },
    "gemma": {
        "small": {**_GEMMA, "hidden_act": "gelu_pytorch_tanh"},
        "one kv head, old activation": {**_GEMMA, "num_key_value_heads": 1, "hidden_act": "gelu"},
        "untied": {**_GEMMA, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False},
    },
    "gemma2": {
        "small": {**_GEMMA2},
        "odd layers, tight caps": {
            **_GEMMA2,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
        "no caps": {**_GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_size": 36},
    },
    "gemma3_text": {
        "small": {**_GEMMA3, "sliding_window_pattern": 2},
        "period of six and a remainder": {**_GEMMA3, "num_hidden_layers": 8},
        "scaled global rope, one kv head": {
            **_GEMMA3,
            "num_key_value_heads": 1,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "phi3": {
        "fused": {**_DERIVED_HEADS},
        "partial rotation, no grouping": {
            **_DERIVED_HEADS,
            "hidden_size": 64,
            "num_key_value_heads": 4,
            "partial_rotary_factor": 0.75,
        },
        "long documents of longrope": {
            **_DERIVED_HEADS,
            "original_max_position_embeddings": 8,
            "rope_scaling": {"rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
        },
        "short documents of longrope, window": {
            **_DERIVED_HEADS,
            "max_position_embeddings": 600,
            "original_max_position_embeddings": 300,  # llama.cpp's contexts are multiples of 256
            "sliding_window": 5,
            "rope_scaling": {"rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
        },
    },
    "granite": {
        "multipliers": {**_DERIVED_HEADS, **_MULTIPLIERS},
        "biases, tied, one kv head": {
            **_DERIVED_HEADS,
            **_MULTIPLIERS,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
        },
    },
    "olmo2": {
        "norms behind": {**_DERIVED_HEADS},
        "one kv head, biases, tied": {
            **_DERIVED_HEADS,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "smollm3": {
        "layers without positions": {**_DERIVED_HEADS, "no_rope_layer_interval": 2},
        "every fourth, tied": {**_DERIVED_HEADS, "num_hidden_layers": 5, "tie_word_embeddings": True},
        "windows, biases": {
            **_DERIVED_HEADS,
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 4,
            "attention_bias": True,
            "mlp_bias": True,
        },
    },
    "cohere": {
        "parallel": {
            **_DERIVED_HEADS,
            "layer_norm_eps": 1e-5,
            "rms_norm_eps": None,
            "tie_word_embeddings": True,
            "logit_scale": 0.8,
        },
        "q/k norm, biases": {
            **_DERIVED_HEADS,
            "layer_norm_eps": 1e-5,
            "rms_norm_eps": None,
            "logit_scale": 0.25,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_key_value_heads": 4,
        },
    },
    "starcoder2": {
        "no gate": {**_DERIVED_HEADS, **_STARCODER2, "tie_word_embeddings": True},
        "window, one kv head, untied": {
            **_DERIVED_HEADS,
            **_STARCODER2,
            "sliding_window": 5,
            "num_key_value_heads": 1,
        },
        "no biases": {**_DERIVED_HEADS, **_STARCODER2, "use_bias": False},
    },
    "stablelm": {
        "a quarter rotated": {**_DERIVED_HEADS, **_STABLELM, "hidden_size": 64},
        "parallel, biases, one kv head, tied": {
            **_DERIVED_HEADS,
            **_STABLELM,
            "partial_rotary_factor": 0.5,
            "use_parallel_residual": True,
            "use_qkv_bias": True,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
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
    # These nulls say that there is no such thing; that of other fields, that the case does not have the field.
    said = (
        "q_lora_rank", "sliding_window", "attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping"
    )  # fmt: skip
    return {name: value for name, value in config.items() if value is not None or name in said}


def _architecture(family: str) -> str:
    from converters.archs import ARCHS

    return ARCHS[family].architecture


def tokens(config: dict[str, Any]) -> np.ndarray:
    """int64 [2, 13]."""
    return case_tokens(config, TOKENS)


# What llama.cpp's graphs hold of these; the export refuses the others.
GGUF_CASES = {
    (family, case)
    for family, cases in CASES.items()
    for case in cases
    if (family, case)
    not in {
        ("llama", "dynamic"),
        ("qwen3", "yarn, biases"),
        ("gemma", "untied"),
        ("gemma2", "no caps"),
        ("gemma3_text", "small"),
        ("gemma3_text", "scaled global rope, one kv head"),
        ("olmo2", "one kv head, biases, tied"),
        ("smollm3", "layers without positions"),
        ("smollm3", "windows, biases"),
        ("cohere", "q/k norm, biases"),
        ("starcoder2", "no biases"),
        ("stablelm", "parallel, biases, one kv head, tied"),
        ("qwen3_moe", "dense layers between, biases"),
        ("qwen2_moe", "windows, dense layers"),
        ("olmoe", "experts"),
        ("olmoe", "normed"),
        ("gpt_oss", "three layers, tight clamp"),
        ("deepseek_v2", "groups, yarn"),
        ("deepseek_v2", "greedy, q of the token, biases"),
        ("deepseek_v3", "groups, yarn"),
        ("deepseek_v3", "halves, q of the token, all sparse"),
        ("llama4_text", "chunks, temperature"),
        ("llama4_text", "dense layers between, two experts, biases"),
        ("llama4_text", "no norm, no temperature, full attention"),
    }
}


def smallest_in_gguf(family: str) -> str:
    """The first case that llama.cpp's graph has."""
    return next(case for case in CASES[family] if (family, case) in GGUF_CASES)


EVERY_CASE = [(family, case) for family, cases in CASES.items() for case in cases]


def greedy_is_compared(family: str, case: str) -> bool:
    """Whether the case's greedy tokens are compared with transformers'.

    With "dynamic" RoPE its cache keeps keys as they were rotated when the text was shorter, where each of our lengths
    has one rotation: from the same tokens the two go on differently.
    """
    config = arch_config(family, case)
    return (config.get("rope_scaling") or {}).get("rope_type") != "dynamic"
