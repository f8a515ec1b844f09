"""Flash attention kernels for what cuDNN does not do; `pallas_kernels.attention` states the op and its gradients.

A program owns a block of rows and walks over the blocks of the other side, so no [T, S] array exists (Dao 2023,
arXiv:2307.08691). Logits are in base 2, x[t, s] = factor * raw[t, s]:

    without a soft cap   raw = q[t] . k[s]                        factor = scale log2(e)
    with one             raw = tanh(scale / cap * q[t] . k[s])    factor = cap log2(e)

Forward, one program per block of queries, over the blocks of keys:

    m' = max(m, max_s x)    p = 2^(x - m')    l = 2^(m - m') l + sum_s p    acc = 2^(m - m') acc + p v
    out = acc / l           lse = (m + log2 l) / log2(e)

where a sink is one more key without a value: m starts at sink log2(e) and l at 1. Backward, p = 2^(x - lse log2(e)):

    over keys, for a block of queries             delta = g . out    ds = p (g v^T - delta)    dq = scale ds k
    over queries and the G heads that share a     dv = p^T g         dk = scale ds^T q
    kv head, for a block of keys

with ds times 1 - raw^2 under a soft cap, and dsink = -sum_t 2^((sink - lse) log2(e)) delta[t].

Which blocks a program visits is decided outside of the kernel (`attention_spans`). In one run of them every pair is
seen and nothing is masked; everywhere else what is not seen is replaced, never multiplied: in raw before the maximum,
in p and in ds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.attention_spans import LOWEST, number_of_blocks, sinks_backward, spans, visits_of
from pallas_kernels.backend import ds, load, program_id, store

LOG2E = math.log2(math.e)
LARGEST_HEAD = 256
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: rows that a program owns, rows of the other side per step, and Triton's two numbers."""

    own: int
    other: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a kernel knows when it is compiled. `width` is the head size as a power of two."""

    length: int
    head_dim: int
    group: int
    own: int
    other: int
    scale: float
    window: int | None
    soft_cap: float | None
    has_segments: bool
    has_sinks: bool

    @property
    def width(self) -> int:
        return _width(self.head_dim)

    @property
    def factor(self) -> float:
        return (self.scale if self.soft_cap is None else self.soft_cap) * LOG2E


def refuses(platform: str, q: Any, k: Any, v: Any, *, scale: float, **others: Any) -> str | None:
    """Why the kernels cannot run these arguments, or None where they can."""
    if q.shape[1] != k.shape[1]:
        return f"every query needs its key: {q.shape[1]} queries, {k.shape[1]} keys"
    if not 1 <= q.shape[3] <= LARGEST_HEAD:
        return f"the head size must be 1 to {LARGEST_HEAD}, not {q.shape[3]}"
    if scale <= 0:
        return f"the scale must be positive, not {scale}"
    return backend.refuses_platform(platform)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sinks: jax.Array | None,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, N, T])."""
    batch, length, num_heads, _ = q.shape
    tiling = tiling or _tilings(q).forward
    facts = _facts(q, k, segment_ids, sinks, scale, sliding_window, soft_cap, tiling)
    visits = visits_of(length, (tiling.own, tiling.other), segment_ids, sliding_window)
    return backend.call(
        _attention_forward,
        *_present(q, k, v, spans(*visits, axis=-1), segment_ids, sinks),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)),
        grid=(num_heads, batch, number_of_blocks(length, tiling.own)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        facts=facts,
    )


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sinks: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    queries_tiling: Tiling | None = None,
    keys_tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns (dq, dk, dv, dsinks or None), from what `forward` returned and its output's cotangent g."""
    g = g.astype(q.dtype)
    options = (segment_ids, sinks, scale, sliding_window, soft_cap)
    dq, delta = _queries_backward(q, k, v, out, lse, g, queries_tiling or _tilings(q).queries, *options)
    dk, dv = _keys_backward(q, k, v, lse, delta, g, keys_tiling or _tilings(q).keys, *options)
    return dq, dk, dv, None if sinks is None else sinks_backward(sinks, lse, delta)


def _queries_backward(q, k, v, out, lse, g, tiling, segment_ids, sinks, scale, sliding_window, soft_cap):
    """Returns (dq, delta float32 [B, N, T])."""
    batch, length, num_heads, _ = q.shape
    visits = visits_of(length, (tiling.own, tiling.other), segment_ids, sliding_window)
    return backend.call(
        _attention_backward_queries,
        *_present(q, k, v, out, lse, g, spans(*visits, axis=-1), segment_ids),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)),
        grid=(num_heads, batch, number_of_blocks(length, tiling.own)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        facts=_facts(q, k, segment_ids, sinks, scale, sliding_window, soft_cap, tiling),
    )


