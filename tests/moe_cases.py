"""The cases of families with experts, for `arch_cases`."""

from __future__ import annotations

from typing import Any

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DERIVED_HEADS = {**_SIZES, "hidden_size": 48, "head_dim": None}
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "truncate": False,
}  # fmt: skip

_DEEPSEEK = {
    **_SIZES, "num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6, "v_head_dim": 10, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
_DEEPSEEK_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 1.2,
}  # fmt: skip

_LLAMA4 = {
    **_SIZES, "intermediate_size": 24, "intermediate_size_mlp": 56, "head_dim": 12, "num_local_experts": 5,
    "num_experts_per_tok": 1,
}  # fmt: skip
_LLAMA4_ROPE = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip

MOE_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_moe": {
        "experts": {**_SIZES, **_EXPERTS, "head_dim": 12, "norm_topk_prob": True},
        "dense layers between, biases": {
            **_SIZES, **_EXPERTS, "head_dim": 12, "num_hidden_layers": 5, "decoder_sparse_step": 2,
            "mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True,
        },
    },
    "qwen2_moe": {
        "shared expert": {**_DERIVED_HEADS, **_EXPERTS, "shared_expert_intermediate_size": 20},
        "windows, dense layers": {
            **_DERIVED_HEADS, **_EXPERTS, "shared_expert_intermediate_size": 20, "num_hidden_layers": 4,
            "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3, "mlp_only_layers": [0],
            "norm_topk_prob": True, "qkv_bias": False,
        },
    },
    "olmoe": {
        "experts": {**_DERIVED_HEADS, "num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24},
        "normed": {
            **_DERIVED_HEADS, "num_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 24,
            "norm_topk_prob": True, "num_key_value_heads": 4,
        },
        "no grouping": {
            **_DERIVED_HEADS, "num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24,
            "num_key_value_heads": 4,
        },
    },
    "mixtral": {
        "experts": {**_SIZES, "head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2},
        "window, one kv head": {
            **_SIZES, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 4,
            "num_key_value_heads": 1, "tie_word_embeddings": True,
        },
    },
    "granitemoe": {
        "multipliers": {
            **_DERIVED_HEADS, "num_local_experts": 5, "num_experts_per_tok": 2, "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 0.5,
        },
        "plain, tied, biases": {
            **_DERIVED_HEADS, "num_local_experts": 4, "num_experts_per_tok": 3, "attention_multiplier": 0.3,
            "tie_word_embeddings": True, "attention_bias": True,
        },
    },
    "gpt_oss": {
        "experts": {**_SIZES, "head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4,
            "rope_parameters": _YARN, "rope_theta": None},
        "three layers, tight clamp": {
            **_SIZES, "head_dim": 12, "num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 3,
            "sliding_window": 3, "swiglu_limit": 0.5, "swiglu_alpha": 1.2,
        },
    },
    "deepseek_v2": {
        "groups, yarn": {
            **_DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
            "rope_scaling": _DEEPSEEK_YARN,
        },
        "greedy, q of the token, biases": {
            **_DEEPSEEK, "q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2, "num_hidden_layers": 3,
            "topk_method": "greedy",
        },
        "yarn of one scale": {
            **_DEEPSEEK, "rms_norm_eps": 1e-6, "rope_scaling": {**_DEEPSEEK_YARN, "mscale_all_dim": 0.707},
        },
        "q of the token, tied": {
            **_DEEPSEEK, "rms_norm_eps": 1e-6, "q_lora_rank": None, "n_shared_experts": 2, "tie_word_embeddings": True,
            "first_k_dense_replace": 0,
        },
    },
    "deepseek_v3": {
        "groups, yarn": {**_DEEPSEEK, "n_group": 3, "topk_group": 2, "rope_scaling": _DEEPSEEK_YARN},
        "halves, q of the token, all sparse": {
            **_DEEPSEEK, "q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0, "tie_word_embeddings": True,
        },
        "yarn of one scale, groups": {
            **_DEEPSEEK, "rms_norm_eps": 1e-6, "n_group": 3, "topk_group": 2, "num_hidden_layers": 3,
            "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    },
    "llama4_text": {
        "chunks, temperature": {**_LLAMA4, "no_rope_layers": [1, 0], "attention_chunk_size": 5, "floor_scale": 3},
        "dense layers between, two experts, biases": {
            **_LLAMA4, "num_hidden_layers": 5, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2,
            "attention_chunk_size": 4, "floor_scale": 4, "attn_scale": 0.5, "attention_bias": True,
            "tie_word_embeddings": True,
        },
        "no norm, no temperature, full attention": {
            **_LLAMA4, "num_hidden_layers": 3, "moe_layers": [0, 2], "use_qk_norm": False,
            "attn_temperature_tuning": False, "attention_chunk_size": None, "num_key_value_heads": 1,
        },
        "every fourth": {**_LLAMA4, "num_hidden_layers": 4, "tie_word_embeddings": True},
        "every fourth, scaled rope": {
            **_LLAMA4, "num_hidden_layers": 6, "interleave_moe_layer_step": 2, "rope_scaling": _LLAMA4_ROPE,
        },
    },
}  # fmt: skip
