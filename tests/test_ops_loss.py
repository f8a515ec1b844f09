"""linear_cross_entropy: no [tokens, vocabulary] array, nothing for ignored tokens, nothing for a frozen head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpr_tools import all_avals, computed_avals, max_elements
from pallas_kernels import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import default_chunk_size

N, V, D, CHUNK = 40, 200, 12, 8


def batch() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """hidden, head, targets and weights with 11 active tokens."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((N, D), (V, D)))
    weights = np.zeros(N, np.float32)
    weights[rng.permutation(N)[:11]] = 1
    return hidden, head, jnp.asarray(rng.integers(0, V, N, np.int32)), jnp.asarray(weights)


def loss(hidden, head, targets, weights, chunk_size=CHUNK):
    return linear_cross_entropy(hidden, head, targets, weights, chunk_size=chunk_size)[0]


def naive_loss(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(jnp.matmul(hidden, head.T, precision="highest"))
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0])


@pytest.mark.parametrize("argument", [0, 1])
def test_no_array_of_tokens_times_vocabulary(argument: int) -> None:
    arguments = batch()
    assert max_elements(all_avals(jax.make_jaxpr(jax.grad(loss, argument))(*arguments))) < N * V
    naive = jax.make_jaxpr(jax.grad(naive_loss, argument))(*arguments)
    assert max_elements(all_avals(naive)) >= N * V, "the check finds nothing where there is something"


def test_a_frozen_head_has_no_gradient_buffer() -> None:
    def head_sized(argument: int) -> bool:
        jaxpr = jax.make_jaxpr(jax.grad(loss, argument))(*batch())
        return any(aval.shape == (V, D) for aval in computed_avals(jaxpr))

    assert not head_sized(0)
    assert head_sized(1), "the check finds nothing where there is something"


def test_ignored_tokens_may_hold_anything() -> None:
    hidden, head, targets, weights = batch()
    ignored = weights == 0
    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head, targets, weights)
    spoiled = jnp.where(ignored[:, None], jnp.nan, hidden), head, jnp.where(ignored, -100, targets), weights
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(*spoiled)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_ignored_tokens_are_not_computed() -> None:
    """A NaN head spoils every chunk that is run; with nothing active none is."""
    hidden, head, targets, weights = batch()
    nan_head = jnp.full_like(head, jnp.nan)
    value, gradient = jax.jit(jax.value_and_grad(loss))(hidden, nan_head, targets, jnp.zeros_like(weights))
    assert value == 0
    assert not gradient.any()
    assert jnp.isnan(jax.jit(loss)(hidden, nan_head, targets, weights))


def test_target_out_of_range_is_loud() -> None:
    hidden, head, targets, weights = batch()
    run = jax.jit(loss)
    for wrong in (-1, V):
        assert jnp.isnan(run(hidden, head, jnp.full_like(targets, wrong), weights))


def test_chunk_size_does_not_change_the_result() -> None:
    want = jax.jit(jax.value_and_grad(naive_loss))(*batch())
    for chunk_size in (1, 1000):
        got = jax.jit(jax.value_and_grad(loss), static_argnums=4)(*batch(), chunk_size)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


def test_weights_are_one_by_default() -> None:
    hidden, head, targets, _ = batch()
    run = jax.jit(lambda *arguments: linear_cross_entropy(*arguments, chunk_size=CHUNK))
    loss_sum, weight_sum = run(hidden, head, targets)
    np.testing.assert_allclose(loss_sum, naive_loss(hidden, head, targets, jnp.ones(N)), rtol=1e-6)
    assert weight_sum == N


def test_an_unused_loss_has_zero_gradients() -> None:
    hidden, head, targets, weights = batch()
    weight_sum = lambda hidden: linear_cross_entropy(hidden, head, targets, weights, chunk_size=CHUNK)[1]  # noqa: E731
    assert not jax.jit(jax.grad(weight_sum))(hidden).any()


def test_default_chunk_size() -> None:
    assert default_chunk_size(3, 49152, "cpu") == 3
    assert default_chunk_size(4096, 49152, "cpu") == 128
    assert default_chunk_size(8192, 128256, "gpu") == 512
    assert default_chunk_size(10**6, 10**7, "gpu") == 128
