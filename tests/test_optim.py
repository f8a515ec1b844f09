"""Schedules as Hugging Face computes them; AdamW with clipping against numpy; 8-bit AdamW against the op itself."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.errors import JaxftError
from jaxft.optim import MIN_PAGED_BYTES, Moments, Optimizer, Scheduler, adamw, adamw_8bit, optimizer, schedule
from pallas_kernels import adamw_8bit as quantized


def huggingface(kind: str, step: int, total: int, warmup: int) -> float:
    """The factor of transformers.optimization's get_{kind}_schedule_with_warmup."""
    if step < warmup:
        return step / max(1, warmup)
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    if kind == "inverse_sqrt":
        return 1 / math.sqrt((step + (warmup or 10_000) - warmup) / (warmup or 10_000))
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


@pytest.mark.parametrize(("total", "warmup"), [(11, 0), (11, 3), (7, 7), (5, 9), (1, 0), (1, 1)])
@pytest.mark.parametrize("kind", get_args(Scheduler))
def test_schedules(kind: Scheduler, total: int, warmup: int):
    found = schedule(kind, 3e-4, total_steps=total, warmup_steps=warmup)
    expected = [3e-4 * huggingface(kind, step, total, warmup) for step in range(total)]
    np.testing.assert_allclose([float(found(step)) for step in range(total)], expected, rtol=1e-5, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", get_args(Scheduler))
def test_the_formulas_are_transformers(kind: Scheduler):
    """What `huggingface` above says, against transformers itself."""
    import torch
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=11)
    for step in range(11):
        assert theirs.get_last_lr()[0] == pytest.approx(huggingface(kind, step, 11, 3))
        optimizer.step()
        theirs.step()


def test_an_unknown_schedule_is_named():
    with pytest.raises(JaxftError, match=r"lr_scheduler_type: 'polynomial' is not known.*linear, cosine, constant"):
        schedule("polynomial", 1e-3, total_steps=3, warmup_steps=0)


def numpy_adamw(w: np.ndarray, gradients: list[np.ndarray], rate: float, clip: float | None) -> np.ndarray:
    """Algorithm 2 of arXiv:1711.05101 with b1 0.8, b2 0.95, eps 1e-6, weight decay 0.1, in float64."""
    w, m, v = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape)
    for t, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        if clip:
            g = g * min(1.0, clip / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        w = w - rate * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6) + 0.1 * w)
    return w


@pytest.mark.parametrize("clip", [1.0, 100.0, 0.0, None])
def test_adamw(clip: float | None):
    rng = np.random.default_rng(0)
    w, *gradients = rng.standard_normal((4, 5, 3), np.float32)
    # The sizes differ, because what clips every gradient alike leaves Adam's steps as they are.
    gradients = [g * size for g, size in zip(gradients, (1.0, 5.0, 0.1), strict=True)]
    tx = adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, max_grad_norm=clip)
    params, state = jnp.asarray(w), tx.init(jnp.asarray(w))
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            updates, state = tx.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, numpy_adamw(w, gradients, 1e-2, clip), rtol=1e-5, atol=1e-6)
    other = numpy_adamw(w, gradients, 1e-2, None if clip == 1.0 else 1.0)
    assert np.abs(params - other).max() > 1e-4, "clipping does nothing here"


# 8-bit moments.

SETTINGS: dict[str, Any] = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
LARGE = (9, 512)  # 4608 values: 8-bit


