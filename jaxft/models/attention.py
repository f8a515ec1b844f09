"""Self-attention: projections, q/k norm, rotation, and the kernel; with a KV cache for generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

import pallas_kernels as pk
from jaxft.models.config import DecoderConfig, LayerFacts, TemperatureConfig
from jaxft.models.layers import Linear, dropout_rate, make_norm


class SequenceInfo(NamedTuple):
    """What attention knows of a batch beside the activations; the same for every layer.

    Attributes:
      rotations: cos and sin, float32 [B, T, R/2], of each of the config's `ropes`.
      positions: int32 [B, T].
      segment_ids: int32 [B, T], 0 for padding; None means one document a row, padding having negative positions.
      chunk_ids: the same of the chunks of documents, for layers that see no further; None: there are no such layers.
    """

    rotations: dict[str, tuple[jax.Array, jax.Array]]
    positions: jax.Array
    segment_ids: jax.Array | None
    chunk_ids: jax.Array | None = None

    @property
    def present(self) -> jax.Array:
        """bool [B, T]: which tokens are not padding."""
        return self.positions >= 0 if self.segment_ids is None else self.segment_ids > 0


class KVCache(NamedTuple):
    """Keys and values of all layers: [L, B, S, K, H] each. Slot s of row b holds the token at position s."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
        """An empty cache of `slots` positions for each of `batch` rows."""
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> KVCache:
        """Puts k and v [B, T, K, H] at `positions` [B, T] of `layer`."""
        rows = jnp.arange(k.shape[0])[:, None]

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(cache.dtype)
            if positions.shape == (1, 1):  # one copy; a scatter asks whether it is inside, and reads what was there
                return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, positions[0, 0], 0, 0))
            return cache.at[layer, rows, positions].set(new)

        return KVCache(put(self.k, k), put(self.v, v))


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        c = config
        self.config = config

        def linear(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(name, inputs, outputs, bias=bias, stack=stack, dtype=dtype, rngs=rngs)

        self.q_proj = linear("q_proj", c.hidden_size, c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = linear("k_proj", c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = linear("v_proj", c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = linear("o_proj", c.num_attention_heads * c.head_dim, c.hidden_size, c.o_bias)
        if c.qk_norm not in (None, "rotated"):
            q_shape, k_shape = (_norm_shape(c, heads) for heads in (c.num_attention_heads, c.num_key_value_heads))
            self.q_norm = make_norm(c, *q_shape, stack=stack, dtype=dtype)
            self.k_norm = make_norm(c, *k_shape, stack=stack, dtype=dtype)
        self.sinks = nnx.data(None)
        if c.attention_sinks:
            self.sinks = nnx.data(nnx.Param(jnp.zeros((*stack, c.num_attention_heads), dtype)))

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
        c = self.config
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = pk.lora_qkv(
            x_BTD, *(p.parameters(dropout_key) for p in projections), dropout=dropout_rate(*projections)
        )
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH = self._heads(q, c.num_attention_heads)
        k_BTKH, v_BTKH = self._heads(k, c.num_key_value_heads), self._heads(v, c.num_key_value_heads)
        if c.qk_norm in ("head", "each_head"):
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if facts.rope is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, k_BTKH, info.rotations[facts.rope], c.ropes[facts.rope].interleaved)
            if c.qk_norm == "rotated":
                q_BTNH, k_BTKH = (_of_unit_mean_square(x, c.rms_norm_eps) for x in (q_BTNH, k_BTKH))
        elif c.attn_temperature_tuning is not None:
            q_BTNH = _tempered(q_BTNH, info.positions, c.attn_temperature_tuning)
        settings = {
            "scale": c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            "soft_cap": c.attention_soft_cap,
            "sinks": None if self.sinks is None else self.sinks.get_value(),
        }
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, info, facts, layer=layer, cache=cache, **settings)
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1), dropout_key), cache

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.config.head_dim)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    info: SequenceInfo,
    facts: LayerFacts,
    *,
    layer: jax.Array,
    cache: KVCache | None,
    **settings: Any,
) -> tuple[jax.Array, KVCache | None]:
    """The kernel, over these tokens or over the cache with them in it: (out [B, T, N, H], the cache)."""
    settings["sliding_window"] = facts.sliding_window
    if cache is not None:
        cache = cache.write(layer, k_BTKH, v_BTKH, info.positions)
    # Tokens that fill the whole cache, a prompt's, see nothing but each other.
    if cache is None or cache.k.shape[2] == q_BTNH.shape[1]:
        q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, name) for x, name in ((q_BTNH, "q"), (k_BTKH, "k"), (v_BTKH, "v")))
        segment_ids = info.segment_ids if facts.chunk_size is None else info.chunk_ids
        return pk.attention(q_BTNH, k_BTKH, v_BTKH, segment_ids=segment_ids, **settings), cache
    if facts.chunk_size is not None and facts.chunk_size < cache.k.shape[2]:
        return attend_to_chunks(q_BTNH, cache, info.positions, facts.chunk_size, layer=layer, **settings), cache
    return pk.cached_attention(q_BTNH, cache.k, cache.v, info.positions, layer=layer, **settings), cache


