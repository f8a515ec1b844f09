"""Attention: documents do not leak into each other, padding is silent, and remat policies can keep what it names."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpr_tools import count_primitive
from lowering import h100, kernel_names, lowered_text
from pallas_kernels import attention, attention_cudnn, cached_attention, explain, segments

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


# cuDNN: what can be shown without a GPU. A stand-in for JAX's two primitives reads the offsets as cuDNN does.


class FakeCudnn:
    """One of the two primitives, in plain JAX; leaves NaN wherever cuDNN writes nothing."""

    def __init__(self, backward: bool) -> None:
        self.backward = backward

    def bind(self, q, k, v, bias, q_lengths, kv_lengths, q_offsets, kv_offsets, *rest, scale, **static):
        assert static.get("is_training", True)
        assert not any(x.size for x in (bias, *rest[:2]))
        options = {"scale": scale, "sliding_window": static["sliding_window_length"], "soft_cap": None}
        if not q_offsets.size:
            if self.backward:
                lse, out, g = rest[2:]
                return attention_module._xla_backward(q, k, v, None, None, out, lse, g, **options)[:3]
            return attention_module._xla_forward(q, k, v, None, None, **options)
        batch, length, num_heads, head_dim = q.shape
        sequences = q_lengths.size
        first = q_offsets.reshape(-1)[:sequences, None] // (num_heads * head_dim)
        stop = first + q_lengths.reshape(-1)[:, None]
        tokens = jnp.arange(batch * length, dtype=jnp.int32)[None, :]
        mine = (tokens >= first) & (tokens < stop)  # [sequences, B * T]
        number = jnp.arange(1, sequences + 1, dtype=jnp.int32)[:, None]
        ids = jnp.max(jnp.where(mine, number, 0), axis=0).reshape(batch, length)
        index = jnp.max(jnp.where(mine, tokens - first, 0), axis=0).reshape(batch, 1, length)
        place = (jnp.maximum(ids - 1, 0)[:, None, :], jnp.arange(num_heads, dtype=jnp.int32)[None, :, None], index)
        empty = (ids == 0)[:, :, None, None]
        if self.backward:
            lse, out, g = rest[2:]
            assert lse.shape == (sequences, num_heads, length)
            zeroed = [jnp.where(empty, 0, x) for x in (q, k, v, out, g)]
            results = attention_module._xla_backward(
                *zeroed[:3], ids, None, zeroed[3], lse[place], zeroed[4], **options
            )
            return [jnp.where(empty, jnp.nan, x) for x in results[:3]]
        out, lse = attention_module._xla_forward(q, k, v, ids, None, **options)
        heads = place[1]
        # Padding goes to no place: its index is out of bounds.
        slots = (jnp.where(ids == 0, sequences, ids - 1)[:, None, :], heads, index)
        dense = jnp.full((sequences, num_heads, length), jnp.nan).at[slots].set(lse, mode="drop")
        return jnp.where(empty, jnp.nan, out), dense


@pytest.fixture
def fake_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(attention_cudnn._MODULE)
    monkeypatch.setattr(module, "_dot_product_attention_fwd_p", FakeCudnn(backward=False))
    monkeypatch.setattr(module, "_dot_product_attention_bwd_p", FakeCudnn(backward=True))


PACKED = np.array([[7] * 3 + [2] * 6 + [5] + [0] * 3, [1] * 13, [0] * 13, [0, 0, 4, 4, 4, 0, 9, 9, 9, 1, 1, 1, 1]])
PACKED = PACKED.astype(np.int32)
OPTIONS = {"scale": 0.3, "sliding_window": None, "soft_cap": None}


def arrays_for(ids: np.ndarray, *, heads: int = 4, kv_heads: int = 2) -> tuple[jax.Array, ...]:
    """q, k, v, g for [..., T] ids."""
    rng = np.random.default_rng(1)
    sizes = (heads, kv_heads, kv_heads, heads)
    return tuple(jnp.asarray(rng.standard_normal((*ids.shape, n, 8)).astype(np.float32)) for n in sizes)


def both_directions(implementation, segment_ids, q, k, v, g):
    out, lse = implementation.forward(q, k, v, segment_ids, None, **OPTIONS)
    return out, *implementation.backward(q, k, v, segment_ids, None, out, lse, g, **OPTIONS)[:3]


@pytest.mark.parametrize("max_segments", [3, 6])
def test_packed_cudnn_equals_the_reference_and_padding_is_zero(fake_cudnn: None, max_segments: int) -> None:
    arrays = arrays_for(PACKED)
    packed = segments(jnp.asarray(PACKED), max_segments)
    results = both_directions(attention_cudnn, packed, *arrays)
    expected = both_directions(attention_module._KERNELS["xla"], packed.ids, *arrays)
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)
        assert (np.asarray(x)[PACKED == 0] == 0).all()


def test_cudnn_under_vmap_joins_the_batch(fake_cudnn: None) -> None:
    ids = np.stack([PACKED[:2], PACKED[2:]])
    q, k, v, g = arrays_for(ids)
    packed = jax.vmap(lambda ids: segments(ids, 3))(jnp.asarray(ids))
    run = lambda segment_ids, q, k, v, g: both_directions(attention_cudnn, segment_ids, q, k, v, g)  # noqa: E731
    results = jax.vmap(run, in_axes=(0, 0, None, 0, 0))(packed, q, k[0], v, g)
    plain = jax.vmap(run, in_axes=(None, 0, 0, 0, None))(None, q, k, v, g[0])
    for i in range(2):
        one = segments(jnp.asarray(ids[i]), 3)
        for x, y in zip(results, run(one, q[i], k[0], v[i], g[i]), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)
        for x, y in zip(plain, run(None, q[i], k[i], v[i], g[0]), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


def test_segments_describe_the_documents() -> None:
    packed = segments(jnp.asarray(PACKED), 4)
    assert packed.offsets.shape == (4, 5)
    runs = [(offset, n) for offset, n in zip(packed.offsets.ravel(), packed.lengths.ravel(), strict=False) if n]
    assert runs == [(0, 3), (3, 6), (9, 1), (13, 13), (41, 3), (45, 3), (48, 4)]
    assert (packed.offsets.ravel()[len(runs) :] == PACKED.size).all()


@pytest.mark.parametrize(
    ("ids", "valid"),
    [([1, 2, 3, 0], True), ([0, 0, 0, 0], True), ([1, 0, 1, 1], False), ([1, 2, 1, 0], False), ([1, 2, 3, 4], False)],
)
def test_ids_that_offsets_cannot_say_are_found(ids: list[int], valid: bool) -> None:
    rows = jnp.array([[1, 1, 1, 1], ids], jnp.int32)
    assert bool(jax.jit(lambda ids: segments(ids, 3))(rows).valid) == valid
    if valid:
        segments(rows, 3)
    else:
        with pytest.raises(ValueError, match="row 1 has more than 3"):
            segments(rows, 3)


@pytest.mark.parametrize("bad", [jnp.zeros((4,), jnp.int32), jnp.zeros((1, 4), jnp.float32)])
def test_segments_refuses_what_is_no_ids(bad: jax.Array) -> None:
    with pytest.raises(ValueError, match="int32"):
        segments(bad, 2)


@pytest.mark.parametrize(("ids", "uses_cudnn"), [([1, 1, 2, 2, 0], True), ([1, 2, 1, 2, 0], False)])
def test_invalid_ids_never_reach_cudnn(
    fake_cudnn: None, monkeypatch: pytest.MonkeyPatch, ids: list[int], uses_cudnn: bool
) -> None:
    """The stand-in's output is doubled, so that it shows which branch ran."""
    honest = FakeCudnn.bind

    def doubled(self, *args, **kwargs):
        out, *rest = honest(self, *args, **kwargs)
        return 2 * out, *rest

    monkeypatch.setattr(FakeCudnn, "bind", doubled)
    rows = np.array([ids], np.int32)
    q, k, v, _ = arrays_for(rows)
    facts = {"scale": 0.3, "sliding_window": None, "soft_cap": None}
    run = lambda ids: attention_module._run("forward", "cudnn", segments(ids, 3), (q, k, v, None), facts)[0]  # noqa: E731
    expected = attention(q, k, v, scale=0.3, segment_ids=jnp.asarray(rows), implementation="xla")
    factor = 2 if uses_cudnn else 1
    np.testing.assert_allclose(jax.jit(run)(jnp.asarray(rows)), factor * expected, rtol=1e-5, atol=1e-6)


