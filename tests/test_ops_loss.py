"""linear_cross_entropy and selected_log_probs: no [tokens, vocabulary] array, nothing for what is not asked for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dense_references
from jaxpr_tools import all_avals, all_equations, computed_avals, max_elements
from pallas_kernels import explain, linear_cross_entropy, selected_log_probs
from pallas_kernels.linear_cross_entropy import default_chunk_size

N, V, D, CHUNK = 40, 200, 12, 8
# The default tier runs the kernel; the reference is what most of its checks compare with.
KERNEL_FIRST = (pytest.param("xla", marks=pytest.mark.slow), "pallas")


def batch() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """hidden, head, targets and weights with 11 active tokens."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((N, D), (V, D)))
    weights = np.zeros(N, np.float32)
    weights[rng.permutation(N)[:11]] = 1
    return hidden, head, jnp.asarray(rng.integers(0, V, N, np.int32)), jnp.asarray(weights)


def loss(hidden, head, targets, weights, chunk_size=CHUNK, implementation=None):
    return linear_cross_entropy(hidden, head, targets, weights, chunk_size=chunk_size, implementation=implementation)[0]


def selected_loss(hidden, head, targets, weights, chunk_size=CHUNK, implementation=None):
    """Every output of selected_log_probs with a cotangent of its own for each token."""
    outputs = selected_log_probs(hidden, head, targets, chunk_size=chunk_size, implementation=implementation)
    cotangents = np.random.default_rng(2).standard_normal((3, N)).astype(np.float32)
    return jnp.sum(weights * sum(jnp.asarray(g) * out for g, out in zip(cotangents, outputs, strict=True)))


def naive_loss(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(jnp.matmul(hidden, head.T, precision="highest"))
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0])


def as_float64(tree: Any) -> Any:
    """Float arrays as numpy float64, the rest as it is: for dense references (float32's products are TF32 on a GPU)."""
    is_float = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if is_float(x) else x, tree)


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("function", [loss, selected_loss])
def test_no_array_of_tokens_times_vocabulary(function: Any, implementation: str, argument: int) -> None:
    arguments = batch()
    gradient = jax.grad(functools.partial(function, implementation=implementation), argument)
    assert max_elements(all_avals(jax.make_jaxpr(gradient)(*arguments))) < N * V
    naive = jax.make_jaxpr(jax.grad(naive_loss, argument))(*arguments)
    assert max_elements(all_avals(naive)) >= N * V, "the check finds nothing where there is something"


@pytest.mark.parametrize("function", [loss, selected_loss])
def test_a_frozen_head_has_no_gradient_buffer(function: Any) -> None:
    def head_sized(argument: int) -> bool:
        jaxpr = jax.make_jaxpr(jax.grad(function, argument))(*batch())
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


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_ignored_targets_count_for_nothing(implementation: str) -> None:
    hidden, head, targets, weights = batch()
    run = functools.partial(linear_cross_entropy, chunk_size=CHUNK, implementation=implementation)
    run = jax.jit(jax.value_and_grad(run, (0, 3), has_aux=True))
    (want, weight_sum), gradients = run(hidden, head, targets, weights)
    spoiled = jnp.where(weights == 0, jnp.nan, 1.0)[:, None] * hidden
    (got, got_weight_sum), got_gradients = run(spoiled, head, jnp.where(weights == 0, -100, targets), jnp.ones(N))
    np.testing.assert_array_equal((got, got_weight_sum), (want, weight_sum))
    jax.tree.map(np.testing.assert_array_equal, got_gradients, gradients)


