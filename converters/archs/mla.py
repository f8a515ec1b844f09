"""What families with latent attention share: how config.json spells it, and how GGUF does.

llama.cpp attends in the space of the latent vector, as to one key head of kv_lora_rank + qk_rope_head_dim values:
queries are multiplied by the keys' part of kv_b_proj, and what attention gives by the values' part.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

from converters.archs.base import ConfigReader
from converters.archs.gguf_keys import Facts, Key, check_fact
from converters.archs.gguf_rope import Rope
from converters.archs.rope import yarn_mscale
from converters.layout import LayoutOp, SplitHeads
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig, MLAConfig

# The linears that llama.cpp's graph multiplies without an adapter.
LATENT_LINEARS = tuple(
    f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
)


def read_mla(reader: ConfigReader) -> dict[str, Any]:
    """`mla`, and what follows from it: `head_dim`, and `attention_scale`, of which YaRN is a part."""
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla = MLAConfig(q_lora_rank=reader.take("q_lora_rank", None), **{name: reader.take(name) for name in sizes})
    reader.expect("qk_head_dim", mla.qk_head_dim)
    scaling = reader.peek("rope_parameters") or reader.peek("rope_scaling") or {}
    # Where the context is extended, q.k is multiplied by the square of YaRN's factor of cos and sin, not those.
    mscale = yarn_mscale(scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0))
    return {"mla": mla, "head_dim": mla.qk_head_dim, "attention_scale": mla.qk_head_dim**-0.5 * mscale**2}


def split_heads(config: DecoderConfig) -> tuple[LayoutOp, ...]:
    """The layout of a file, where keys' and values' parts of kv_b_proj are two stacks of heads."""
    assert config.mla is not None
    whole, keys, values = (f"self_attn.{name}_proj.weight" for name in ("kv_b", "k_b", "v_b"))
    return (SplitHeads(whole, keys, values, config.num_attention_heads, config.mla.qk_nope_head_dim),)


def _latent_key(facts: Facts) -> int:
    return facts["kv_lora_rank"] + facts["qk_rope_head_dim"]


def _kv_rank(facts: Facts) -> int:
    eps = facts["rms_norm_eps"]
    if eps != 1e-6:
        warn(f"llama.cpp gives the norms of latent vectors rms_norm_eps {eps:g}, too; theirs is 1e-06")
    return facts["kv_lora_rank"]


# q.k is multiplied by (1 + multiplier * ln(factor))^2, where the multiplier is mscale_all_dim * this.
_PER_MSCALE = 0.1


def _with_mscale(multiplier: float, fields: Facts) -> dict[str, Any]:
    """`rope_parameters`, where a YaRN has the multiplier as HF spells it."""
    parameters = fields["rope_parameters"]
    mscale = float(f"{multiplier / _PER_MSCALE:.7g}")
    return parameters | ({"mscale": mscale, "mscale_all_dim": mscale} if parameters["rope_type"] == "yarn" else {})


def _multiplier(facts: Facts) -> float | None:
    """From the factor of q.k; without one, llama.cpp would square the paper's into it."""
    rope, head_dim = facts["rope"], facts["head_dim"]
    if rope.kind != "yarn":
        check_fact("attention_scale", facts["attention_scale"], (head_dim**-0.5,))
        return None
    scale = (facts["attention_scale"] * head_dim**0.5) ** 0.5
    if rope.factor <= 1 or scale == 1:
        raise JaxftError("config field rope_parameters", "this GGUF architecture's yarn needs mscale_all_dim")
    return (scale - 1) / math.log(rope.factor)


# Those of a key head of a latent vector stand in the place of the heads' own, which have names of their own.
LATENT_KEYS = (
    Key("attention.head_count_kv", None, "num_key_value_heads", default=1, value=1),
    Key("attention.key_length", None, default=_latent_key, value=_latent_key),
    Key("attention.value_length", None, default=itemgetter("kv_lora_rank"), value=itemgetter("kv_lora_rank")),
    Key("rope.dimension_count", "qk_rope_head_dim"),
    Key(
        "attention.key_length_mla",
        "qk_nope_head_dim",
        "head_dim qk_nope_head_dim",
        read_as=lambda head_dim, fields: head_dim - fields["qk_rope_head_dim"],
    ),
    Key("attention.value_length_mla", "v_head_dim"),
    Key("attention.kv_lora_rank", "kv_lora_rank", value=_kv_rank),
    Key(
        "attention.q_lora_rank",
        "q_lora_rank",
        kind="count",
        default=0,
        read_as=lambda rank, fields: rank or None,
        value=lambda facts: facts["q_lora_rank"] or 0,
    ),
    Key(
        "rope.scaling.yarn_log_multiplier",
        "rope_parameters",
        "attention_scale",
        "number",
        default=1.0,
        read_as=_with_mscale,
        value=_multiplier,
    ),
)
# YaRN's factor is of q.k, and not of cos and sin.
LATENT_ROPE = Rope(("default", "yarn"), interleaved=True, attention_factor=1.0)
# What an HF config says beside those keys.
LATENT_FIELDS = {
    "head_dim": itemgetter("qk_rope_head_dim"),
    "num_key_value_heads": itemgetter("num_attention_heads"),
}