def steps(tx: optax.GradientTransformation, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    """(parameters, state) after a jitted, donating step for each gradient."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def one(params, state, gradient):
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

    state = tx.init(params)
    params = jax.tree.map(jnp.copy, params)
    for gradient in gradients:
        params, state = one(params, state, gradient)
    return params, state


def randoms(*shape: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(values, dtype) for values in rng.standard_normal(shape, np.float32)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_8bit_is_the_op(weight_decay: float, dtype: Any):
    """The state bit for bit, the parameter to a rounding or two: XLA contracts product and difference in the op."""
    parameter, *gradients = randoms(4, *LARGE, dtype=dtype)
    tx = adamw_8bit(lambda count: 0.1 / (1 + count), weight_decay=weight_decay, max_grad_norm=None, **SETTINGS)
    got, state = steps(tx, parameter, gradients)

    want, moments = parameter, quantized.init(parameter)
    update = jax.jit(partial(quantized.update, weight_decay=weight_decay, implementation="xla", **SETTINGS))
    for t, gradient in enumerate(gradients, 1):
        want, moments = update(want, gradient, moments, step=t, learning_rate=0.1 / t)
    assert state.count == 3
    jax.tree.map(np.testing.assert_array_equal, state.moments, moments)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (got, want)), rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("shape", [(4095,), (5, 3), ()])
def test_small_leaves_have_float32_moments(shape: tuple[int, ...]):
    w, *gradients = randoms(4, *shape)
    tx = adamw_8bit(1e-2, weight_decay=0.1, max_grad_norm=1.0, **SETTINGS)
    got, (_, state) = steps(tx, w, gradients)
    assert isinstance(state.moments, Moments)
    expected = numpy_adamw(np.asarray(w), [np.asarray(g) for g in gradients], 1e-2, 1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_parameter_has_float32_updates():
    """A step that is smaller than half a rounding of p is lost at the addition only, not before it."""
    p = jnp.ones(LARGE, jnp.bfloat16)
    tx = adamw_8bit(1e-4, max_grad_norm=None)
    update, _ = tx.update(p, tx.init(p), p)
    assert update.dtype == jnp.float32
    np.testing.assert_allclose(update, -1e-4, rtol=1e-6)


def test_adamw_8bit_composes():
    """Under optax.partition with frozen leaves, and as the body of a scan."""
    large, small, frozen = randoms(1, *LARGE)[0], randoms(1, 7)[0], jnp.ones(3)
    params = {"large": large, "small": small, "frozen": frozen}
    kinds = {"large": "train", "small": "train", "frozen": "frozen"}
    inner = adamw_8bit(1e-2, max_grad_norm=None)
    tx = optax.partition({"train": inner, "frozen": optax.set_to_zero()}, kinds)
    gradients = [jax.tree.map(lambda leaf, i=i: leaf * (1 + i), params) for i in range(3)]
    got, _ = steps(tx, params, gradients)

    @jax.jit
    def scanned(params, gradients):
        def body(carry, gradient):
            params, state = carry
            updates, state = inner.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, inner.init(params)), gradients)[0]

    trained = {name: params[name] for name in ("large", "small")}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *({n: g[n] for n in trained} for g in gradients))
    want, state = scanned(trained, stacked)
    assert [type(state.moments[name]) for name in ("large", "small")] == [quantized.State, Moments]
    for name, expected in want.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-6)
        assert np.abs(got[name] - params[name]).max() > 0.02
    np.testing.assert_array_equal(got["frozen"], frozen)


def test_adamw_8bit_converges_as_adamw_does():
    """Least squares in 8192 unknowns."""
    target, start = randoms(2, 64, 128)
    curvature = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, (64, 128)), jnp.float32)

    def loss(w):
        return jnp.sum(curvature * (w - target) ** 2)

    def final(tx: optax.GradientTransformation) -> float:
        def body(carry, _):
            w, state = carry
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        run = jax.jit(lambda w: jax.lax.scan(body, (w, tx.init(w)), length=200)[0][0])
        return float(loss(run(start)) / loss(start))

    rate = schedule("linear", 0.1, total_steps=200, warmup_steps=10)
    exact, quantized_moments = final(adamw(rate)), final(adamw_8bit(rate))
    assert exact < 1e-3
    assert quantized_moments < 2e-3


def test_a_paged_state_is_in_host_memory_between_steps():
    """Large leaves only; the updates are the same bit for bit."""
    parameter, *gradients = randoms(3, 128, 128)
    assert parameter.nbytes >= MIN_PAGED_BYTES
    want, _ = steps(optimizer("adamw", 1e-2), parameter, gradients)
    got, state = steps(optimizer("paged_adamw", 1e-2), parameter, gradients)
    np.testing.assert_array_equal(got, want)
    places = {leaf.shape: leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
    assert places == {(128, 128): "pinned_host", (): jax.devices()[0].default_memory().kind}


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_optimizers_by_name(name: Optimizer):
    w, gradient = randoms(2, *LARGE)
    tx = optimizer(name, 1e-2, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    got, state = steps(tx, w, [gradient])
    codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]
    assert len(codes) == (2 if "8bit" in name else 0)
    # In a first step all of them but SGD go by the sign alone.
    norm = jnp.linalg.norm(gradient)
    direction = gradient / jnp.maximum(norm, 1) if name == "sgd" else jnp.sign(gradient)
    np.testing.assert_allclose(got, w - 1e-2 * direction, rtol=1e-3, atol=1e-4)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(JaxftError, match=r"optim: 'lion_8bit' is not known.*adamw_torch.*adamw_bnb_8bit"):
        optimizer("lion_8bit", 1e-3)
    with pytest.raises(ValueError, match="needs params"):
        adamw_8bit(1e-3).update(jnp.ones(3), adamw_8bit(1e-3).init(jnp.ones(3)))