def half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


Q, KV = half(2, 256, 8, 64), half(2, 256, 2, 64)
IDS = jax.ShapeDtypeStruct((2, 256), jnp.int32)


def forward_and_backward(q, k, v, g, ids=None, **options):
    packed = None if ids is None else segments(ids, 4)
    attend = lambda q, k, v: attention(q, k, v, scale=0.125, segment_ids=packed, **options)  # noqa: E731
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, pull_back(g)


def cudnn_calls(text: str) -> tuple[int, int]:
    return text.count("@__cudnn$fmhaSoftmax("), text.count("@__cudnn$fmhaSoftmaxBackward(")


def test_cudnn_is_in_the_program_for_a_gpu() -> None:
    text = lowered_text(functools.partial(forward_and_backward, sliding_window=100), Q, KV, KV, Q)
    assert cudnn_calls(text) == (1, 1)
    assert text.count(r"\22sliding_window_length\22: 100") == 2
    assert not kernel_names(text)


def test_packed_cudnn_and_what_stands_in_for_it_are_in_the_program() -> None:
    text = lowered_text(forward_and_backward, Q, KV, KV, Q, IDS)
    assert cudnn_calls(text) == (1, 1)
    assert text.count(r"\22max_seg_per_batch\22: 4") == 2
    names = kernel_names(text)
    assert names["zero_attention_padding"] == 2
    assert names["attention_forward"] == 1


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
        (Q, KV, {"segment_ids": IDS}, "pallas", "max_segments"),
        (half(2, 256, 8, 60), half(2, 256, 2, 60), {}, "pallas", "multiple of 8 up to 256, not 60"),
        (jax.ShapeDtypeStruct(Q.shape, jnp.float32), jax.ShapeDtypeStruct(KV.shape, jnp.float32), {}, "pallas", "16"),
    ],
)
def test_what_cudnn_refuses_the_next_implementation_takes(q, kv, options, choice: str, reason: str) -> None:
    with h100():
        explanation = explain("attention", q, kv, kv, scale=0.1, **options)
    assert explanation.choice.implementation == choice
    assert reason in explanation.others.get("cudnn", "")


