"""Multi-head latent attention: k and v of all heads are made of one small vector (arXiv:2405.04434, section 2.1).

Of a token x, with R the rotation by its position, each head n has

    [q_n; q_R,n] = W_qb,n norm(W_qa x)      (or W_q,n x)       query  [q_n; R q_R,n]
    [c; k_R]     = W_kva x                                     key    [k_n; R k_R], k_R the same for all heads
    [k_n; v_n]   = W_kvb,n norm(c)                             value  v_n

Heads of v are narrower than those of q and k. Zeros are put behind them, and what attention makes of zeros, zeros, is
cut off. The cache holds k and v, not c.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxft.models.attention import KVCache, SequenceInfo, attend, rotate
from jaxft.models.config import DecoderConfig, LayerFacts, MLAConfig
from jaxft.models.layers import Linear, RMSNorm

# DeepSeek's own classes and transformers' give the norms of the small vectors this, whatever rms_norm_eps is.
_NORM_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Called as `jaxft.models.attention.Attention` is."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        assert config.mla is not None
        c, m = config, config.mla
        self.config = config
        self.mla: MLAConfig = m

        def linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(name, inputs, outputs, bias=bias, stack=stack, dtype=dtype, rngs=rngs)

        queries = c.num_attention_heads * c.head_dim
        if m.q_lora_rank is None:
            self.q_proj = linear("q_proj", c.hidden_size, queries)
        else:
            self.q_a_proj = linear("q_a_proj", c.hidden_size, m.q_lora_rank, c.qkv_bias)
            self.q_a_layernorm = RMSNorm(m.q_lora_rank, _NORM_EPS, stack=stack, dtype=dtype)
            self.q_b_proj = linear("q_b_proj", m.q_lora_rank, queries)
        self.kv_a_proj_with_mqa = linear(
            "kv_a_proj_with_mqa", c.hidden_size, m.kv_lora_rank + m.qk_rope_head_dim, c.qkv_bias
        )
        self.kv_a_layernorm = RMSNorm(m.kv_lora_rank, _NORM_EPS, stack=stack, dtype=dtype)
        keys_and_values = c.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
        self.kv_b_proj = linear("kv_b_proj", m.kv_lora_rank, keys_and_values)
        self.o_proj = linear("o_proj", c.num_attention_heads * m.v_head_dim, c.hidden_size, c.o_bias)

    def __call__(
        self,
        x_BTD: jax.Array,
        info: SequenceInfo,
        facts: LayerFacts,
        *,
        layer: jax.Array,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the output [B, T, D] and the cache with this layer's keys and values in it (None without one)."""
        c, m = self.config, self.mla
        q_BTNH = self._heads(self._queries(x_BTD, dropout_key))
        q_nope, q_rope = jnp.split(q_BTNH, [m.qk_nope_head_dim], axis=-1)
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x_BTD, dropout_key), [m.kv_lora_rank], axis=-1)
        k_rope = k_rope[:, :, None, :]
        k_nope, v = jnp.split(
            self._heads(self.kv_b_proj(self.kv_a_layernorm(latent), dropout_key)), [m.qk_nope_head_dim], axis=-1
        )
        if facts.rope is not None:
            q_rope, k_rope = rotate(q_rope, k_rope, info.rotations[facts.rope], c.ropes[facts.rope].interleaved)
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], m.qk_rope_head_dim))
        out_BTNH, cache = attend(
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([k_nope, k_rope], axis=-1),
            jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, c.head_dim - m.v_head_dim))),
            info,
            facts,
            layer=layer,
            cache=cache,
            scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            soft_cap=c.attention_soft_cap,
        )
        out = out_BTNH[..., : m.v_head_dim].reshape(*x_BTD.shape[:2], -1)
        return self.o_proj(out, dropout_key), cache

    def _queries(self, x_BTD: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        if self.mla.q_lora_rank is None:
            return self.q_proj(x_BTD, dropout_key)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD, dropout_key)), dropout_key)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, -1)
