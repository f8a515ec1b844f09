"""Attention: documents do not leak into each other, padding is silent, and remat policies can keep what it names."""

from __future__ import annotations

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpr_tools import count_primitive
from lowering import h100, kernel_names, lowered_text
from pallas_kernels import attention, attention_cudnn, cached_attention, explain

attention_module = importlib.import_module("pallas_kernels.attention")

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


@pytest.mark.parametrize("value", [7.0, HUGE])
def test_a_document_changes_no_other_with_soft_cap_and_sinks(value: float) -> None:
    q, k, v, g = packed_row()
    sinks = jnp.linspace(-1.0, 2.0, 4)

    @jax.jit
    def run(q, k, v):
        attend = lambda q, k, v: attention(  # noqa: E731
            q, k, v, scale=0.3, segment_ids=SEGMENTS, sliding_window=3, soft_cap=2.0, sinks=sinks
        )
        out, pull_back = jax.vjp(attend, q, k, v)
        return (out, *pull_back(g))

    for x, y in zip(run(q, k, v), run(*(disturbed(x, value) for x in (q, k, v))), strict=True):
        np.testing.assert_array_equal(others(x), others(y))
        assert np.isfinite(others(x)).all()


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


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_decoding_step_by_step_equals_the_whole_sequence(implementation: str) -> None:
    q, k, v, _ = packed_row()
    whole = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.3, sliding_window=4))(q, k, v)
    step = jax.jit(
        lambda *arguments: cached_attention(*arguments, scale=0.3, sliding_window=4, implementation=implementation)
    )
    for position in (0, 3, 9):
        # The cache's later slots hold what no query may see.
        k_cache, v_cache = np.array(k), np.array(v)
        k_cache[:, position + 1 :] = v_cache[:, position + 1 :] = HUGE
        out = step(np.asarray(q)[:, position : position + 1], k_cache, v_cache, np.array([[position]], np.int32))
        np.testing.assert_allclose(out[:, 0], np.asarray(whole)[:, position], rtol=1e-6, atol=1e-6)


