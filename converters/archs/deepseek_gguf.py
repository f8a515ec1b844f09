"""DeepSeek in GGUF: llama.cpp's "deepseek2", https://github.com/ggml-org/llama.cpp/blob/master/src/models/deepseek2.cpp

llama.cpp attends in the space of the latent vector, as to one key head of kv_lora_rank + qk_rope_head_dim values:
queries are multiplied by the keys' part of kv_b_proj, and what attention gives by the values' part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from converters.archs.base import GATING, GGUFArch, MetadataReader
from converters.archs.common import check_fact, read_common_gguf, write_common_gguf
from converters.archs.moe import read_moe_gguf, write_moe_gguf
from converters.layout import LayoutOp, SplitHeads
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig

_WIDTHS = ("moe_intermediate_size",)
# The multiplier is mscale_all_dim * this; q.k is multiplied by (1 + multiplier * ln(factor))^2.
_MULTIPLIER, _PER_MSCALE = "rope.scaling.yarn_log_multiplier", 0.1
_Q_RANK, _KV_RANK = "attention.q_lora_rank", "attention.kv_lora_rank"
_KEYS, _VALUES = "attention.key_length", "attention.value_length"
# Of these numbers of layers llama.cpp takes the queries to be made of the token, whatever the file says.
_LITE = (26, 27)


def deepseek_gguf(
    scoring: Literal["softmax", "sigmoid"], read_config: Callable[[MetadataReader], dict[str, Any]]
) -> GGUFArch:
    """The family whose router scores so."""
    attention = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    return GGUFArch(
        "deepseek2",
        read_config,
        _write,
        experts=True,
        gating=GATING[scoring],
        layout=_layout,
        no_adapters=tuple(f"self_attn.{name}" for name in attention),
    )


def _layout(config: DecoderConfig) -> tuple[LayoutOp, ...]:
    assert config.mla is not None
    whole, keys, values = (f"self_attn.{name}_proj.weight" for name in ("kv_b", "k_b", "v_b"))
    return (SplitHeads(whole, keys, values, config.num_attention_heads, config.mla.qk_nope_head_dim),)


def read_deepseek_gguf(reader: MetadataReader) -> dict[str, Any]:
    """The fields of an HF config that the families share."""
    kv_rank, rotated = reader.size(_KV_RANK), reader.size("rope.dimension_count")
    head_dim, value_dim = reader.size(f"{_KEYS}_mla"), reader.size(f"{_VALUES}_mla")
    reader.expect("attention.head_count_kv", 1)
    reader.expect(_KEYS, kv_rank + rotated)
    reader.expect(_VALUES, kv_rank)
    reader.ignore("expert_gating_func")  # it chose the family
    multiplier = reader.number(_MULTIPLIER, 1.0)
    fields = {**read_common_gguf(reader, moe=True), **read_moe_gguf(reader, experts="n_routed_experts", widths=_WIDTHS)}
    if fields["rope_parameters"]["rope_type"] == "yarn":
        mscale = float(f"{multiplier / _PER_MSCALE:.7g}")
        fields["rope_parameters"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    return {
        **fields,
        "head_dim": rotated,
        "kv_lora_rank": kv_rank,
        "q_lora_rank": reader.count(_Q_RANK, 0) or None,
        "qk_nope_head_dim": head_dim - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value_dim,
        "first_k_dense_replace": reader.count("leading_dense_block_count", 0),
        "n_shared_experts": reader.count("expert_shared_count"),
        "routed_scaling_factor": reader.number("expert_weights_scale", 1.0),
        "attention_bias": False,
    }


def _write(config: DecoderConfig) -> dict[str, int | float | str]:
    moe, mla = config.moe, config.mla
    assert moe is not None
    assert mla is not None
    if config.num_hidden_layers in _LITE:
        check_fact("q_lora_rank", mla.q_lora_rank, (None,))
    if config.rms_norm_eps != 1e-6:
        warn(f"llama.cpp gives the norms of latent vectors rms_norm_eps {config.rms_norm_eps:g}, too; theirs is 1e-06")
    routing, yarn = _routing(config), config.rope.kind == "yarn"
    common = write_common_gguf(
        config,
        said=("moe", "mla"),
        interleaved=True,
        rope_kinds=("default", "yarn"),
        yarn_attention_factor=1.0,
        attention_scale=config.attention_scale if yarn else config.head_dim**-0.5,
    )
    dense = len(config.layers_of("dense"))
    experts = write_moe_gguf(
        config,
        widths=_WIDTHS,
        said=("norm_topk_prob", "routed_scaling_factor", "shared_expert_intermediate_size"),
        layers=("dense",) * dense + ("sparse",) * (config.num_hidden_layers - dense),
        **routing,
    )
    return {
        **common,
        "attention.head_count_kv": 1,
        _KEYS: mla.kv_lora_rank + mla.qk_rope_head_dim,
        _VALUES: mla.kv_lora_rank,
        f"{_KEYS}_mla": mla.qk_head_dim,
        f"{_VALUES}_mla": mla.v_head_dim,
        _KV_RANK: mla.kv_lora_rank,
        _Q_RANK: mla.q_lora_rank or 0,
        "rope.dimension_count": mla.qk_rope_head_dim,
        **({_MULTIPLIER: _multiplier(config)} if yarn else {}),
        **experts,
        "leading_dense_block_count": dense,
        "expert_shared_count": moe.shared_expert_intermediate_size // moe.moe_intermediate_size,
        "expert_weights_scale": moe.routed_scaling_factor,
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_gating_func": GATING[moe.scoring_func],
        **({"expert_group_count": moe.n_group, "expert_group_used_count": moe.topk_group} if moe.n_group > 1 else {}),
    }


def _routing(config: DecoderConfig) -> dict[str, Any]:
    """What of it llama.cpp's graph can compute: the scores' kind is a key, groups count as their two best experts."""
    moe = config.moe
    assert moe is not None
    if moe.n_group > 1 and moe.group_score != "top2":
        raise JaxftError(
            "config field topk_method",
            "this GGUF architecture cannot say group_limited_greedy: llama.cpp chooses groups by the sum of their two "
            "best experts, whatever the file says, and this model by their best one",
        )
    said = ("scoring_func", "score_correction_bias", "n_group", "topk_group", "group_score")
    return {name: getattr(moe, name) for name in said}


def _multiplier(config: DecoderConfig) -> float:
    """From the factor of q.k; without one, llama.cpp would square the paper's into it."""
    assert config.attention_scale is not None
    scale = (config.attention_scale * config.head_dim**0.5) ** 0.5
    if config.rope.factor <= 1 or scale == 1:
        raise JaxftError("config field rope_parameters", "this GGUF architecture's yarn needs mscale_all_dim")
    return (scale - 1) / math.log(config.rope.factor)
