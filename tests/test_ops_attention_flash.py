"""The flash attentions, kernels and loops, with blocks so small that several are visited, skipped, masked, cut off."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dense_references
from pallas_kernels import attention_blocks, attention_pallas, attention_spans
from pallas_kernels.attention import ATTENTION
from pallas_kernels.attention_pallas import Tiling

SORTED = [1] * 20 + [2] * 16 + [3] * 30 + [0] * 4 + [4] * 60
MIXED = [3, 3, 1, 0, 2] * 26
PLAIN: dict[str, Any] = {"scale": 0.3, "sliding_window": None, "soft_cap": None}
FORWARD = Tiling(32, 16, 4, 1)
QUERIES = Tiling(16, 32, 4, 1)
KEYS = Tiling(16, 16, 4, 1)


def make(length: int, head_dim: int = 16, heads: tuple[int, int] = (4, 2), dtype: Any = jnp.float32) -> list[jax.Array]:
    """(q, k, v, g) for two rows."""
    rng, (num_heads, num_kv_heads) = np.random.default_rng(length), heads
    shapes = [(2, length, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [jnp.asarray(rng.standard_normal(shape).astype(np.float32).astype(dtype)) for shape in shapes]


def segments(length: int, *rows: list[int]) -> jax.Array:
    return jnp.asarray(np.array([row[:length] for row in rows], np.int32))


# Each implementation's (forward, backward).
SMALL = {
    "pallas": (
        functools.partial(attention_pallas.forward, tiling=FORWARD),
        functools.partial(attention_pallas.backward, queries_tiling=QUERIES, keys_tiling=KEYS),
    ),
    "blocks": tuple(functools.partial(f, block=16) for f in (attention_blocks.forward, attention_blocks.backward)),
}
each_implementation = pytest.mark.parametrize("implementation", SMALL)


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "sliding_window", "soft_cap"))
def run(q, k, v, g, ids, sinks, *, implementation, **facts):
    """(out, lse, dq, dk, dv, dsinks)."""
    forward, backward = SMALL[implementation]
    out, lse = forward(q, k, v, ids, sinks, **facts)
    return out, lse, *backward(q, k, v, ids, sinks, out, lse, g, **facts)


def expected(q, k, v, g, ids, sinks, **facts):
    """The same in float64 by autodiff of the dense formula; lse from the share that a further sink would have."""
    q, k, v, g = (np.asarray(x).astype(np.float64) for x in (q, k, v, g))
    sinks = None if sinks is None else np.asarray(sinks).astype(np.float64)
    with jax.enable_x64(True):

        @jax.jit
        def attend(q, k, v, sinks):
            return dense_references.attention(q, k, v, segment_ids=ids, sinks=sinks, **facts)

        out, pullback = jax.vjp(attend, q, k, v, sinks)
        gradients = pullback(jnp.asarray(g))
        # A sink of 0 scales out by e^lse / (1 + e^lse), whatever v is: with v = 1 that says lse.
        ones = jnp.ones_like(v)
        num_sinks = np.zeros(q.shape[2])
        share = dense_references.attention(q, k, ones, segment_ids=ids, sinks=num_sinks, **facts)[..., 0]
        keys_only = jnp.where(share > 0, jnp.log(share / (1 - share)), -jnp.inf)
        lse = keys_only if sinks is None else jnp.logaddexp(keys_only, jnp.asarray(sinks)[None, None, :])
        lse = jnp.where(share > 0, lse, 0)
    return out, jnp.moveaxis(lse, 1, 2), *gradients


def assert_right(
    implementation: str,
    arrays: list[jax.Array],
    ids: Any = None,
    sinks: Any = None,
    tolerance: float = 3e-6,
    **facts: Any,
) -> None:
    facts = PLAIN | facts
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    found = run(*arrays, ids, sinks, implementation=implementation, **facts)
    for name, got, want in zip(names, found, expected(*arrays, ids, sinks, **facts), strict=True):
        if want is None:
            assert got is None, name
            continue
        got, want = np.asarray(got).astype(np.float64), np.asarray(want)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()), err_msg=name)


@each_implementation
def test_all_options_together(implementation):
    ids = segments(40, SORTED, MIXED)
    assert_right(implementation, make(40), ids, jnp.array([-1.0, 0.5, 3.0, 1.0]), sliding_window=19, soft_cap=4.0)


@pytest.mark.slow
@each_implementation
def test_blocks_that_are_seen_as_a_whole(implementation):
    """The other path: no segments, several whole blocks, a cut-off one."""
    assert_right(implementation, make(70))


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("length", [1, 17, 40, 130])
@pytest.mark.parametrize("packing", [None, "sorted", "mixed"])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_lengths_segments_windows(implementation, length, packing, window):
    rows = {"sorted": (SORTED, [2] * 130), "mixed": (MIXED, SORTED[::-1])}
    ids = None if packing is None else segments(length, *rows[packing])
    assert_right(implementation, make(length), ids, sliding_window=window)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_soft_cap_and_sinks(implementation, cap, with_sinks, packed):
    ids = segments(40, SORTED, MIXED) if packed else None
    sinks = jnp.array([-2.0, 0.0, 1.0, 100.0]) if with_sinks else None
    assert_right(implementation, make(40), ids, sinks, soft_cap=cap)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize(("head_dim", "heads"), [(16, (3, 3)), (80, (4, 1)), (96, (2, 1)), (5, (6, 3)), (256, (1, 1))])
def test_head_sizes_and_groups(implementation, head_dim, heads):
    assert_right(implementation, make(40, head_dim, heads), scale=head_dim**-0.5)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_dtypes(implementation, dtype):
    arguments = make(70, 64, dtype=dtype)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    assert_right(
        implementation,
        arguments,
        segments(70, SORTED, MIXED),
        jnp.ones(4),
        tolerance=tolerance,
        scale=0.125,
        soft_cap=9.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", [attention_pallas, attention_blocks])
def test_default_blocks(module):
    q, k, v, g = make(150, dtype=jnp.bfloat16)
    out, lse = module.forward(q, k, v, None, None, **PLAIN)
    got = (out, lse, *module.backward(q, k, v, None, None, out, lse, g, **PLAIN))
    want = expected(q, k, v, g, None, None, **PLAIN)
    for x, y in zip(got[:5], want[:5], strict=True):
        np.testing.assert_allclose(np.asarray(x).astype(np.float64), y, rtol=0, atol=0.03 * np.abs(y).max())


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("ids", [SORTED, MIXED])
def test_documents_do_not_leak_even_where_products_overflow(implementation, ids):
    """What the first document holds, as long as it is finite, leaves every bit of the others alone."""
    rows = segments(70, ids, ids)
    first = (rows == 3)[:, :, None, None]
    plain = make(70)
    huge = [jnp.where(first, jnp.float32(1e38), x) for x in plain]
    sinks = jnp.zeros(4)
    before, after = (run(*x, rows, sinks, implementation=implementation, **PLAIN) for x in (plain, huge))
    others = np.asarray(rows != 3)
    for x, y in zip(before[:5], after[:5], strict=True):
        x, y = (np.moveaxis(np.asarray(z), 2, 1) if z.ndim == 3 else np.asarray(z) for z in (x, y))
        assert np.array_equal(x[others], y[others])
        assert not np.array_equal(x[~others], y[~others])


@pytest.mark.slow
@each_implementation
def test_vmap_is_a_loop(implementation):
    q, k, v, g = make(40)
    ids, sinks = segments(40, SORTED, MIXED), jnp.ones(4)
    one = functools.partial(run, implementation=implementation, **PLAIN)
    stacked = jax.vmap(one)(*(jnp.stack([x, 2 * x]) for x in (q, k, v, g, ids, sinks)))
    for got, want in zip(stacked, one(*(2 * x for x in (q, k, v, g, ids, sinks))), strict=True):
        np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnames=("length", "blocks", "window"))
def visited(ids, length: int, blocks: tuple[int, int], window: int | None):
    """The spans of other blocks that each block of queries visits, and of keys."""
    some, every = attention_spans.visits_of(length, blocks, ids, window)
    return tuple(attention_spans.spans(some, every, axis) for axis in (-1, -2))


def test_visits_are_tight_for_packed_rows():
    """8 documents of 4 blocks: a program visits its own document's blocks only, and masks the diagonal only."""
    ids = jnp.repeat(jnp.arange(1, 9, dtype=jnp.int32), 64)[None]
    spans = np.asarray(visited(ids, 512, (16, 16), None)[0])[0]
    block = np.arange(32)
    want = np.stack([block // 4 * 4, block // 4 * 4, block, block + 1], axis=-1)
    np.testing.assert_array_equal(spans, want)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_visits_hold_every_seen_pair(packed, window):
    """Against the dense mask, both ways round: outside of a span nothing is seen, inside of its run everything is."""
    length, blocks = 130, (16, 32)
    ids = segments(length, SORTED, MIXED)
    t, s = np.arange(length)[:, None], np.arange(length)[None, :]
    seen = (t >= s) & (t - s < (window or length))
    seen = np.broadcast_to(seen, (2, length, length))
    if packed:
        ids_ = np.asarray(ids)
        seen = seen & (ids_[:, :, None] == ids_[:, None, :]) & (ids_[:, :, None] != 0)
    for axis, spans in zip((-1, -2), visited(ids if packed else None, length, blocks, window), strict=True):
        spans = np.asarray(spans)
        assert (np.diff(spans, axis=-1) >= 0).all()
        mask, (own, other) = (seen, blocks) if axis == -1 else (seen.swapaxes(1, 2), blocks[::-1])
        for row in range(2):
            for block, (first, full_first, full_stop, stop) in enumerate(spans[row % len(spans)]):
                mine = mask[row, block * own : (block + 1) * own]
                assert not mine[:, : first * other].any()
                assert not mine[:, stop * other :].any()
                assert mine[:, full_first * other : full_stop * other].all()


def test_refuses():
    q, k, v, _ = make(4)
    ask = functools.partial(attention_pallas.refuses, "cpu", scale=1.0)
    assert ask(q, k, v) is None
    assert "'tpu'" in str(attention_pallas.refuses("tpu", q, k, v, scale=1.0))
    assert "all be float32 or bfloat16" in str(ATTENTION.refuses("pallas", q.astype(jnp.bfloat16), k, v, scale=1.0))
    assert "3 keys" in str(ask(q, k[:, :3], v[:, :3]))
    assert "head size" in str(ask(*make(4, 257)[:3]))
    assert "scale" in str(attention_pallas.refuses("cpu", q, k, v, scale=-1.0))