def test_a_row_of_a_cache_does_not_depend_on_the_others() -> None:
    """Bit for bit, with several parts a row; and what it does not see it does not read."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, 1 if i == 0 else 300, 4, 16), np.float32) for i in range(3))
    step = jax.jit(functools.partial(cached_attention, scale=0.3, implementation="pallas"))
    before = np.asarray(step(q, k, v, np.array([[170], [299]], np.int32)))[0]
    k[1], v[1], k[0, 171:], v[0, 171:] = 3.0, 4.0, np.nan, HUGE
    assert np.isfinite(before).all()
    np.testing.assert_array_equal(step(q, k, v, np.array([[170], [3]], np.int32))[0], before)
    k[0, 100] += 1
    assert (np.asarray(step(q, k, v, np.array([[170], [3]], np.int32)))[0] != before).any()


@pytest.mark.parametrize(
    ("names", "products"), [((), 2 + 2 + 5), (("attn_out",), 2 + 1 + 5), (("attn_out", "attn_lse"), 2 + 5)]
)
def test_a_policy_that_keeps_out_and_lse_does_not_run_attention_again(names: tuple[str, ...], products: int) -> None:
    """Forward: logits and output; again what was not kept; backward: logits, dv, dp, dq and dk."""
    q, k, v, g = packed_row()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    attend = lambda q, k, v: attention(q, k, v, scale=0.3, segment_ids=SEGMENTS, implementation="xla")  # noqa: E731
    attend = jax.checkpoint(attend, policy=policy)
    jaxpr = jax.make_jaxpr(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))(q, k, v, g)
    assert count_primitive(jaxpr, "dot_general") == products


# cuDNN: what can be shown without a GPU, with a stand-in for JAX's two primitives.


class FakeCudnn:
    """One of the two primitives, in plain JAX."""

    def __init__(self, backward: bool) -> None:
        self.backward = backward

    def bind(self, q, k, v, bias, q_lengths, kv_lengths, q_offsets, kv_offsets, pages_k, pages_v, *saved, **static):
        unused = (bias, q_lengths, kv_lengths, q_offsets, kv_offsets, pages_k, pages_v)
        assert static.get("is_training", True)
        assert not any(x.size for x in unused)
        options = {"scale": static["scale"], "sliding_window": static["sliding_window_length"], "soft_cap": None}
        if not self.backward:
            return attention_module._xla_forward(q, k, v, None, None, **options)
        lse, out, g = saved
        return attention_module._xla_backward(q, k, v, None, None, out, lse, g, **options)[:3]


@pytest.fixture
def fake_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(attention_cudnn._MODULE)
    monkeypatch.setattr(module, "_dot_product_attention_fwd_p", FakeCudnn(backward=False))
    monkeypatch.setattr(module, "_dot_product_attention_bwd_p", FakeCudnn(backward=True))


@pytest.mark.parametrize("scratch", [2**20, 1], ids=["one call", "in groups"])
def test_cudnn_under_vmap_joins_the_batch(fake_cudnn: None, monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    monkeypatch.setattr(attention_cudnn, "SCRATCH_BYTES", scratch)
    rng = np.random.default_rng(1)
    q, k, v, g = (jnp.asarray(rng.standard_normal((3, 2, 7, n, 8)).astype(np.float32)) for n in (8, 4, 4, 8))
    options = {"scale": 0.3, "sliding_window": 3, "soft_cap": None}

    def both_directions(implementation, q, k, v, g):
        out, lse = implementation.forward(q, k, v, None, None, **options)
        return out, *implementation.backward(q, k, v, None, None, out, lse, g, **options)[:3]

    run = functools.partial(both_directions, attention_cudnn)
    results = jax.vmap(run, in_axes=(0, None, 0, None))(q, k[0], v, g[0])
    for i in range(3):
        expected = both_directions(attention_module._KERNELS["xla"], q[i], k[0], v[i], g[0])
        for x, y in zip(results, expected, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_of_kv_heads_one_after_another_give_the_same_gradients(groups: int) -> None:
    rng = np.random.default_rng(2)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, 7, n, 8)).astype(np.float32)) for n in (12, 6, 6, 12))
    options = {"scale": 0.3, "sliding_window": 3, "soft_cap": None}
    out, lse = jax.jit(functools.partial(attention_module._xla_forward, **options))(q, k, v, None, None)
    heads = []

    def backward(q, k, v, lse, out, g):
        heads.append((q.shape[2], k.shape[2]))
        return attention_module._xla_backward(q, k, v, None, None, out, lse, g, **options)[:3]

    arguments = (q, k, v, lse, out, g)
    results = jax.jit(functools.partial(attention_cudnn.in_groups, backward, groups))(*arguments)
    assert set(heads) == {(12 // groups, 6 // groups)}
    for x, y in zip(results, jax.jit(backward)(*arguments), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


Q, KV = half(2, 256, 8, 64), half(2, 256, 2, 64)
IDS = jax.ShapeDtypeStruct((2, 256), jnp.int32)


def forward_and_backward(q, k, v, g, ids=None, **options):
    attend = lambda q, k, v: attention(q, k, v, scale=0.125, segment_ids=ids, **options)  # noqa: E731
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, pull_back(g)


def cudnn_calls(text: str) -> tuple[int, int]:
    return text.count("@__cudnn$fmhaSoftmax("), text.count("@__cudnn$fmhaSoftmaxBackward(")


def test_cudnn_is_in_the_program_for_a_gpu() -> None:
    text = lowered_text(functools.partial(forward_and_backward, sliding_window=100), Q, KV, KV, Q)
    assert cudnn_calls(text) == (1, 1)
    assert text.count(r"\22sliding_window_length\22: 100") == 2
    assert not kernel_names(text)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups"),
    [
        (2, 2048, (32, 8), 1),
        (1, 8192, (32, 8), 1),
        (1, 65536, (32, 8), 8),
        (16, 4096, (32, 8), 8),
        (1, 65536, (2, 2), 1),  # 128 MiB are within bounds
        (1, 65536, (32, 1), 1),  # nothing to group
        (1, 65536, (32, 2), 1),  # two groups and their copies need more than one call
    ],
)
def test_long_sequences_go_through_the_backward_pass_in_groups(batch, length, heads, groups: int) -> None:
    q, kv = (half(batch, length, n, 128) for n in heads)
    assert attention_cudnn.number_of_groups(q, kv) == groups
    text = lowered_text(forward_and_backward, q, kv, kv, q)
    assert cudnn_calls(text) == (1, 1)
    results = f"tensor<{batch}x{heads[0] // groups}x{length}x128xbf16>, tensor<{batch}x{heads[1] // groups}x"
    assert re.search(rf"fmhaSoftmaxBackward.*-> \({results}", text)


def test_packed_rows_run_the_kernels() -> None:
    text = lowered_text(forward_and_backward, Q, KV, KV, Q, IDS)
    assert cudnn_calls(text) == (0, 0)
    assert kernel_names(text)["attention_forward"] == 1


def test_vmapped_cudnn_is_one_call() -> None:
    q, kv = half(3, *Q.shape), half(3, *KV.shape)
    assert cudnn_calls(lowered_text(jax.vmap(forward_and_backward), q, kv, kv, q)) == (1, 1)


@pytest.mark.parametrize(("names", "forwards"), [((), 2), (("attn_out",), 2), (("attn_out", "attn_lse"), 1)])
def test_a_policy_decides_whether_cudnn_runs_again(names: tuple[str, ...], forwards: int) -> None:
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def run(q, k, v, g):
        attend = jax.checkpoint(lambda q, k, v: attention(q, k, v, scale=0.1), policy=policy)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(g)

    assert cudnn_calls(lowered_text(run, Q, KV, KV, Q)) == (forwards, 1)


@pytest.mark.parametrize(
    ("q", "kv", "options", "choice", "reason"),
    [
        (Q, KV, {}, "cudnn", ""),
        (Q, KV, {"soft_cap": 30.0}, "pallas", "no soft cap"),
        (Q, KV, {"sinks": half(8)}, "pallas", "no sinks"),
        (Q, KV, {"segment_ids": IDS}, "pallas", "no segment ids"),
        (half(2, 256, 8, 60), half(2, 256, 2, 60), {}, "pallas", "multiple of 8 up to 256, not 60"),
        (jax.ShapeDtypeStruct(Q.shape, jnp.float32), jax.ShapeDtypeStruct(KV.shape, jnp.float32), {}, "pallas", "16"),
    ],
)
def test_what_cudnn_refuses_the_next_implementation_takes(q, kv, options, choice: str, reason: str) -> None:
    with h100():
        explanation = explain("attention", q, kv, kv, scale=0.1, **options)
    assert explanation.choice.implementation == choice
    assert reason in explanation.others.get("cudnn", "")


@pytest.mark.parametrize(("length", "choice"), [(255, "xla"), (256, "blocks")])
def test_long_rows_run_in_blocks_on_a_cpu(length: int, choice: str) -> None:
    q, kv = half(1, length, 8, 64), half(1, length, 2, 64)
    explanation = explain("attention", q, kv, kv, scale=0.1)
    assert explanation.choice.implementation == choice
    other = {"xla": "blocks", "blocks": "xla"}[choice]
    assert explanation.others[other] == f"{choice} is faster here"


def test_a_changed_jax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_cudnn._EXPECTED, "_dot_product_attention_fwd", ["query"])
    assert "other arguments" in str(attention_cudnn._refuses_jax.__wrapped__())
    monkeypatch.setattr(attention_cudnn, "_MODULE", "jax._src.cudnn.gone")
    assert "no cuDNN attention" in str(attention_cudnn._refuses_jax.__wrapped__())


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_empty_arrays(implementation: str, batch: int, length: int) -> None:
    q, kv = jnp.zeros((batch, length, 4, 8)), jnp.zeros((batch, length, 2, 8))
    ids = jnp.ones((batch, length), jnp.int32)
    attend = lambda q, k, v, sinks: attention(  # noqa: E731
        q, k, v, scale=1.0, segment_ids=ids, sinks=sinks, implementation=implementation
    )
    out, pull_back = jax.vjp(attend, q, kv, kv, jnp.ones(4))
    dq, dk, dv, dsinks = pull_back(out)
    assert out.shape == dq.shape == q.shape
    assert dk.shape == dv.shape == kv.shape
    np.testing.assert_array_equal(dsinks, np.zeros(4))


def test_empty_arrays_call_no_kernel() -> None:
    q, kv = half(2, 0, 8, 64), half(2, 0, 2, 64)
    assert "custom_call" not in lowered_text(forward_and_backward, q, kv, kv, q)
