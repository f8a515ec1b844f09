"""The MLP: down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

import pallas_kernels as pk
from jaxft.models.config import DecoderConfig
from jaxft.models.layers import Linear, dropout_rate

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """A gated linear unit (Shazeer 2020, arXiv:2002.05202), or two linears with an activation between them."""

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
        self.gated = config.gated_mlp
        if config.gated_mlp:
            self.gate_proj = Linear("gate_proj", d, f, bias=bias, stack=stack, dtype=dtype, rngs=rngs)
        self.up_proj = Linear("up_proj", d, f, bias=bias, stack=stack, dtype=dtype, rngs=rngs)
        self.down_proj = Linear("down_proj", f, d, bias=bias, stack=stack, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        dropout_key: jax.Array | None = None,
        *,
        recompute: bool = False,
        keep_output: bool = False,
        tile: int | None = None,
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; `recompute`, `keep_output` and `tile` as of `pallas_kernels.lora_mlp`."""
        if not self.gated:
            return self._ungated(x_BTD, dropout_key, tile)
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return pk.lora_mlp(
            x_BTD,
            *(linear.parameters(dropout_key) for linear in linears),
            activation=self.activation,
            dropout=dropout_rate(*linears),
            recompute=recompute,
            keep_output=keep_output,
            tile=tile,
        )

    def _ungated(self, x_BTD: jax.Array, dropout_key: jax.Array | None, tile: int | None) -> jax.Array:
        """A layer's remat policy alone says what is kept; with a tile, only the inputs of the tiles are."""

        def run(x: jax.Array) -> jax.Array:
            up = checkpoint_name(self.up_proj(x, dropout_key), "up")
            h = _ACTIVATIONS[self.activation](up.astype(jnp.float32)).astype(up.dtype)
            return self.down_proj(h, dropout_key)

        if tile is None or tile >= x_BTD.shape[0] * x_BTD.shape[1]:
            return run(x_BTD)
        rows = x_BTD.reshape(-1, x_BTD.shape[-1])
        padded = jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0))).reshape(-1, tile, rows.shape[1])
        return jax.lax.map(jax.checkpoint(run), padded).reshape(-1, rows.shape[1])[: rows.shape[0]].reshape(x_BTD.shape)
