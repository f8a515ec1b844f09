"""Ops for training language models in JAX: a reference in plain JAX each, and kernels where they are faster.

Depends on jax and numpy only; any JAX program can use it alone.
"""

from pallas_kernels import adamw_8bit, mxfp4, nf4
from pallas_kernels.attention import attention, cached_attention
from pallas_kernels.dropout import dropout_low_rank
from pallas_kernels.gated_activation import gated_activation, gated_activation_backward
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.lora_linear import lora_linear, lora_qkv
from pallas_kernels.lora_mlp import lora_mlp
from pallas_kernels.lora_parts import LoraWeights, decoded, row_norms
from pallas_kernels.nf4_linears import nf4_linears
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.op import OPS, Case, Choice, Explanation, Implementation, ImplementationError, Op, explain
from pallas_kernels.rms_norm import add_rms_norm, rms_norm
from pallas_kernels.rope import rope
from pallas_kernels.selected_log_probs import selected_log_probs

__all__ = [
    "OPS",
    "Case",
    "Choice",
    "Explanation",
    "Implementation",
    "ImplementationError",
    "LoraWeights",
    "Op",
    "adamw_8bit",
    "add_rms_norm",
    "attention",
    "cached_attention",
    "decoded",
    "dropout_low_rank",
    "explain",
    "gated_activation",
    "gated_activation_backward",
    "grouped_matmul",
    "linear_cross_entropy",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "mxfp4",
    "nf4",
    "nf4_linears",
    "nf4_matmul",
    "rms_norm",
    "rope",
    "row_norms",
    "selected_log_probs",
]