def _keys_backward(q, k, v, lse, delta, g, tiling, segment_ids, sinks, scale, sliding_window, soft_cap):
    """Returns (dk, dv)."""
    batch, length, num_kv_heads, _ = k.shape
    visits = visits_of(length, (tiling.other, tiling.own), segment_ids, sliding_window)
    return backend.call(
        _attention_backward_keys,
        *_present(q, k, v, lse, delta, g, spans(*visits, axis=-2), segment_ids),
        out=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(num_kv_heads, batch, number_of_blocks(length, tiling.own)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        facts=_facts(q, k, segment_ids, sinks, scale, sliding_window, soft_cap, tiling),
    )


@dataclasses.dataclass(frozen=True)
class _Tilings:
    """One for each of the three kernels."""

    forward: Tiling
    queries: Tiling
    keys: Tiling


# Heads up to 128, 16 bits. 32 / 8 heads of 128, forward and backward on an H100: 0.702 ms for 2 x 2048 tokens, 4.79 for
# 1 x 8192. Queries in blocks of 128 (8 warps, 3 stages forward): 0.755 and 5.16; 3 stages backward: 0.749 to 0.774.
NARROW = _Tilings(Tiling(128, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2))
# Heads up to 256, 16 bits: what fits into shared memory.
WIDE = _Tilings(Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2))
# float32: exact products do not run on tensor cores, and keep whole factors in registers.
EXACT = _Tilings(*[Tiling(32, 32, 8, 1)] * 3)
EXACT_WIDE = _Tilings(*[Tiling(16, 16, 8, 1)] * 3)


def _tilings(q: Any) -> _Tilings:
    width = _width(q.shape[3])
    if q.dtype == jnp.float32:
        return EXACT if width <= 64 else EXACT_WIDE
    return NARROW if width <= 128 else WIDE


def _width(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _present(*arguments: jax.Array | None) -> list[jax.Array]:
    return [argument for argument in arguments if argument is not None]


def _facts(q, k, segment_ids, sinks, scale, sliding_window, soft_cap, tiling) -> Facts:
    return Facts(
        length=q.shape[1],
        head_dim=q.shape[3],
        group=q.shape[2] // k.shape[2],
        own=tiling.own,
        other=tiling.other,
        scale=scale,
        window=sliding_window,
        soft_cap=soft_cap,
        has_segments=segment_ids is not None,
        has_sinks=sinks is not None,
    )


def _walk(span: tuple[jax.Array, ...], repeats: int, step: Any, carry: Any) -> Any:
    """Runs step(repeat, block, carry, masked) over a program's visits: `repeats` times the run, then the rest."""
    first, full_first, full_stop, stop = span
    full, before = full_stop - full_first, full_first - first
    rest = before + stop - full_stop

    def split(i, count):
        return (0, i) if repeats == 1 else (jax.lax.div(i, count), jax.lax.rem(i, count))

    def whole(i, carry):
        repeat, at = split(i, full)
        return step(repeat, full_first + at, carry, False)

    def edge(i, carry):
        repeat, at = split(i, rest)
        return step(repeat, first + at + jnp.where(at >= before, full, 0), carry, True)

    carry = jax.lax.fori_loop(jnp.int32(0), repeats * full, whole, carry)
    return jax.lax.fori_loop(jnp.int32(0), repeats * rest, edge, carry)


def _rows(start: jax.Array, count: int) -> jax.Array:
    return start + jnp.arange(count, dtype=jnp.int32)


def _tile_mask(start: jax.Array, count: int, facts: Facts, ragged: bool) -> jax.Array | None:
    """Boolean [count, width] of what is inside of the array, None for everything."""
    inside = None
    if ragged:
        inside = (_rows(start, count) < facts.length)[:, None]
    if facts.width != facts.head_dim:
        columns = (jnp.arange(facts.width, dtype=jnp.int32) < facts.head_dim)[None, :]
        inside = columns if inside is None else inside & columns
    return None if inside is None else jnp.broadcast_to(inside, (count, facts.width))


def _load_tile(ref: Any, batch: Any, start: Any, count: int, head: Any, facts: Facts, ragged: bool) -> jax.Array:
    """[count, width] of a [B, T, heads, H] array, 0 outside of it; ragged says that rows may end inside."""
    at = ref.at[batch, ds(start, count), head, ds(0, facts.width)]
    mask = _tile_mask(start, count, facts, ragged)
    return load(at) if mask is None else load(at, mask=mask, other=0.0)


def _store_tile(ref: Any, value: jax.Array, batch: Any, start: Any, head: Any, facts: Facts) -> None:
    count = value.shape[0]
    at = ref.at[batch, ds(start, count), head, ds(0, facts.width)]
    store(at, value.astype(ref.dtype), mask=_tile_mask(start, count, facts, True))


def _load_row(ref: Any, index: tuple[Any, ...], start: Any, count: int, facts: Facts) -> jax.Array:
    """[count] of the last axis of an array [..., T], 0 outside of it."""
    return load(ref.at[(*index, ds(start, count))], mask=_rows(start, count) < facts.length, other=0)


def _load_span(ref: Any, batch: Any, block: Any) -> tuple[jax.Array, ...]:
    batch = 0 if ref.shape[0] == 1 else batch
    return tuple(ref[batch, block, i] for i in range(4))


def _seen(t: jax.Array, s: jax.Array, ids: tuple[jax.Array, jax.Array] | None, facts: Facts) -> jax.Array:
    """Which keys s the queries t see; rows and columns, either way round."""
    seen = t >= s
    if facts.window is not None:
        seen &= t - s < facts.window
    if ids is not None:
        seen &= (ids[0] == ids[1]) & (ids[0] != 0)
    return seen


def raw_logits(products: jax.Array, facts: Facts) -> jax.Array:
    """q . k as the logits' raw form, which `facts.factor` multiplies."""
    if facts.soft_cap is None:
        return products
    # tanh(x) = 1 - 2 / (1 + e^2x): right to float32's eps of 1, and at both infinities.
    return 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * facts.scale / facts.soft_cap)))


