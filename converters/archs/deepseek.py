"""What the DeepSeek families share: latent attention, dense layers before sparse ones, shared experts.

In GGUF: llama.cpp's "deepseek2", https://github.com/ggml-org/llama.cpp/blob/master/src/models/deepseek2.cpp
"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common
from converters.archs.gguf_keys import Facts
from converters.archs.mla import LATENT_FIELDS, LATENT_KEYS, LATENT_LINEARS, LATENT_ROPE, read_mla, split_heads
from converters.archs.moe import expert_keys, read_late_layers, read_moe, two_best_of_groups
from converters.expert_layout import Rename

SHARED_EXPERTS = Rename("mlp.shared_experts", "mlp.shared_expert")


def deepseek_fields(reader: ConfigReader, *, interleaved: bool, routing: dict[str, Any]) -> dict[str, Any]:
    """The fields of DecoderConfig; `routing` are some of MoEConfig."""
    reader.ignore("pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux")  # of training, and of the reference's speed
    mla, fields = read_mla(reader), read_common(reader, interleaved=interleaved, attention_bias=False)
    reader.expect("moe_layer_freq", 1)
    width = reader.take("moe_intermediate_size")
    moe = read_moe(
        reader,
        fields,
        experts="n_routed_experts",
        moe_intermediate_size=width,
        shared_expert_intermediate_size=reader.take("n_shared_experts") * width,
        routed_scaling_factor=float(reader.take("routed_scaling_factor", 1.0)),
        **routing,
    )
    return {**fields, **mla, "moe": moe, "mlp_layer_types": read_late_layers(reader, fields["num_hidden_layers"])}


def _q_rank(facts: Facts) -> int | None:
    """Of these numbers of layers llama.cpp takes the queries to be made of the token, whatever the file says."""
    return None if facts["num_hidden_layers"] in (26, 27) else facts["q_lora_rank"]


_EXPERT_KEYS = (
    "moe_intermediate_size", "first_k_dense_replace", "n_shared_experts", "routed_scaling_factor", "norm_topk_prob",
    "n_group", "topk_group",
)  # fmt: skip


def deepseek_gguf(scoring: str, *, fixed: tuple[str, ...] = (), hf: Facts, **graph: Any) -> GGUFArch:
    """The family whose router scores so; `fixed` are the fields that its HF config does not have, or not freely."""
    spelled = {"num_experts": "n_routed_experts", "scoring_func": None, **dict.fromkeys(fixed)}
    return GGUFArch(
        "deepseek2",
        gguf_rows(*LATENT_KEYS, *expert_keys(*_EXPERT_KEYS, **spelled), rope=LATENT_ROPE),
        graph={"q_lora_rank": _q_rank, "group_score": two_best_of_groups, **graph},
        hf={**LATENT_FIELDS, "attention_bias": False, **hf},
        gating=scoring,
        layout=split_heads,
        no_adapters=LATENT_LINEARS,
    )
