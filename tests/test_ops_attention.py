"""Attention: documents do not leak into each other, padding is silent, and remat policies can keep what it names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpr_tools import count_primitive
from pallas_kernels import attention, cached_attention

SEGMENTS = jnp.array([[1] * 5 + [2] * 6 + [3] * 4 + [0] * 2], jnp.int32)
HUGE = 3.0e38


def packed_row(dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q, k, v and the output's cotangent."""
    length = SEGMENTS.shape[1]
    shapes = [(1, length, 4, 8), (1, length, 2, 8), (1, length, 2, 8), (1, length, 4, 8)]
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes)
    return q, k, v, g


def disturbed(array: jax.Array, value: float, document: int = 2) -> jax.Array:
    """The array with one document's values replaced by +-value."""
    signs = np.where(np.arange(array.size).reshape(array.shape) % 3 == 0, -1, 1)
    mine = (np.asarray(SEGMENTS) == document)[:, :, None, None]
    return jnp.asarray(np.where(mine, (signs * value).astype(array.dtype), np.asarray(array)))


def others(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float32)[np.asarray(SEGMENTS) != 2]


@jax.jit
def out_and_gradients(q, k, v, g):
    attend = lambda q, k, v: attention(q, k, v, scale=0.3, segment_ids=SEGMENTS)  # noqa: E731
    out, pull_back = jax.vjp(attend, q, k, v)
    return (out, *pull_back(g))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("value", [7.0, 1e20, HUGE])
def test_a_document_changes_no_other(value: float, dtype) -> None:
    q, k, v, g = packed_row(dtype)
    before = out_and_gradients(q, k, v, g)
    after = out_and_gradients(*(disturbed(x, value) for x in (q, k, v)), g)
    for name, x, y in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
        np.testing.assert_array_equal(others(x), others(y), err_msg=name)
        assert np.isfinite(others(x)).all()
    assert not np.array_equal(np.asarray(before[0]), np.asarray(after[0]))


def test_a_mask_that_adds_would_leak() -> None:
    """Negative control: the usual additive -1e9 lets a huge document through."""

    def leaky(q, k, v):
        logits = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2))
        seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & jnp.tri(SEGMENTS.shape[1], dtype=bool)[None]
        p = jax.nn.softmax(logits + jnp.where(seen, 0, -1e9)[:, None], axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, 2, axis=2))

    q, k, v, _ = packed_row()
    run = jax.jit(leaky)
    after = run(*(disturbed(x, 1e20) for x in (q, k, v)))
    assert not np.array_equal(others(run(q, k, v)), others(after))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_infinite_queries_and_keys_stay_in_their_document(value: float) -> None:
    q, k, v, g = packed_row()
    before = out_and_gradients(q, k, v, g)[0]
    after = out_and_gradients(disturbed(q, value), disturbed(k, value), v, g)[0]
    np.testing.assert_array_equal(others(before), others(after))


def test_infinite_values_are_never_mistaken_for_a_result() -> None:
    q, k, v, g = packed_row()
    out = others(out_and_gradients(q, k, disturbed(v, np.inf), g)[0])
    same = out == others(out_and_gradients(q, k, v, g)[0])
    assert (same | np.isnan(out)).all()


def test_padding_is_zero_and_unseen() -> None:
    q, k, v, g = packed_row()
    padding = np.asarray(SEGMENTS) == 0
    for array in out_and_gradients(q, k, v, g):
        assert (np.asarray(array)[padding] == 0).all()


def test_a_packed_document_equals_the_same_document_alone() -> None:
    q, k, v, _ = packed_row()
    packed = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.3, segment_ids=SEGMENTS))(q, k, v)[:, 5:11]
    alone = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.3))(*(np.asarray(x)[:, 5:11] for x in (q, k, v)))
    np.testing.assert_allclose(packed, alone, rtol=1e-6, atol=1e-6)


def test_decoding_step_by_step_equals_the_whole_sequence() -> None:
    q, k, v, _ = packed_row()
    whole = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.3, sliding_window=4))(q, k, v)
    step = jax.jit(lambda *arguments: cached_attention(*arguments, scale=0.3, sliding_window=4))
    for position in (0, 3, 9):
        # The cache's later slots hold what no query may see.
        k_cache, v_cache = np.array(k), np.array(v)
        k_cache[:, position + 1 :] = v_cache[:, position + 1 :] = HUGE
        out = step(np.asarray(q)[:, position : position + 1], k_cache, v_cache, np.array([[position]], np.int32))
        np.testing.assert_allclose(out[:, 0], np.asarray(whole)[:, position], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "products"), [((), 2 + 2 + 5), (("attn_out",), 2 + 1 + 5), (("attn_out", "attn_lse"), 2 + 5)]
)
def test_a_policy_that_keeps_out_and_lse_does_not_run_attention_again(names: tuple[str, ...], products: int) -> None:
    """Forward: logits and output; again what was not kept; backward: logits, dv, dp, dq and dk."""
    q, k, v, g = packed_row()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    attend = jax.checkpoint(lambda q, k, v: attention(q, k, v, scale=0.3, segment_ids=SEGMENTS), policy=policy)
    jaxpr = jax.make_jaxpr(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))(q, k, v, g)
    assert count_primitive(jaxpr, "dot_general") == products
