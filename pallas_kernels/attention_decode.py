"""Attention of one new token a row over a key/value cache: flash decoding; `pallas_kernels.attention` states the op.

A program owns one kv head of one row, with the G queries that share it, and a part of the row's blocks of keys: few
rows would leave most of a GPU idle. It walks over its part as `attention_pallas` does and leaves, in base 2,

    m = max_s x[s]        l = sum_s 2^(x[s] - m)        acc = sum_s 2^(x[s] - m) v[s]

which are joined outside, a sink being one more part with m = sink log2(e), l = 1 and acc = 0:

    M = max over parts of m        out = sum 2^(m - M) acc / sum 2^(m - M) l

Each row is cut into as many parts whatever the others hold, and only blocks up to its own position are read, straight
out of the stack of all layers: a slice of one layer would be copied, which costs three times the reading.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.attention_pallas import DTYPES, LARGEST_HEAD, LOG2E, Facts, raw_logits
from pallas_kernels.attention_spans import LOWEST
from pallas_kernels.backend import ds, load, program_id, store

PROGRAMS = 264  # twice the multiprocessors of an H100


def refuses(platform: str, q: Any, k_cache: Any, v_cache: Any, *args: Any, scale: float, **others: Any) -> str | None:
    """Why the kernel cannot run these arguments, or None where it can."""
    if q.shape[1] != 1:
        return f"it takes one query a row, not {q.shape[1]}"
    if not 1 <= q.shape[3] <= LARGEST_HEAD:
        return f"the head size must be 1 to {LARGEST_HEAD}, not {q.shape[3]}"
    if scale <= 0:
        return f"the scale must be positive, not {scale}"
    if not (q.dtype == k_cache.dtype == v_cache.dtype in DTYPES):
        return f"q and the caches must be of one float dtype, not {q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
    return backend.refuses_platform(platform)


def cached_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    q_positions: jax.Array,
    *,
    scale: float,
    layer: jax.Array | int | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """The op for one query a row: [B, 1, N, H]."""
    if layer is None:
        layer, k_cache, v_cache = 0, k_cache[None], v_cache[None]
    _, batch, slots, num_kv_heads, head_dim = k_cache.shape
    group = q.shape[2] // num_kv_heads
    facts = Facts(
        length=slots,
        head_dim=head_dim,
        group=group,
        own=max(16, 1 << (group - 1).bit_length()),
        other=64 if q.dtype != jnp.float32 and head_dim <= 128 else 32,
        scale=scale,
        window=sliding_window,
        soft_cap=soft_cap,
        has_segments=False,
        has_sinks=False,
    )
    parts = max(1, min(-(-slots // facts.other), PROGRAMS // (batch * num_kv_heads)))
    heads = (parts, batch, num_kv_heads, group)
    acc, largest, total = backend.call(
        _cached_attention,
        jnp.asarray(layer, jnp.int32).reshape(1),
        q.reshape(batch, num_kv_heads, group, head_dim),
        k_cache,
        v_cache,
        q_positions.reshape(batch),
        out=(
            jax.ShapeDtypeStruct((*heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
        ),
        grid=(num_kv_heads, batch, parts),
        num_warps=4,
        num_stages=2,
        facts=facts,
        parts=parts,
    )
    return _joined(acc, largest, total, sinks).reshape(q.shape).astype(q.dtype)


def _joined(acc: jax.Array, largest: jax.Array, total: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """float32 [B, K, G, H] of all parts [parts, B, K, G]; zeros where a query saw nothing."""
    most = jnp.max(largest, axis=0)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, *most.shape[1:]) * LOG2E, most.shape)
        most = jnp.maximum(most, sink)
    weights = jnp.exp2(largest - most[None])
    total = jnp.sum(weights * total, axis=0)
    if sinks is not None:
        total += jnp.exp2(sink - most)
    return jnp.sum(weights[..., None] * acc, axis=0) / jnp.where(total == 0, 1.0, total)[..., None]


def _tile(first: Any, rows: int, stop: int, facts: Facts) -> jax.Array:
    """Boolean [rows, width] of what is inside of an array with `stop` rows."""
    inside = first + jax.lax.broadcasted_iota(jnp.int32, (rows, facts.width), 0) < stop
    return inside & (jax.lax.broadcasted_iota(jnp.int32, (rows, facts.width), 1) < facts.head_dim)


def _cached_attention(
    layer_ref, q_ref, k_ref, v_ref, positions_ref, acc_ref, largest_ref, total_ref, *, facts: Facts, parts: int
):
    kv_head, row, part = program_id(0), program_id(1), program_id(2)
    layer, position = layer_ref[0], positions_ref[row]
    own, other = facts.own, facts.other
    columns = ds(0, facts.width)
    of_queries = _tile(0, own, facts.group, facts)
    q = load(q_ref.at[row, kv_head, ds(0, own), columns], mask=of_queries, other=0.0)

    def step(block, carry):
        acc, largest, total = carry
        where = layer, row, ds(block * other, other), kv_head, columns
        inside = _tile(block * other, other, facts.length, facts)
        k = load(k_ref.at[where], mask=inside, other=0.0)
        s = block * other + jax.lax.broadcasted_iota(jnp.int32, (own, other), 1)
        seen = s <= position
        if facts.window is not None:
            seen &= position - s < facts.window
        raw = jnp.where(seen, raw_logits(backend.dot(q, k, trans_y=True), facts), LOWEST)
        larger = jnp.maximum(largest, jnp.max(raw, axis=1) * facts.factor)
        p = jnp.where(seen, jnp.exp2(raw * facts.factor - larger[:, None]), 0.0)
        shrink = jnp.exp2(largest - larger)
        v = load(v_ref.at[where], mask=inside, other=0.0)
        return acc * shrink[:, None] + backend.dot(p.astype(v.dtype), v), larger, total * shrink + jnp.sum(p, axis=1)

    nothing = jnp.zeros((own,), jnp.float32)
    carry = jnp.zeros((own, facts.width), jnp.float32), nothing + LOWEST, nothing
    acc, largest, total = jax.lax.fori_loop(*_part(position, part, parts, facts), step, carry)
    heads = part, row, kv_head, ds(0, own)
    store(acc_ref.at[(*heads, columns)], acc, mask=of_queries)
    is_query = jnp.arange(own, dtype=jnp.int32) < facts.group
    store(largest_ref.at[heads], largest, mask=is_query)
    store(total_ref.at[heads], total, mask=is_query)


def _part(position: jax.Array, part: jax.Array, parts: int, facts: Facts) -> tuple[jax.Array, jax.Array]:
    """The blocks, from and to, that a program walks over: its share of those that the row sees."""
    stop = jax.lax.div(position, facts.other) + 1
    first = jnp.int32(0)
    if facts.window is not None:
        first = jax.lax.div(jnp.maximum(position - (facts.window - 1), 0), facts.other)
    share = jax.lax.div(stop - first + (parts - 1), parts)
    start = first + part * share
    return start, jnp.minimum(start + share, stop)
