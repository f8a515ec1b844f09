"""Causal grouped-query attention over packed documents, and attention over a key/value cache.

    z[t, s]      = scale * q[t] . k[s]            for the keys s that query t sees, float32
    logits[t, s] = z[t, s], or cap * tanh(z[t, s] / cap) with a soft cap
    lse[t]       = log(exp(sink) + sum_s exp(logits[t, s]))          (without a sink exp(sink) is 0)
    out[t]       = sum_s p[t, s] v[s],            p[t, s] = exp(logits[t, s] - lse[t])

q [B, T, N, H]; k, v [B, S, K, H]; query head n reads kv head n // (N / K), so q is viewed as [B, T, K, G, H] and keys
and values are never repeated. A sink is one learned logit of each query head that takes probability and has no value
(Xiao et al. 2023, arXiv:2309.17453). With the output's cotangent g the gradients are (Dao et al. 2022,
arXiv:2205.14135)

    dv[s]    = sum_t p[t, s] g[t]
    delta[t] = g[t] . out[t]
    dz[t, s] = p[t, s] (g[t] . v[s] - delta[t]), times 1 - (logits[t, s] / cap)^2 with a soft cap
    dq[t]    = scale sum_s dz[t, s] k[s]          dk[s] = scale sum_t dz[t, s] q[t]
    dsink    = - sum_t exp(sink - lse[t]) delta[t]

so the backward pass needs q, k, v, out and lse only, and makes p again.

There is one custom_vjp. An implementation is a pair of functions that it calls: forward -> (out, lse) and backward ->
(dq, dk, dv, dsinks). So what remat policies can keep has the same names whichever implementation runs.

Documents do not leak into each other: every [t, s] that is not seen is replaced, not multiplied, before and after the
exponential and again in dz. What is left of another document in a sum is 0 * value, which is 0 for every finite value.
So as long as q, k, v and g are finite (their products may overflow), changing one document leaves the others' outputs
and gradients bit-identical. An infinity or NaN in q or k leaves the others' outputs alone too; one in v (or, backward,
in any of q, k, v, g) makes the other documents of its row NaN, which nothing can mistake for a result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import attention_blocks, attention_cudnn, attention_decode, attention_pallas
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32

__all__ = ["ATTENTION", "CACHED_ATTENTION", "attention", "cached_attention"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segment_ids: jax.Array | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal self-attention with analytic gradients for q, k, v and sinks.

    Args:
      q: [B, T, N, H].
      k: [B, T, K, H], N a multiple of K, dtype of q.
      v: as k.
      scale: multiplies q . k.
      segment_ids: int32 [B, T]; a query sees the keys of its own segment at or before its own index. 0 is padding:
        its rows are zeros and nothing sees them. None means that each row is one document.
      sliding_window: how many keys a query sees at most, itself included.
      soft_cap: c: logits become c tanh(logits / c).
      sinks: [N], one logit for each head that takes probability and has no value.
      implementation: "cudnn" (float16 and bfloat16; no segment ids, soft cap or sinks), "pallas", "blocks" (XLA loops,
        not for GPUs), "xla", or None: on a GPU the first of these that can run the arguments, on a CPU "blocks" for
        long rows and "xla" for short ones.

    Returns:
      [B, T, N, H] in q's dtype. The forward pass names its residuals "attn_out" (this) and "attn_lse" (float32
      [B, N, T]) for remat policies.

    Raises:
      ValueError: shapes that do not fit, a window below 1, a soft cap that is not positive.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import attention
    >>> q = jnp.ones((1, 4, 2, 8))
    >>> k = jnp.ones((1, 4, 1, 8))
    >>> v = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], k.shape)
    >>> " ".join(f"{x:.1f}" for x in attention(q, k, v, scale=1.0)[0, :, 0, 0])
    '0.0 0.5 1.0 1.5'
    >>> two_documents = jnp.array([[1, 1, 2, 2]], jnp.int32)
    >>> " ".join(f"{x:.1f}" for x in attention(q, k, v, scale=1.0, segment_ids=two_documents)[0, :, 0, 0])
    '0.0 0.5 2.0 2.5'
    """
    _check(q, k, v, sliding_window, soft_cap, sinks)
    ids_shape = None if segment_ids is None else segment_ids.shape
    if k.shape[1] != q.shape[1] or ids_shape not in (None, q.shape[:2]):
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and segment_ids {ids_shape} must have the same B and T")
    return ATTENTION(
        q,
        k,
        v,
        scale=scale,
        segment_ids=segment_ids,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        implementation=implementation,
    )


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
    implementation: str | None = None,
) -> jax.Array:
    """Attention over a key/value cache whose slot s holds position s; for generation.

    Args:
      q: [B, T, N, H].
      k_cache: [B, S, K, H], or of all layers [L, B, S, K, H], dtype of q. Slots that no query sees may hold any finite
        value.
      v_cache: as k_cache.
      q_positions: int32 [B, T]; a query sees the slots s <= its position. A negative one sees nothing: zeros.
      scale: multiplies q . k.
      layer: int32 [], which of all layers' caches.
      sliding_window: how many slots a query sees at most, its own included.
      soft_cap: as in `attention`.
      sinks: as in `attention`.
      implementation: "pallas" (one query a row), "xla" or None.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: shapes that do not fit, a window below 1, a soft cap that is not positive.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import cached_attention
    >>> cache = jnp.broadcast_to(jnp.arange(6.0)[None, :, None, None], (1, 6, 1, 8))
    >>> q, position = jnp.zeros((1, 1, 2, 8)), jnp.array([[4]], jnp.int32)
    >>> f"{cached_attention(q, cache, cache, position, scale=1.0)[0, 0, 0, 0]:.1f}"
    '2.0'
    """
    k, v = (x if layer is None else jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (k_cache, v_cache))
    _check(q, k, v, sliding_window, soft_cap, sinks)
    return CACHED_ATTENTION(
        q,
        k_cache,
        v_cache,
        q_positions,
        scale=scale,
        layer=layer,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        implementation=implementation,
    )