def _attention_forward(q_ref, k_ref, v_ref, spans_ref, *refs, facts: Facts):
    refs = list(refs)
    ids_ref = refs.pop(0) if facts.has_segments else None
    sinks_ref = refs.pop(0) if facts.has_sinks else None
    out_ref, lse_ref = refs
    own, other = facts.own, facts.other
    head, batch = program_id(0), program_id(1)
    block = number_of_blocks(facts.length, own) - 1 - program_id(2)  # the longest first
    kv_head = jax.lax.div(head, facts.group)
    start = block * own
    t = _rows(start, own)
    q = _load_tile(q_ref, batch, start, own, head, facts, True)
    t_ids = None if ids_ref is None else _load_row(ids_ref, (batch,), start, own, facts)

    def step(_, block, carry, masked):
        acc, largest, total = carry
        at = block * other
        k = _load_tile(k_ref, batch, at, other, kv_head, facts, masked)
        raw = raw_logits(backend.dot(q, k, trans_y=True), facts)
        seen = None
        if masked:
            ids = None
            if ids_ref is not None and t_ids is not None:
                ids = t_ids[:, None], _load_row(ids_ref, (batch,), at, other, facts)[None, :]
            seen = _seen(t[:, None], _rows(at, other)[None, :], ids, facts)
            raw = jnp.where(seen, raw, LOWEST)
        larger = jnp.maximum(largest, jnp.max(raw, axis=1) * facts.factor)
        p = jnp.exp2(raw * facts.factor - larger[:, None])
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        shrink = jnp.exp2(largest - larger)
        total = total * shrink + jnp.sum(p, axis=1)
        v = _load_tile(v_ref, batch, at, other, kv_head, facts, masked)
        return acc * shrink[:, None] + backend.dot(p.astype(v.dtype), v), larger, total

    largest, total = jnp.full((own,), LOWEST, jnp.float32), jnp.zeros((own,), jnp.float32)
    if sinks_ref is not None:
        sink = load(sinks_ref.at[head]).astype(jnp.float32) * LOG2E
        largest, total = jnp.maximum(largest, sink), total + 1
    carry = jnp.zeros((own, facts.width), jnp.float32), largest, total
    acc, largest, total = _walk(_load_span(spans_ref, batch, block), 1, step, carry)
    lse = (largest + jnp.log2(total)) / LOG2E
    if t_ids is not None:
        # A row of padding has seen nothing: acc is 0, total 0 (or the sink's 1).
        lse, total = jnp.where(t_ids == 0, 0.0, lse), jnp.where(t_ids == 0, 1.0, total)
    _store_tile(out_ref, acc / total[:, None], batch, start, head, facts)
    store(lse_ref.at[batch, head, ds(start, own)], lse, mask=t < facts.length)


