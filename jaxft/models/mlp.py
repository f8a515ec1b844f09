"""The gated MLP: down(act(gate(x)) * up(x))."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

import pallas_kernels as pk
from jaxft.models.config import DecoderConfig
from jaxft.models.layers import Linear, dropout_rate


class MLP(nnx.Module):
    """Gated linear unit (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(
        self,
        config: DecoderConfig,
        intermediate_size: int | None = None,
        *,
        stack: tuple[int, ...],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        d, f, bias = config.hidden_size, intermediate_size or config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.gate_proj = Linear("gate_proj", d, f, bias=bias, stack=stack, dtype=dtype, rngs=rngs)
        self.up_proj = Linear("up_proj", d, f, bias=bias, stack=stack, dtype=dtype, rngs=rngs)
        self.down_proj = Linear("down_proj", f, d, bias=bias, stack=stack, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        dropout_key: jax.Array | None = None,
        *,
        recompute: bool = False,
        tile: int | None = None,
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; `recompute` and `tile` as of `pallas_kernels.lora_mlp`."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return pk.lora_mlp(
            x_BTD,
            *(linear.parameters(dropout_key) for linear in linears),
            activation=self.activation,
            dropout=dropout_rate(*linears),
            recompute=recompute,
            tile=tile,
        )
