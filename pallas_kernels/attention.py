"""Causal grouped-query attention over packed documents, and attention over a key/value cache.

    logits[t, s] = scale * q[t] . k[s]            for the keys s that query t sees, float32
    out[t]       = sum_s softmax(logits[t])[s] v[s]

q [B, T, N, H]; k, v [B, S, K, H]; query head n reads kv head n // (N / K), so q is viewed as [B, T, K, G, H] and keys
and values are never repeated. Below, p is the softmax and lse[t] = log sum_s exp(logits[t, s]); with the output's
cotangent g the gradients are (Dao et al. 2022, arXiv:2205.14135)

    dv[s]    = sum_t p[t, s] g[t]
    delta[t] = g[t] . out[t]
    ds[t, s] = scale p[t, s] (g[t] . v[s] - delta[t])
    dq[t]    = sum_s ds[t, s] k[s]                dk[s] = sum_t ds[t, s] q[t]

so the backward pass needs q, k, v, out and lse only, and makes p again.

Documents do not leak into each other: every [t, s] that is not seen is replaced, not multiplied, before and after the
exponential and again in ds. What is left of another document in a sum is 0 * value, which is 0 for every finite value.
So as long as q, k, v and g are finite (their products may overflow), changing one document leaves the others' outputs
and gradients bit-identical. An infinity or NaN in q or k leaves the others' outputs alone too; one in v (or, backward,
in any of q, k, v, g) makes the other documents of its row NaN, which nothing can mistake for a result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.op import Case, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segment_ids: jax.Array | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal self-attention with analytic gradients for q, k and v.

    Args:
      q: [B, T, N, H].
      k: [B, T, K, H], N a multiple of K, dtype of q.
      v: as k.
      scale: multiplies q . k.
      segment_ids: int32 [B, T]; a query sees the keys of its own segment at or before its own index. 0 is padding:
        its rows are zeros and nothing sees them. None means that each row is one document.
      sliding_window: how many keys a query sees at most, itself included.
      implementation: "xla" or None.

    Returns:
      [B, T, N, H] in q's dtype. The forward pass names its residuals "attn_out" (this) and "attn_lse" (float32
      [B, K, G, T]) for remat policies.

    Raises:
      ValueError: shapes that do not fit, or a window below 1.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    _check(q, k, v, sliding_window)
    return ATTENTION(
        q,
        k,
        v,
        scale=scale,
        segment_ids=segment_ids,
        sliding_window=sliding_window,
        implementation=implementation,
    )


def cached_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    q_positions: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over a key/value cache whose slot s holds position s; for generation.

    Args:
      q: [B, T, N, H].
      k_cache: [B, S, K, H], dtype of q. Slots that no query sees may hold any finite value.
      v_cache: as k_cache.
      q_positions: int32 [B, T]; a query sees the slots s <= its position. A negative one sees nothing: zeros.
      scale: multiplies q . k.
      sliding_window: how many slots a query sees at most, its own included.
      implementation: "xla" or None.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: shapes that do not fit, or a window below 1.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    _check(q, k_cache, v_cache, sliding_window)
    return CACHED_ATTENTION(
        q,
        k_cache,
        v_cache,
        q_positions,
        scale=scale,
        sliding_window=sliding_window,
        implementation=implementation,
    )


def _check(q: jax.Array, k: jax.Array, v: jax.Array, sliding_window: int | None) -> None:
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit [B, T, N, H], [B, S, K, H]")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"attention: sliding_window must be at least 1, not {sliding_window}")


def _seen(
    query_index: jax.Array,
    key_index: jax.Array,
    sliding_window: int | None,
    same_document: jax.Array | None = None,
) -> jax.Array:
    """Boolean [B, 1, 1, T, S]: which keys a query sees."""
    distance = query_index[:, :, None] - key_index[:, None, :]
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    if same_document is not None:
        seen &= same_document
    return seen[:, None, None, :, :]


def _causal_mask(length: int, segment_ids: jax.Array | None, sliding_window: int | None) -> jax.Array:
    index = jnp.arange(length, dtype=jnp.int32)[None, :]
    if segment_ids is None:
        return _seen(index, index, sliding_window)
    query_segment, key_segment = segment_ids[:, :, None], segment_ids[:, None, :]
    return _seen(index, index, sliding_window, (query_segment == key_segment) & (query_segment != 0))


def _group(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, T, K, G, H]."""
    batch, length, num_heads, head_dim = q.shape
    return q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)


def _logits(q_BTKGH: jax.Array, k: jax.Array, scale: float, seen: jax.Array) -> jax.Array:
    """float32 [B, K, G, T, S], -inf where a key is not seen."""
    return jnp.where(seen, einsum_float32("btkgh,bskh->bkgts", q_BTKGH, k) * scale, -jnp.inf)


def _probabilities(logits: jax.Array, lse: jax.Array, seen: jax.Array) -> jax.Array:
    """exp(logits - lse) where seen, else exactly 0; the inner where keeps inf - inf out of the exponential."""
    return jnp.where(seen, jnp.exp(jnp.where(seen, logits - lse[..., None], 0)), 0)


