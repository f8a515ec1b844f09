"""What the DeepSeek families share: latent attention, dense layers before sparse ones, shared experts."""

from __future__ import annotations

from typing import Any

from converters.archs.base import ConfigReader
from converters.archs.common import read_common
from converters.archs.moe import read_moe
from converters.archs.rope import yarn_mscale
from converters.expert_layout import Rename
from jaxft.models.config import MLAConfig

SHARED_EXPERTS = Rename("mlp.shared_experts", "mlp.shared_expert")


def deepseek_fields(reader: ConfigReader, *, interleaved: bool, routing: dict[str, Any]) -> dict[str, Any]:
    """The fields of DecoderConfig; `routing` are some of MoEConfig."""
    reader.ignore("pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux")  # of training, and of the reference's speed
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla = MLAConfig(q_lora_rank=reader.take("q_lora_rank", None), **{name: reader.take(name) for name in sizes})
    reader.expect("qk_head_dim", mla.qk_head_dim)
    scaling = reader.peek("rope_parameters") or reader.peek("rope_scaling") or {}
    fields = read_common(reader, interleaved=interleaved)
    # Where the context is extended, q.k is multiplied by the square of YaRN's factor of cos and sin, not those.
    mscale = yarn_mscale(scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0))
    reader.expect("moe_layer_freq", 1)
    dense, layers, width = reader.take("first_k_dense_replace", 0), fields["num_hidden_layers"], "moe_intermediate_size"
    bias, expert_width = reader.take("attention_bias", False), reader.take(width)
    moe = read_moe(
        reader,
        experts="n_routed_experts",
        moe_intermediate_size=expert_width,
        shared_expert_intermediate_size=reader.take("n_shared_experts") * expert_width,
        routed_scaling_factor=float(reader.take("routed_scaling_factor", 1.0)),
        expert_act=fields["hidden_act"],
        **routing,
    )
    return {
        **fields,
        "head_dim": mla.qk_head_dim,
        "mla": mla,
        "attention_scale": mla.qk_head_dim**-0.5 * mscale**2,
        "qkv_bias": bias,
        "o_bias": bias,
        "moe": moe,
        "mlp_layer_types": tuple("dense" if i < dense else "sparse" for i in range(layers)),
    }