def _check(
    q: jax.Array,
    k: jax.Array | jax.ShapeDtypeStruct,
    v: jax.Array | jax.ShapeDtypeStruct,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> None:
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit [B, T, N, H], [B, S, K, H]")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"attention: sliding_window must be at least 1, not {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"attention: soft_cap must be positive, not {soft_cap}")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"attention: sinks {sinks.shape} must hold one logit for each of the {q.shape[2]} heads")


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


def _group_sinks(sinks: jax.Array, num_kv_heads: int) -> jax.Array:
    """[N] -> float32 [1, K, G, 1]."""
    return sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1)


def _logits(q_BTKGH: jax.Array, k: jax.Array, scale: float, soft_cap: float | None, seen: jax.Array) -> jax.Array:
    """float32 [B, K, G, T, S], -inf where a key is not seen."""
    z = einsum_float32("btkgh,bskh->bkgts", q_BTKGH, k) * scale
    return jnp.where(seen, z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap), -jnp.inf)


def _probabilities(logits: jax.Array, lse: jax.Array, seen: jax.Array) -> jax.Array:
    """exp(logits - lse) where seen, else exactly 0; the inner where keeps inf - inf out of the exponential."""
    return jnp.where(seen, jnp.exp(jnp.where(seen, logits - lse[..., None], 0)), 0)