def _logsumexp(logits: jax.Array, seen: jax.Array) -> jax.Array:
    """float32 [B, K, G, T]; 0 for a query that sees nothing."""
    sees_any = jnp.any(seen, axis=-1)
    largest = jnp.where(sees_any, jnp.max(logits, axis=-1), 0)
    total = jnp.sum(_probabilities(logits, largest, seen), axis=-1)
    return largest + jnp.log(jnp.where(sees_any, total, 1))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H], lse [B, K, G, T])."""
    logits = _logits(_group(q, k.shape[2]), k, scale, seen)
    lse = _logsumexp(logits, seen)
    p = _probabilities(logits, lse, seen).astype(v.dtype)
    out = einsum_float32("bkgts,bskh->btkgh", p, v)
    return out.reshape(q.shape).astype(q.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segment_ids, scale, sliding_window):
    return _attend(q, k, v, scale, _causal_mask(q.shape[1], segment_ids, sliding_window))[0]


def _attention_fwd(q, k, v, segment_ids, scale, sliding_window):
    out, lse = _attend(q, k, v, scale, _causal_mask(q.shape[1], segment_ids, sliding_window))
    # Named here, inside the forward rule: a remat policy cannot keep what is named outside a custom_vjp.
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _attention_bwd(scale, sliding_window, residuals, g):
    q, k, v, segment_ids, out, lse = residuals
    seen = _causal_mask(q.shape[1], segment_ids, sliding_window)
    q_BTKGH, g_BTKGH = _group(q, k.shape[2]), _group(g, k.shape[2])
    p = _probabilities(_logits(q_BTKGH, k, scale, seen), lse, seen)
    dv = einsum_float32("bkgts,btkgh->bskh", p.astype(g.dtype), g_BTKGH)
    dp = einsum_float32("btkgh,bskh->bkgts", g_BTKGH, v)
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, T, N]
    delta = jnp.moveaxis(delta.reshape(q_BTKGH.shape[:4]), 1, 3)[..., None]  # [B, K, G, T, 1]
    ds = jnp.where(seen, p * (dp - delta) * scale, 0).astype(q.dtype)
    dq = einsum_float32("bkgts,bskh->btkgh", ds, k)
    dk = einsum_float32("bkgts,btkgh->bskh", ds, q_BTKGH)
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segment_ids: jax.Array | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    return _attention(q, k, v, segment_ids, scale, sliding_window)


def _cached_reference(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    q_positions: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> jax.Array:
    key_index = jnp.arange(k_cache.shape[1], dtype=jnp.int32)[None, :]
    return _attend(q, k_cache, v_cache, scale, _seen(q_positions, key_index, sliding_window))[0]


def _case(
    name: str, sizes: tuple[int, int, int, int, int], segments: list[list[int]] | None = None, window: int | None = None
) -> Case:
    batch, length, num_heads, num_kv_heads, head_dim = sizes
    kv_shape = (batch, length, num_kv_heads, head_dim)

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {
            "q": normal(rng, (batch, length, num_heads, head_dim), dtype),
            "k": normal(rng, kv_shape, dtype),
            "v": normal(rng, kv_shape, dtype),
            "scale": 1 / math.sqrt(head_dim),
            "segment_ids": None if segments is None else jnp.asarray(np.array(segments, np.int32)),
            "sliding_window": window,
        }

    reduction = length * num_heads // num_kv_heads + head_dim
    return Case(name, make, reduction=reduction, differentiable=("q", "k", "v"))


def _cached_case(
    name: str, sizes: tuple[int, int, int, int, int, int], positions: list[list[int]], window: int | None = None
) -> Case:
    batch, length, slots, num_heads, num_kv_heads, head_dim = sizes
    cache_shape = (batch, slots, num_kv_heads, head_dim)

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {
            "q": normal(rng, (batch, length, num_heads, head_dim), dtype),
            "k_cache": normal(rng, cache_shape, dtype),
            "v_cache": normal(rng, cache_shape, dtype),
            "q_positions": jnp.asarray(np.array(positions, np.int32)),
            "scale": 1 / math.sqrt(head_dim),
            "sliding_window": window,
        }

    return Case(name, make, reduction=slots + head_dim)


ATTENTION = register(
    Op(
        name="attention",
        implementations={"xla": Implementation(_reference)},
        cases=(
            _case("one document", (2, 9, 4, 4, 16)),
            _case("grouped heads, window", (1, 33, 6, 2, 17), window=5),
            _case("packed, padded", (2, 11, 4, 2, 8), [[1] * 4 + [2] * 5 + [0] * 2, [1] + [2] * 2 + [3] * 8]),
            _case("packed, window", (1, 13, 3, 1, 10), [[1] * 6 + [2] * 6 + [0]], window=3),
            _case("one token", (1, 1, 2, 1, 8)),
        ),
        roundings=4,
    )
)

CACHED_ATTENTION = register(
    Op(
        name="cached_attention",
        implementations={"xla": Implementation(_cached_reference)},
        cases=(
            _cached_case("prefill", (2, 5, 9, 4, 2, 16), [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]),
            _cached_case("one step, rows at different positions", (3, 1, 17, 6, 2, 10), [[0], [7], [16]]),
            _cached_case("window", (2, 3, 11, 2, 2, 8), [[4, 5, 6], [0, 1, 2]], window=4),
        ),
        roundings=4,
    )
)