@pytest.mark.parametrize("function", [loss, pytest.param(selected_loss, marks=pytest.mark.slow)])
def test_kernels_under_vmap_and_scan(function: Any) -> None:
    hidden, head, targets, weights = batch()
    gradient = jax.value_and_grad(functools.partial(function, implementation="pallas"))
    two = jnp.stack([hidden, 2 * hidden])
    run = lambda hidden: gradient(hidden, head, targets, weights)  # noqa: E731
    want = jax.jit(jax.vmap(jax.value_and_grad(function), (0, None, None, None)))(two, head, targets, weights)
    for got in (jax.jit(jax.vmap(run))(two), jax.jit(lambda two: jax.lax.map(run, two))(two)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_huge_logits_stay_finite(implementation: str) -> None:
    """Logits of 1e4: exp overflows, the loss is a difference of two of them and the entropy is 0."""
    hidden, head, targets, weights = batch()
    hidden = hidden * jnp.float32(1e4)
    run = jax.jit(jax.value_and_grad(functools.partial(loss, implementation=implementation)))
    got = run(hidden, head, targets, weights)
    want = jax.jit(jax.value_and_grad(naive_loss))(hidden, head, targets, weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-3), got, want)
    run = jax.jit(functools.partial(selected_log_probs, implementation=implementation))
    outputs = run(hidden, head, targets)
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(dense_references.selected_log_probs, chunk_size=None))
        dense = run(*as_float64((hidden, head, targets)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-2), outputs, dense)


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_selected_target_out_of_range_spoils_its_own_log_probability_only(implementation: str) -> None:
    hidden, head, targets, _ = batch()
    wrong = targets.at[3].set(-100).at[5].set(V)

    def chosen(hidden, targets):
        log_probs, entropy, lse = selected_log_probs(hidden, head, targets, implementation=implementation)
        ok = (targets >= 0) & (targets < V)
        return jnp.sum(jnp.where(ok, log_probs, 0)) + jnp.sum(entropy + lse), log_probs

    gradient, log_probs = jax.jit(jax.grad(chosen, has_aux=True))(hidden, wrong)
    assert np.flatnonzero(np.isnan(log_probs)).tolist() == [3, 5]
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_no_tokens(implementation: str) -> None:
    hidden, head, targets, weights = (x[:0] if x.shape[0] == N else x for x in batch())
    value, d_head = jax.value_and_grad(functools.partial(loss, implementation=implementation), 1)(
        hidden, head, targets, weights
    )
    assert value == 0
    assert not d_head.any()
    outputs = selected_log_probs(hidden, head, targets, implementation=implementation)
    assert [out.shape for out in outputs] == [(0,)] * 3


def test_bfloat16_logits_are_rounded_once_and_written_over() -> None:
    """The kernel's loss of bfloat16 inputs: one [chunk, V] array, bfloat16; selected_log_probs has float32 logits."""
    hidden, head, targets, weights = (x.astype(jnp.bfloat16) if x.ndim == 2 else x for x in batch())

    def logits_of(function: Any) -> set[str]:
        gradient = jax.grad(functools.partial(function, implementation="pallas"))
        equations = all_equations(jax.make_jaxpr(gradient)(hidden, head, targets, weights))
        products: list[Any] = [
            equation.outvars[0].aval for equation in equations if equation.primitive.name == "dot_general"
        ]
        return {str(aval.dtype) for aval in products if aval.shape == (CHUNK, V)}

    assert logits_of(loss) == {"bfloat16"}
    assert logits_of(selected_loss) == {"float32"}


def test_explain_names_the_kernel() -> None:
    hidden, head, targets, weights = batch()
    on_this_machine = explain("linear_cross_entropy", hidden, head, targets, weights)
    chosen, other = ("xla", "pallas") if jax.default_backend() == "cpu" else ("pallas", "xla")
    assert on_this_machine.choice.implementation == chosen
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (hidden, head, targets))
    assert list(explain("selected_log_probs", *shapes).others) == [other]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"bias": jnp.zeros(V + 1)}, "bias"), ({"soft_cap": 0.0}, "soft_cap"), ({"chunk_size": 0}, "chunk_size")],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], words: str) -> None:
    hidden, head, targets, _ = batch()
    for function in (linear_cross_entropy, selected_log_probs):
        with pytest.raises(ValueError, match=words):
            function(hidden, head, targets, **wrong)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(hidden, head, targets, label_smoothing=2.0)


def test_default_chunk_size() -> None:
    assert default_chunk_size(3, 49152, "cpu") == 3
    assert default_chunk_size(4096, 49152, "cpu") == 128
    assert default_chunk_size(8192, 128256, "gpu") == 512
    assert default_chunk_size(10**6, 10**7, "gpu") == 128
    assert default_chunk_size(8192, 128256, "gpu", jnp.bfloat16) == 1024
