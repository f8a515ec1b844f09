"""Granite 3 with experts (1B-A400M, 3B-A800M): https://huggingface.co/docs/transformers/model_doc/granitemoe"""

from __future__ import annotations

import dataclasses
from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common
from converters.archs.granite import read_granite_gguf, write_granite_gguf
from converters.archs.moe import EXPERT_PARAMETERS, read_moe, read_moe_gguf, write_moe_gguf
from converters.expert_layout import Rename
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=False)
    return DecoderConfig(
        **fields,
        embedding_multiplier=float(reader.take("embedding_multiplier", 1.0)),
        residual_multiplier=float(reader.take("residual_multiplier", 1.0)),
        attention_scale=float(reader.take("attention_multiplier", 1.0)),
        logit_scale=1 / float(reader.take("logits_scaling", 1.0)),
        moe=read_moe(
            reader,
            experts="num_local_experts",
            moe_intermediate_size=fields["intermediate_size"],
            norm_topk_prob=True,
            expert_act=fields["hidden_act"],
        ),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {**read_granite_gguf(reader, moe=True), **read_moe_gguf(reader, experts="num_local_experts")}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return {**write_granite_gguf(config, "moe"), **write_moe_gguf(config, norm_topk_prob=True)}


_GATE_UP, _DOWN = (
    dataclasses.replace(op, hf=f"block_sparse_moe.{name}.weight")
    for op, name in zip(EXPERT_PARAMETERS, ("input_linear", "output_linear"), strict=True)
)

GRANITE_MOE = ArchSpec(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("granitemoe", _read_gguf, _write_gguf, PERMUTE_QK, experts=True),
    models="Granite 3 1B-A400M and 3B-A800M",
    defaults={"router_aux_loss_coef": 0.001},
    layout=(
        Rename("block_sparse_moe.router.layer", "mlp.gate"),
        _GATE_UP,
        _DOWN,
    ),
    expert_parameters=(
        dataclasses.replace(_GATE_UP, hf="block_sparse_moe.experts.gate_up_proj"),
        dataclasses.replace(_DOWN, hf="block_sparse_moe.experts.down_proj"),
    ),
)