def _logsumexp(logits: jax.Array, sinks: jax.Array | None, seen: jax.Array) -> jax.Array:
    """float32 [B, K, G, T]; for a query that sees nothing its sink, or 0."""
    sees_any = jnp.any(seen, axis=-1)
    largest = jnp.max(logits, axis=-1, initial=-jnp.inf)
    if sinks is None:
        largest = jnp.where(sees_any, largest, 0)
        total = jnp.sum(_probabilities(logits, largest, seen), axis=-1)
        return largest + jnp.log(jnp.where(sees_any, total, 1))
    sinks = jnp.broadcast_to(_group_sinks(sinks, logits.shape[1]), largest.shape)
    largest = jnp.maximum(largest, sinks)
    return largest + jnp.log(jnp.sum(_probabilities(logits, largest, seen), axis=-1) + jnp.exp(sinks - largest))


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    scale: float,
    soft_cap: float | None,
    seen: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H], lse [B, N, T])."""
    logits = _logits(_group(q, k.shape[2]), k, scale, soft_cap, seen)
    lse = _logsumexp(logits, sinks, seen)
    p = _probabilities(logits, lse, seen).astype(v.dtype)
    out = einsum_float32("bkgts,bskh->btkgh", p, v)
    batch, length, num_heads, _ = q.shape
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, num_heads, length)


def _xla_forward(q, k, v, segment_ids, sinks, *, scale, sliding_window, soft_cap):
    return _attend(q, k, v, sinks, scale, soft_cap, _causal_mask(q.shape[1], segment_ids, sliding_window))


def _xla_backward(q, k, v, segment_ids, sinks, out, lse, g, *, scale, sliding_window, soft_cap):
    seen = _causal_mask(q.shape[1], segment_ids, sliding_window)
    q_BTKGH, g_BTKGH = _group(q, k.shape[2]), _group(g, k.shape[2])
    batch, length, num_kv_heads, group, _ = q_BTKGH.shape
    lse = lse.reshape(batch, num_kv_heads, group, length)
    logits = _logits(q_BTKGH, k, scale, soft_cap, seen)
    p = _probabilities(logits, lse, seen)
    dv = einsum_float32("bkgts,btkgh->bskh", p.astype(g.dtype), g_BTKGH)
    dp = einsum_float32("btkgh,bskh->bkgts", g_BTKGH, v)
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, T, N]
    delta = jnp.moveaxis(delta.reshape(q_BTKGH.shape[:4]), 1, 3)  # [B, K, G, T]
    dz = p * (dp - delta[..., None])
    if soft_cap is not None:
        dz = dz * (1 - (logits / soft_cap) ** 2)
    dz = jnp.where(seen, dz * scale, 0).astype(q.dtype)
    dq = einsum_float32("bkgts,bskh->btkgh", dz, k)
    dk = einsum_float32("bkgts,btkgh->bskh", dz, q_BTKGH)
    dsinks = None
    if sinks is not None:
        shares = jnp.exp(jnp.broadcast_to(_group_sinks(sinks, num_kv_heads), lse.shape) - lse)
        dsinks = -jnp.sum(shares * delta, axis=(0, 3)).reshape(sinks.shape).astype(sinks.dtype)
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsinks


class _Kernels(NamedTuple):
    """One implementation; see `attention_pallas` for the signatures. None: it takes every dtype, or refuses nothing."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    dtypes: tuple[Any, ...] | None = None
    refuses: Callable[..., str | None] | None = None


def _of(module: Any) -> _Kernels:
    return _Kernels(module.forward, module.backward, module.DTYPES, module.refuses)


_KERNELS = {
    "xla": _Kernels(_xla_forward, _xla_backward),
    "blocks": _Kernels(attention_blocks.forward, attention_blocks.backward, refuses=attention_blocks.refuses),
    "pallas": _of(attention_pallas),
    "cudnn": _of(attention_cudnn),
}


def _refuses(kernels: _Kernels, platform: str, q: Any, k: Any, v: Any, **facts: Any) -> str | None:
    reason = None if kernels.refuses is None else kernels.refuses(platform, q, k, v, **facts)
    if reason is None and kernels.dtypes is not None and not (q.dtype == k.dtype == v.dtype in kernels.dtypes):
        names = " or ".join(jnp.dtype(dtype).name for dtype in kernels.dtypes)
        return f"q, k and v must all be {names}, not {q.dtype}, {k.dtype} and {v.dtype}"
    return reason