def chunk_ids(positions: jax.Array, segment_ids: jax.Array | None, size: int) -> jax.Array:
    """int32 [B, T]: segment ids as of `SequenceInfo` of the documents' chunks, each of `size` positions from 0 on."""
    segments = (positions >= 0).astype(jnp.int32) if segment_ids is None else segment_ids
    chunks = positions // size
    begins = (segments[:, 1:] != segments[:, :-1]) | (chunks[:, 1:] != chunks[:, :-1])
    ids = jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True), axis=1, dtype=jnp.int32)
    return jnp.where(segments > 0, ids, 0)


def attend_to_chunks(
    q_BTNH: jax.Array, cache: KVCache, positions: jax.Array, size: int, *, layer: jax.Array, **settings: Any
) -> jax.Array:
    """Each chunk of the cache, C of them, as a row of its own that is asked all queries; those of others see nothing.

    The chunks lie where they are: with a whole number of them nothing is copied.
    """
    rows, slots = cache.k.shape[1:3]
    k, v = cache
    if slots % size:
        k, v = (jnp.pad(x[layer][None], ((0, 0), (0, 0), (0, -slots % size), (0, 0), (0, 0))) for x in cache)
        layer = jnp.zeros_like(layer)
    k, v = (x.reshape(x.shape[0], -1, size, *x.shape[3:]) for x in (k, v))  # [L, B C, size, K, H]
    chunks = jnp.arange(k.shape[1] // rows, dtype=jnp.int32)
    own = positions[:, None, :] // size == chunks[None, :, None]
    of_chunk_BCT = jnp.where(own, positions[:, None, :] % size, -1)
    q = jnp.repeat(q_BTNH, chunks.size, axis=0)
    out = pk.cached_attention(q, k, v, of_chunk_BCT.reshape(-1, positions.shape[1]), layer=layer, **settings)
    return jnp.sum(out.reshape(rows, chunks.size, *q_BTNH.shape[1:]), axis=1)  # but for one of them, zeros


def _norm_shape(config: DecoderConfig, heads: int) -> tuple[int, ...]:
    """Of the weights of q's or k's norm."""
    h = config.head_dim
    return {"head": (h,), "each_head": (heads, h), "full": (heads * h,)}[config.qk_norm or "head"]


def rotate(
    q: jax.Array, k: jax.Array, rotation: tuple[jax.Array, jax.Array], interleaved: bool
) -> tuple[jax.Array, jax.Array]:
    """q and k by their positions. Interleaved pairs are put apart first and stay so, in q as in k: q.k is the same."""
    cos, sin = rotation
    if interleaved:
        q, k = (_halves_of_pairs(x, 2 * cos.shape[-1]) for x in (q, k))
    return pk.rope(q, k, cos, sin)


def _of_unit_mean_square(x: jax.Array, eps: float) -> jax.Array:
    """Each head [..., H] over the root of its mean square."""
    in_float32 = x.astype(jnp.float32)
    mean_square = jnp.mean(in_float32 * in_float32, axis=-1, keepdims=True)
    return (in_float32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


def _tempered(q_BTNH: jax.Array, positions: jax.Array, tuning: TemperatureConfig) -> jax.Array:
    """q times `TemperatureConfig`'s factor for its position."""
    steps = jnp.floor((positions.astype(jnp.float32) + 1) / tuning.floor_scale)
    factor = 1 + tuning.attn_scale * jnp.log1p(jnp.maximum(steps, 0))  # padding may have any negative position
    return (q_BTNH.astype(jnp.float32) * factor[:, :, None, None]).astype(q_BTNH.dtype)


def _halves_of_pairs(x: jax.Array, rotated: int) -> jax.Array:
    """Values 0, 2, 4, ... of the first `rotated` ones of each head, then 1, 3, 5, ..., then the rest."""
    return jnp.concatenate([x[..., 0:rotated:2], x[..., 1:rotated:2], x[..., rotated:]], axis=-1)
