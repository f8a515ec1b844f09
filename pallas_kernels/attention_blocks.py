"""Flash attention as XLA loops, for CPUs: logits exist for one pair of blocks at a time, and unseen pairs are skipped.

`pallas_kernels.attention` states the op and its gradients. A block of queries walks over the blocks of keys of its
span (`attention_spans`), one after the other, with the forward pass' running maximum m, sum l and output (Dao et al.
2022, arXiv:2205.14135):

    m' = max(m, max_s logits)    p = exp(logits - m')    l = exp(m - m') l + sum_s p    acc = exp(m - m') acc + p v
    out = acc / l                lse = m + log l

where a sink is one more key without a value: m starts at it and l at 1. The backward pass is one such walk as well:
blocks are visited in turn, so a visit adds to dq of its queries and to dk and dv of its keys, and p is made once.

All query heads of a kv head are in one product. Logits are [keys, queries]: what is reduced over keys, the maximum and
the sum, is then vectorised over queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention_spans import LOWEST, number_of_blocks, sinks_backward, spans, visits_of
from pallas_kernels.precision import einsum_float32

BLOCK = 128  # tokens, at most. 64 and 256 were slower (docs/log.md)


class _Walks(NamedTuple):
    """What a walk needs beside q, k and v. Q is the number of blocks, t their length.

    Attributes:
      length: T.
      block: t.
      spans: int32 [B, Q, 4].
      segment_ids: int32 [B, Q, t], or None.
    """

    length: int
    block: int
    spans: jax.Array
    segment_ids: jax.Array | None
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    def cut(self, x: jax.Array, num_kv_heads: int) -> jax.Array:
        """[B, T, N, H] -> [B, Q, K, G, t, H], zeros behind the end."""
        batch, length, num_heads, size = x.shape
        x = jnp.pad(x, ((0, 0), (0, -length % self.block), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, self.block, num_kv_heads, num_heads // num_kv_heads, size)
        return jnp.transpose(x, (0, 1, 3, 4, 2, 5))

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`, also where the first two axes are one."""
        *_, num_kv_heads, group, block, size = x.shape
        x = jnp.moveaxis(x.reshape(self.spans.shape[0], -1, num_kv_heads, group, block, size), 4, 2)
        return x.reshape(x.shape[0], -1, num_kv_heads * group, size)[:, : self.length]

    def cut_rows(self, x: jax.Array, num_kv_heads: int) -> jax.Array:
        """[B, N, T] -> [B, Q, K, G, t]."""
        return self.cut(jnp.moveaxis(x, 1, 2)[..., None], num_kv_heads)[..., 0]

    def logits(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Float32 [K, s, G, t] of blocks q [K, G, t, H] and k [K, s, H]."""
        z = einsum_float32("kgth,ksh->ksgt", q, k) * self.scale
        return z if self.soft_cap is None else self.soft_cap * jnp.tanh(z / self.soft_cap)

    def seen(self, row: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
        """Boolean [1, s, 1, t]: which keys of block `other` the queries of block `own` see."""
        index = jnp.arange(self.block, dtype=jnp.int32)
        distance = (own * self.block + index)[None, :] - (other * self.block + index)[:, None]
        seen = distance >= 0
        if self.sliding_window is not None:
            seen &= distance < self.sliding_window
        if self.segment_ids is not None:
            t_ids, s_ids = self.segment_ids[row, own][None, :], self.segment_ids[row, other][:, None]
            seen &= (t_ids == s_ids) & (t_ids != 0)
        return seen[None, :, None, :]

    def each(self, visit: Any, carry: Any) -> tuple[Any, Any]:
        """Scans visit(carry, row of the batch, block, (first, stop)) -> (carry, result) over all blocks of queries."""
        batch, blocks, _ = self.spans.shape

        def step(carry, n):
            row, own = jax.lax.div(n, blocks), jax.lax.rem(n, blocks)
            span = self.spans[row, own]
            return visit(carry, row, own, (span[0], span[3]))

        return jax.lax.scan(step, carry, jnp.arange(batch * blocks, dtype=jnp.int32))


def _walks(q, segment_ids, scale, sliding_window, soft_cap, block) -> _Walks:
    batch, length = q.shape[:2]
    if block is None:  # as even as they can be, in whole vectors
        block = min(length, number_of_blocks(number_of_blocks(length, number_of_blocks(length, BLOCK)), 8) * 8)
    visits = visits_of(length, (block, block), segment_ids, sliding_window)
    blocks = number_of_blocks(length, block)
    all_spans = jnp.broadcast_to(spans(*visits, axis=-1)[:, :blocks], (batch, blocks, 4))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, -length % block))).reshape(batch, blocks, block)
    return _Walks(length, block, all_spans, segment_ids, scale, sliding_window, soft_cap)


def refuses(platform: str, *args: Any, **facts: Any) -> str | None:
    """Why the loops cannot run, or None where they can."""
    return "each visit would be a handful of kernels on a GPU" if platform == "gpu" else None


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
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, N, T]); a block has `block` tokens."""
    walks = _walks(q, segment_ids, scale, sliding_window, soft_cap, block)
    num_kv_heads = k.shape[2]
    q_cut, k_cut, v_cut = (walks.cut(x, num_kv_heads) for x in (q, k, v))
    shape = q_cut.shape[2:-1]  # [K, G, t]
    largest, total = jnp.full(shape, LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks.astype(jnp.float32).reshape(*shape[:2], 1))
        total = total + 1
    start = jnp.zeros(q_cut.shape[2:], jnp.float32), largest, total

    def visit(_, row, own, span):
        def step(other, carry):
            acc, largest, total = carry
            seen = walks.seen(row, own, other)
            logits = jnp.where(seen, walks.logits(q_cut[row, own], k_cut[row, other, :, 0]), LOWEST)
            larger = jnp.maximum(largest, jnp.max(logits, axis=1))
            p = jnp.where(seen, jnp.exp(logits - larger[:, None]), 0)
            shrink = jnp.exp(largest - larger)
            product = einsum_float32("ksgt,ksh->kgth", p.astype(v.dtype), v_cut[row, other, :, 0])
            return acc * shrink[..., None] + product, larger, total * shrink + jnp.sum(p, axis=1)

        acc, largest, total = jax.lax.fori_loop(span[0], span[1], step, start)
        lse = largest + jnp.log(total)
        if walks.segment_ids is not None:
            # A row of padding has seen nothing: acc is 0, total 0 (or the sink's 1).
            padding = walks.segment_ids[row, own][None, None, :] == 0
            lse, total = jnp.where(padding, 0, lse), jnp.where(padding, 1, total)
        return None, ((acc / total[..., None]).astype(q.dtype), lse)

    _, (out, lse) = walks.each(visit, None)
    return walks.joined(out), jnp.moveaxis(walks.joined(lse[..., None])[..., 0], 2, 1)


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
    block: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns (dq, dk, dv, dsinks or None), from what `forward` returned and its output's cotangent g."""
    walks = _walks(q, segment_ids, scale, sliding_window, soft_cap, block)
    g = g.astype(q.dtype)
    delta = jnp.moveaxis(jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1), 2, 1)
    num_kv_heads = k.shape[2]
    q_cut, k_cut, v_cut, g_cut = (walks.cut(x, num_kv_heads) for x in (q, k, v, g))
    lse_cut, delta_cut = (walks.cut_rows(x, num_kv_heads) for x in (lse, delta))

    def visit(carry, row, own, span):
        q_own, g_own = q_cut[row, own], g_cut[row, own]
        lse_own, delta_own = lse_cut[row, own][:, None], delta_cut[row, own][:, None]

        def step(other, carry):
            dq, dk, dv = carry
            k_other, v_other = k_cut[row, other, :, 0], v_cut[row, other, :, 0]
            seen = walks.seen(row, own, other)
            logits = walks.logits(q_own, k_other)
            p = jnp.where(seen, jnp.exp(logits - lse_own), 0)
            dv = dv.at[row, other].add(einsum_float32("ksgt,kgth->ksh", p.astype(g.dtype), g_own))
            dz = p * (einsum_float32("kgth,ksh->ksgt", g_own, v_other) - delta_own)
            if soft_cap is not None:
                dz = dz * (1 - (logits / soft_cap) ** 2)
            dz = jnp.where(seen, dz * scale, 0).astype(q.dtype)
            dk = dk.at[row, other].add(einsum_float32("ksgt,kgth->ksh", dz, q_own))
            return dq + einsum_float32("ksgt,ksh->kgth", dz, k_other), dk, dv

        dq, *carry = jax.lax.fori_loop(span[0], span[1], step, (jnp.zeros(q_own.shape, jnp.float32), *carry))
        return tuple(carry), dq.astype(q.dtype)

    zeros = jnp.zeros(k_cut[:, :, :, 0].shape, jnp.float32)
    (dk, dv), dq = walks.each(visit, (zeros, zeros))
    dk, dv = (walks.joined(x[:, :, :, None]) for x in (dk, dv))
    dsinks = None if sinks is None else sinks_backward(sinks, lse, delta)
    return walks.joined(dq), dk.astype(k.dtype), dv.astype(v.dtype), dsinks