class _Static(NamedTuple):
    """What `_attention` needs beside arrays; hashable."""

    implementation: str
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale, "sliding_window": self.sliding_window, "soft_cap": self.soft_cap}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, segment_ids, sinks):
    return _KERNELS[static.implementation].forward(q, k, v, segment_ids, sinks, **static.facts)[0]


def _attention_fwd(static, q, k, v, segment_ids, sinks):
    out, lse = _KERNELS[static.implementation].forward(q, k, v, segment_ids, sinks, **static.facts)
    # Named here, inside the forward rule: a remat policy cannot keep what is named outside a custom_vjp.
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, segment_ids, sinks, out, lse)


def _attention_bwd(static, residuals, g):
    dq, dk, dv, dsinks = _KERNELS[static.implementation].backward(*residuals, g, **static.facts)
    return dq, dk, dv, None, dsinks


_attention.defvjp(_attention_fwd, _attention_bwd)


def _implementation(name: str) -> Implementation:
    def function(q, k, v, *, scale, segment_ids=None, sliding_window=None, soft_cap=None, sinks=None):
        if q.size == 0:
            return jnp.zeros_like(q)  # depends on nothing, so every gradient is 0 too; kernels need something to do
        return _attention(_Static(name, scale, sliding_window, soft_cap), q, k, v, segment_ids, sinks)

    return Implementation(function, functools.partial(_refuses, _KERNELS[name]))


# Tokens a row from which the loops over blocks are the faster on a CPU: below, there is one block or two.
BLOCKS_FROM = 256


def _rank(
    platform: str, q: Any, *args: Any, segment_ids: Any = None, soft_cap: Any = None, sinks: Any = None, **kwargs: Any
) -> tuple[Choice, ...]:
    if platform == "cpu" and q.shape[1] >= BLOCKS_FROM:
        # 9 query and 3 kv heads of 64, float32; one document: 0.66 and 5.6 s. 256 tokens: 1.6 to 3 times as fast.
        why = "it takes 0.28 s forward and backward where XLA takes 3.2 (1 x 2048 packed tokens on two busy cores)"
        return (Choice("blocks", f"its logits stay in the cache, and it skips blocks that nothing sees: {why}"),)
    if platform != "gpu":
        return (Choice("xla", "kernels run on GPUs only"),)
    pallas = Choice("pallas", "it never writes the logits to memory and skips blocks that nothing sees")
    if segment_ids is not None or soft_cap is not None or sinks is not None:
        return (pallas,)
    # 32 query and 8 kv heads of 128, bfloat16; 1 x 8192 tokens: cuDNN 3.71 ms.
    cudnn = Choice("cudnn", "cuDNN takes 0.71 ms forward and backward where XLA takes 5.26 (H100, 2 x 2048 tokens)")
    return (cudnn, pallas)


