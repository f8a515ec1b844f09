"""Granite 3 with experts (1B-A400M, 3B-A800M): https://huggingface.co/docs/transformers/model_doc/granitemoe"""

from __future__ import annotations

import dataclasses

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import ATTENTION_BIAS, gguf_rows, read_common
from converters.archs.granite import SCALES, read_scales
from converters.archs.moe import EXPERT_PARAMETERS, expert_keys, read_moe
from converters.expert_layout import Rename
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=False)
    return DecoderConfig(
        **fields,
        **read_scales(reader),
        moe=read_moe(reader, fields, experts="num_local_experts", norm_topk_prob=True),
    )


_GATE_UP, _DOWN = (
    dataclasses.replace(op, hf=f"block_sparse_moe.{name}.weight")
    for op, name in zip(EXPERT_PARAMETERS, ("input_linear", "output_linear"), strict=True)
)

GRANITE_MOE = ArchSpec(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "granitemoe",
        gguf_rows(ATTENTION_BIAS, *SCALES, *expert_keys(num_experts="num_local_experts")),
        graph={"norm_topk_prob": True},
        tensor_ops=PERMUTE_QK,
    ),
    models="Granite 3 1B-A400M and 3B-A800M",
    defaults={"router_aux_loss_coef": 0.001},
    layout=(Rename("block_sparse_moe.router.layer", "mlp.gate"), _GATE_UP, _DOWN),
    expert_parameters=(
        dataclasses.replace(_GATE_UP, hf="block_sparse_moe.experts.gate_up_proj"),
        dataclasses.replace(_DOWN, hf="block_sparse_moe.experts.down_proj"),
    ),
)
