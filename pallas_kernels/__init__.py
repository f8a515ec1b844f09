"""Ops for training language models in JAX: a reference in plain JAX each, and kernels where they are faster.

Depends on jax and numpy only; any JAX program can use it alone.
"""

from pallas_kernels import nf4
from pallas_kernels.attention import attention, cached_attention
from pallas_kernels.gated_activation import gated_activation
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.lora_linear import lora_linear
from pallas_kernels.op import OPS, Case, Choice, Explanation, Implementation, ImplementationError, Op, explain
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope import rope

__all__ = [
    "OPS",
    "Case",
    "Choice",
    "Explanation",
    "Implementation",
    "ImplementationError",
    "Op",
    "attention",
    "cached_attention",
    "explain",
    "gated_activation",
    "linear_cross_entropy",
    "lora_linear",
    "nf4",
    "rms_norm",
    "rope",
]