def _cached_reference(
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
    if layer is not None:
        k_cache, v_cache = k_cache[layer], v_cache[layer]
    key_index = jnp.arange(k_cache.shape[1], dtype=jnp.int32)[None, :]
    seen = _seen(q_positions, key_index, sliding_window)
    return _attend(q, k_cache, v_cache, sinks, scale, soft_cap, seen)[0]


def _cached_rank(platform: str, q: jax.Array, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform != "gpu":
        return (Choice("xla", "kernels run on GPUs only"),)
    return (Choice("pallas", "it reads the cache in place, and only up to each row's position"),)


def _case(
    name: str,
    sizes: tuple[int, int, int, int, int],
    ids: list[list[int]] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
) -> Case:
    batch, length, num_heads, num_kv_heads, head_dim = sizes
    kv_shape = (batch, length, num_kv_heads, head_dim)

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "q": normal(rng, (batch, length, num_heads, head_dim), dtype),
            "k": normal(rng, kv_shape, dtype),
            "v": normal(rng, kv_shape, dtype),
            "scale": 1 / math.sqrt(head_dim),
            "segment_ids": None if ids is None else jnp.asarray(np.array(ids, np.int32)),
            "sliding_window": window,
            "soft_cap": soft_cap,
        }
        return arguments | ({"sinks": normal(rng, (num_heads,), dtype)} if sinks else {})

    reduction = length * num_heads // num_kv_heads + head_dim
    # A sink's gradient is summed over all queries.
    reduction += batch * length * head_dim if sinks else 0
    return Case(name, make, reduction=reduction, differentiable=("q", "k", "v") + (("sinks",) if sinks else ()))


def _cached_case(
    name: str,
    sizes: tuple[int, int, int, int, int, int],
    positions: list[list[int]],
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    layers: int | None = None,
) -> Case:
    batch, length, slots, num_heads, num_kv_heads, head_dim = sizes
    cache_shape = (*(() if layers is None else (layers,)), batch, slots, num_kv_heads, head_dim)

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "q": normal(rng, (batch, length, num_heads, head_dim), dtype),
            "k_cache": normal(rng, cache_shape, dtype),
            "v_cache": normal(rng, cache_shape, dtype),
            "q_positions": jnp.asarray(np.array(positions, np.int32)),
            "scale": 1 / math.sqrt(head_dim),
            "layer": None if layers is None else jnp.int32(layers - 1),
            "sliding_window": window,
            "soft_cap": soft_cap,
        }
        return arguments | ({"sinks": normal(rng, (num_heads,), dtype)} if sinks else {})

    return Case(name, make, reduction=slots + head_dim)


ATTENTION = register(
    Op(
        name="attention",
        replaces="scores, softmax, product",
        saves="the [T, S] scores; blocks that no query sees",
        implementations={name: _implementation(name) for name in _KERNELS},
        cases=(
            _case("one document", (2, 9, 4, 4, 16)),
            _case("grouped heads, window", (1, 33, 6, 2, 17), window=5),
            _case("packed, padded", (2, 11, 4, 2, 8), [[1] * 4 + [2] * 5 + [0] * 2, [1] + [2] * 2 + [3] * 8]),
            _case("packed, window", (1, 13, 3, 1, 10), [[1] * 6 + [2] * 6 + [0]], window=3),
            _case("soft cap", (1, 19, 4, 2, 16), soft_cap=1.5),
            _case("sinks, packed, window", (2, 11, 4, 2, 8), [[1] * 4 + [2] * 5 + [0] * 2, [3] * 11], 4, sinks=True),
            # With a sink: without one the gradients of q and k are 0, and nothing is small beside 0.
            _case("one token", (1, 1, 2, 1, 8), sinks=True),
        ),
        rank=_rank,
        roundings=4,
    )
)

CACHED_ATTENTION = register(
    Op(
        name="cached_attention",
        replaces="a copy of the layer's cache, scores, softmax, product",
        saves="the copy; slots behind a row's position",
        implementations={
            "xla": Implementation(_cached_reference),
            "pallas": Implementation(attention_decode.cached_attention, attention_decode.refuses),
        },
        rank=_cached_rank,
        cases=(
            _cached_case("one step, rows at different positions", (3, 1, 17, 6, 2, 10), [[0], [7], [16]]),
            _cached_case("prefill", (2, 5, 9, 4, 2, 16), [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]),
            _cached_case("blocks, layer of a stack", (3, 1, 150, 4, 2, 16), [[149], [70], [-1]], layers=2),
            _cached_case("step: blocks, window, cap, sinks", (2, 1, 99, 6, 2, 8), [[98], [40]], 39, 1.5, sinks=True),
            _cached_case("window", (2, 3, 11, 2, 2, 8), [[4, 5, 6], [0, 1, 2]], window=4),
            _cached_case("soft cap and sinks", (1, 3, 11, 4, 2, 8), [[4, 5, -1]], soft_cap=1.5, sinks=True),
        ),
        roundings=4,
    )
)