def _attention_backward_queries(q_ref, k_ref, v_ref, o_ref, lse_ref, g_ref, spans_ref, *refs, facts: Facts):
    refs = list(refs)
    ids_ref = refs.pop(0) if facts.has_segments else None
    dq_ref, delta_ref = refs
    own, other = facts.own, facts.other
    head, batch = program_id(0), program_id(1)
    block = number_of_blocks(facts.length, own) - 1 - program_id(2)
    kv_head = jax.lax.div(head, facts.group)
    start = block * own
    t = _rows(start, own)
    q = _load_tile(q_ref, batch, start, own, head, facts, True)
    g = _load_tile(g_ref, batch, start, own, head, facts, True)
    o = _load_tile(o_ref, batch, start, own, head, facts, True)
    delta = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), axis=1)
    store(delta_ref.at[batch, head, ds(start, own)], delta, mask=t < facts.length)
    lse = _load_row(lse_ref, (batch, head), start, own, facts) * LOG2E
    t_ids = None if ids_ref is None else _load_row(ids_ref, (batch,), start, own, facts)

    def step(_, block, dq, masked):
        at = block * other
        k = _load_tile(k_ref, batch, at, other, kv_head, facts, masked)
        v = _load_tile(v_ref, batch, at, other, kv_head, facts, masked)
        raw = raw_logits(backend.dot(q, k, trans_y=True), facts)
        p = jnp.exp2(raw * facts.factor - lse[:, None])
        dlogits = p * (backend.dot(g, v, trans_y=True) - delta[:, None])
        if facts.soft_cap is not None:
            dlogits = dlogits * (1 - raw * raw)
        if masked:
            ids = None
            if ids_ref is not None and t_ids is not None:
                ids = t_ids[:, None], _load_row(ids_ref, (batch,), at, other, facts)[None, :]
            dlogits = jnp.where(_seen(t[:, None], _rows(at, other)[None, :], ids, facts), dlogits, 0.0)
        return dq + backend.dot(dlogits.astype(k.dtype), k)

    dq = jnp.zeros((own, facts.width), jnp.float32)
    dq = _walk(_load_span(spans_ref, batch, block), 1, step, dq)
    _store_tile(dq_ref, dq * facts.scale, batch, start, head, facts)


def _attention_backward_keys(q_ref, k_ref, v_ref, lse_ref, delta_ref, g_ref, spans_ref, *refs, facts: Facts):
    refs = list(refs)
    ids_ref = refs.pop(0) if facts.has_segments else None
    dk_ref, dv_ref = refs
    own, other = facts.own, facts.other
    kv_head, batch, block = program_id(0), program_id(1), program_id(2)  # the longest come first
    start = block * own
    s = _rows(start, own)
    k = _load_tile(k_ref, batch, start, own, kv_head, facts, True)
    v = _load_tile(v_ref, batch, start, own, kv_head, facts, True)
    s_ids = None if ids_ref is None else _load_row(ids_ref, (batch,), start, own, facts)

    def step(member, block, carry, masked):
        dk, dv = carry
        head, at = kv_head * facts.group + member, block * other
        q = _load_tile(q_ref, batch, at, other, head, facts, masked)
        lse = _load_row(lse_ref, (batch, head), at, other, facts) * LOG2E
        raw = raw_logits(backend.dot(k, q, trans_y=True), facts)  # [keys, queries]
        p = jnp.exp2(raw * facts.factor - lse[None, :])
        seen = None
        if masked:
            ids = None
            if ids_ref is not None and s_ids is not None:
                ids = _load_row(ids_ref, (batch,), at, other, facts)[None, :], s_ids[:, None]
            seen = _seen(_rows(at, other)[None, :], s[:, None], ids, facts)
            p = jnp.where(seen, p, 0.0)
        g = _load_tile(g_ref, batch, at, other, head, facts, masked)
        dv = dv + backend.dot(p.astype(g.dtype), g)
        delta = _load_row(delta_ref, (batch, head), at, other, facts)
        dlogits = p * (backend.dot(v, g, trans_y=True) - delta[None, :])
        if facts.soft_cap is not None:
            dlogits = dlogits * (1 - raw * raw)
        if seen is not None:
            dlogits = jnp.where(seen, dlogits, 0.0)
        return dk + backend.dot(dlogits.astype(q.dtype), q), dv

    zeros = jnp.zeros((own, facts.width), jnp.float32)
    dk, dv = _walk(_load_span(spans_ref, batch, block), facts.group, step, (zeros, zeros))
    _store_tile(dk_ref, dk * facts.scale, batch, start, kv_head, facts)
    _store_tile(dv_ref, dv, batch, start, kv_head, facts)
