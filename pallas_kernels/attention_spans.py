"""Which pairs of blocks of queries and keys flash attention visits, and what else its implementations share.

Decided outside of their loops from tiny arrays: a block visits those of the other side between the first and the last
that hold a seen pair, and among them is one run in which every pair is seen and nothing needs a mask.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LOWEST = float(np.finfo(np.float32).min)  # a maximum over nothing, and a logit that is not seen


def number_of_blocks(length: int, block: int) -> int:
    """How many blocks hold `length` rows; the last one may be cut off."""
    return -(-length // block)


def visits_of(
    length: int, blocks: tuple[int, int], segment_ids: jax.Array | None, sliding_window: int | None
) -> tuple[Any, Any]:
    """Boolean [B or 1, query blocks, key blocks]: may a pair of these blocks be seen; is every pair of them seen.

    Without segments it is known when the program is made.
    """
    xp: Any = np if segment_ids is None else jnp
    (q_first, q_last, q_whole), (k_first, k_last, k_whole) = (_edges(xp, length, block) for block in blocks)
    q_first, q_last, q_whole = q_first[:, None], q_last[:, None], q_whole[:, None]
    k_first, k_last, k_whole = k_first[None, :], k_last[None, :], k_whole[None, :]
    some = (q_last >= k_first) & (q_first < length) & (k_first < length)
    every = (q_first >= k_last) & q_whole & k_whole
    if sliding_window is not None:
        some, every = some & (q_first - k_last < sliding_window), every & (q_last - k_first < sliding_window)
    some, every = some[None], every[None]
    if segment_ids is None:
        return some, every
    (q_low, q_high, q_only), (k_low, k_high, k_only) = (_segments_of(segment_ids, block) for block in blocks)
    some = some & (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])
    return some, every & (q_only[:, :, None] == k_only[:, None, :]) & (q_only[:, :, None] != 0)


def spans(some: Any, every: Any, axis: int) -> jax.Array:
    """int32 [B or 1, own blocks, 4]: first <= full_first <= full_stop <= stop along the other side's axis.

    [first, stop) holds all visits, [full_first, full_stop) is the last run of blocks seen as a whole.
    """
    xp: Any = np if isinstance(some, np.ndarray) else jnp
    count = some.shape[axis]
    index = xp.arange(count, dtype=xp.int32).reshape((1, 1, count) if axis == -1 else (1, count, 1))
    after = index + xp.int32(1)
    stop = xp.max(xp.where(some, after, 0), axis=axis, keepdims=True)
    first = xp.minimum(xp.min(xp.where(some, index, xp.int32(count)), axis=axis, keepdims=True), stop)
    full_stop = xp.max(xp.where(every, after, 0), axis=axis, keepdims=True)
    full_first = xp.max(xp.where(~every & (index < full_stop), after, 0), axis=axis, keepdims=True)
    edges = [first, xp.maximum(full_first, first), xp.maximum(full_stop, first), stop]
    return jnp.asarray(xp.concatenate([xp.squeeze(edge, axis)[:, :, None] for edge in edges], axis=-1), jnp.int32)


def sinks_backward(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """dsinks [N] of sinks [N], lse and delta float32 [B, N, T]; see `pallas_kernels.attention`."""
    # sink <= lse except where a row is padding, and there delta is 0.
    p = jnp.exp(jnp.minimum(sinks.astype(jnp.float32)[None, :, None] - lse, jnp.float32(0)))
    return -jnp.sum(p * delta, axis=(0, 2)).astype(sinks.dtype)


def _padded_blocks(length: int, block: int) -> int:
    """A power of two of blocks, the last ones empty: XLA for GPUs (jax 0.11.2) gives wrong spans for 3 of them.

    Its program that fuses `visits_of` and the reductions of `spans` permutes blocks there; each of its ops alone is
    right, and so are powers of two.
    """
    return 1 << (number_of_blocks(length, block) - 1).bit_length()


def _edges(xp: Any, length: int, block: int) -> tuple[Any, Any, Any]:
    """Of each block: its first and last row, and whether it is whole."""
    first = xp.arange(_padded_blocks(length, block), dtype=xp.int32) * xp.int32(block)
    stop = first + xp.int32(block)
    return first, xp.minimum(stop, xp.int32(length)) - xp.int32(1), stop <= length


def _segments_of(segment_ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 [B, blocks]: the lowest and highest segment in a block, and the only one, or 0 where there is no such.

    Padding is no segment, and a block of nothing else overlaps no range: its lowest is above its highest.
    """
    batch, length = segment_ids.shape
    blocks = _padded_blocks(length, block)
    ids = jnp.pad(segment_ids, ((0, 0), (0, blocks * block - length))).reshape(batch, blocks, block)
    limits = jnp.iinfo(jnp.int32)
    low = jnp.min(jnp.where(ids == 0, jnp.int32(limits.max), ids), axis=-1)
    high = jnp.max(jnp.where(ids == 0, jnp.int32(limits.min), ids), axis=-1)
    only = (low == high) & ~jnp.any(ids == 0, axis=-1)
    return low, high, jnp.where(only, low, 0)