def test_packed_offsets_beyond_int32_are_refused() -> None:
    ids = jax.ShapeDtypeStruct((1, 2**19), jnp.int32)
    packed = jax.eval_shape(lambda ids: segments(ids, 2), ids)
    q, kv = half(1, 2**19, 32, 128), half(1, 2**19, 8, 128)
    with h100():
        explanation = explain("attention", q, kv, kv, scale=0.1, segment_ids=packed)
    assert "int32" in explanation.others["cudnn"]


def test_a_changed_jax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_cudnn._EXPECTED, "_dot_product_attention_fwd", ["query"])
    assert "other arguments" in str(attention_cudnn._refuses_jax.__wrapped__())
    monkeypatch.setattr(attention_cudnn, "_MODULE", "jax._src.cudnn.gone")
    assert "no cuDNN attention" in str(attention_cudnn._refuses_jax.__wrapped__())


@pytest.mark.parametrize("sinks", [False, True])
def test_empty_arrays(sinks: bool) -> None:
    q, kv = jnp.zeros((2, 0, 4, 8)), jnp.zeros((2, 0, 2, 8))
    logits = jnp.zeros((4,)) if sinks else None
    out, pull_back = jax.vjp(lambda q: attention(q, kv, kv, scale=1.0, sinks=logits), q)
    assert out.shape == pull_back(out)[0].shape == q.shape
