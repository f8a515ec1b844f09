"""Tiny configs of transformers' own classes, drawn by hypothesis: each field that a class has, within its rules."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from converters.archs import ARCHS

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CAPS = st.none() | st.floats(1.0, 30.0)
_SCALES = st.floats(0.3, 3.0)
_WIDTHS = st.integers(6, 30)
# What is drawn on its own, of each class that has it; what goes together is drawn below.
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.integers(40, 99),
    "intermediate_size": st.integers(10, 60),
    "max_position_embeddings": st.integers(16, 64),
    "rms_norm_eps": st.sampled_from((1e-6, 1e-5)),
    "layer_norm_eps": st.sampled_from((1e-6, 1e-5)),
    "norm_epsilon": st.sampled_from((1e-6, 1e-5)),
    "hidden_act": st.sampled_from(("silu", "gelu", "gelu_pytorch_tanh")),
    "hidden_activation": st.sampled_from(("gelu_pytorch_tanh", "silu")),
    "tie_word_embeddings": st.booleans(),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "qkv_bias": st.booleans(),
    "use_bias": st.booleans(),
    "use_qkv_bias": st.booleans(),
    "use_qk_norm": st.booleans(),
    "use_parallel_residual": st.booleans(),
    "rope_interleave": st.booleans(),
    "query_pre_attn_scalar": st.integers(4, 40),
    "attn_logit_softcapping": _CAPS,
    "final_logit_softcapping": _CAPS,
    "attention_multiplier": st.floats(0.05, 0.5),
    "embedding_multiplier": _SCALES,
    "residual_multiplier": st.floats(0.2, 1.5),
    "logits_scaling": _SCALES,
    "logit_scale": _SCALES,
    "moe_intermediate_size": _WIDTHS,
    "shared_expert_intermediate_size": _WIDTHS,
    "n_shared_experts": st.integers(1, 2),
    "routed_scaling_factor": _SCALES,
    "swiglu_alpha": st.floats(1.0, 2.0),
    "swiglu_limit": st.floats(0.5, 7.0),
    "kv_lora_rank": st.sampled_from(range(6, 30, 2)),  # DeepSeek-V2's class takes pairs as complex numbers
    "q_lora_rank": st.none() | _WIDTHS,
    "norm_topk_prob": st.booleans(),
    "intermediate_size_mlp": st.integers(10, 60),
    "attn_temperature_tuning": st.booleans(),
    "floor_scale": st.integers(1, 6),
    "attn_scale": st.floats(0.05, 0.5),
    "interleave_moe_layer_step": st.integers(1, 2),
}
_PARTIAL = ("phi3", "stablelm")  # classes that rotate a part of a head
_ABSOLUTE = ("llama4_text",)  # classes whose scores of experts are never divided by their sum
_FACTORS = st.floats(1.0, 8.0)


@st.composite
def configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """config.json of one model: heads and layers, then every field of the class, then what depends on others."""
    from transformers import CONFIG_MAPPING

    known = set(CONFIG_MAPPING[family](num_experts_per_tok=2).to_dict())
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    head_dim = 2 * draw(st.integers(2, 8))
    own_heads = "head_dim" in known and "kv_lora_rank" not in known
    config: dict[str, Any] = {
        "architectures": [ARCHS[family].architecture],
        "model_type": family,
        "torch_dtype": "float32",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if "kv_lora_rank" in known else heads // draw(_divisors(heads)),
        "hidden_size": heads * (2 * draw(st.integers(3, 8)) if own_heads else head_dim),
        **({"head_dim": head_dim} if own_heads else {}),
        **{name: draw(values) for name, values in _FIELDS.items() if name in known},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if "sliding_window" in known:
        config |= draw(_windows(known, layers))
    if "attention_chunk_size" in known:
        config |= draw(_chunks(layers))
    if "no_rope_layers" in known:
        config["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
    if "kv_lora_rank" in known:
        config |= draw(_latent_attention())
        head_dim = config["qk_rope_head_dim"]
    if known & set(_EXPERTS):
        # The only score is 1 whatever the router says, where the chosen ones are divided by their sum.
        normed = family not in _ABSOLUTE and config.get("norm_topk_prob", True)
        config |= draw(_experts(known, layers, least=2 if normed else 1))
    if family == "gemma3_text":
        full, sliding = draw(_ropes(head_dim, ("default", "linear"))), draw(_ropes(head_dim, ("default",)))
        return {**config, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    return {**config, "rope_parameters": draw(_ropes(head_dim, kinds, partial=family in _PARTIAL))}


@st.composite
def _windows(draw: st.DrawFn, known: set[str], layers: int) -> dict[str, Any]:
    """Shorter than the sequence, or none; in the layers that the class says or in any."""
    windows = st.integers(2, 9)  # of a single key, q and k would have no gradient
    window = draw(windows if _always_mixed(known) else st.none() | windows)
    fields: dict[str, Any] = {"sliding_window": window}
    if "use_sliding_window" in known:
        fields["use_sliding_window"] = window is not None
    if "max_window_layers" in known:
        fields["max_window_layers"] = draw(st.integers(0, layers))
    if "layer_types" in known and (window is None or draw(st.booleans())):
        types = st.sampled_from(("full_attention", "sliding_attention") if window else ("full_attention",))
        fields["layer_types"] = draw(st.lists(types, min_size=layers, max_size=layers))
    return fields


@st.composite
def _chunks(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Shorter than the sequence, or none; in the layers that rotate or in any."""
    size = draw(st.none() | st.integers(2, 9))
    if size is None or draw(st.booleans()):
        return {"attention_chunk_size": size}
    types = st.sampled_from(("full_attention", "chunked_attention"))
    return {"attention_chunk_size": size, "layer_types": draw(st.lists(types, min_size=layers, max_size=layers))}


def _divisors(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([i for i in range(1, n + 1) if n % i == 0])


def _always_mixed(known: set[str]) -> bool:
    """The class lists sliding layers in any case, and cannot be without a window."""
    return "layer_types" in known and "use_sliding_window" not in known


@st.composite
def _latent_attention(draw: st.DrawFn) -> dict[str, Any]:
    nope, rope = 2 * draw(st.integers(1, 5)), 2 * draw(st.integers(2, 4))
    return {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": draw(st.integers(2, nope + rope))}


@st.composite
def _experts(draw: st.DrawFn, known: set[str], layers: int, least: int) -> dict[str, Any]:
    """How many, how many of them a token uses, in which groups, and which layers have them."""
    fields: dict[str, Any] = {}
    n_group, topk_group = 1, 1
    if "n_group" in known:
        n_group = draw(st.integers(1, 3))
        topk_group = draw(st.integers(1, n_group))
        fields |= {"n_group": n_group, "topk_group": topk_group}
    if "topk_method" in known:
        fields |= {"topk_method": draw(st.sampled_from(("greedy", "group_limited_greedy"))), "norm_topk_prob": False}
    in_group = draw(st.integers(2, 4))
    fields["num_experts_per_tok"] = draw(st.integers(least, topk_group * in_group))
    fields[next(name for name in _EXPERTS if name in known)] = n_group * in_group
    if "first_k_dense_replace" in known:
        fields["first_k_dense_replace"] = draw(st.integers(0, layers))
    if "decoder_sparse_step" in known:
        fields["decoder_sparse_step"] = draw(st.integers(1, 2))
        fields["mlp_only_layers"] = draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=layers))
    return fields


@st.composite
def _ropes(draw: st.DrawFn, head_dim: int, kinds: tuple[str, ...], *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` of one of the kinds."""
    kind = draw(st.sampled_from(kinds))
    fields: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from((1e4, 5e5)))}
    rotated = head_dim
    if partial:
        shares = [share for share in (0.25, 0.5, 0.75, 1.0) if int(head_dim * share) % 2 == 0 < int(head_dim * share)]
        fields["partial_rotary_factor"] = draw(st.sampled_from(shares))
        rotated = int(head_dim * fields["partial_rotary_factor"])
    if kind != "default":
        fields["factor"] = draw(_FACTORS)
    if kind in ("llama3", "yarn", "longrope"):
        fields["original_max_position_embeddings"] = draw(st.integers(4, 15))
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.floats(2.0, 8.0))}
    if kind == "yarn" and draw(st.booleans()):
        fields |= {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": draw(st.booleans())}
    if kind == "longrope":
        factors = st.lists(_FACTORS, min_size=rotated // 2, max_size=rotated // 2)
        fields |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    return fields
