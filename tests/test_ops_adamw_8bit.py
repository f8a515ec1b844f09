"""adamw_8bit: maps and steps against bitsandbytes' numbers, codes against a search, kernel against reference."""

from __future__ import annotations

import doctest
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels import adamw_8bit
from pallas_kernels.adamw_8bit import ADAMW_8BIT, SIGNED, UNSIGNED, State

# Made by tests/vectors/make_adamw_8bit_vectors.py with bitsandbytes.
VECTORS = load_file(Path(__file__).parent / "vectors/adamw_8bit.safetensors")
SETTINGS = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# The default tier runs the kernel; the reference is what most of its checks compare with.
KERNEL_FIRST = (pytest.param("xla", marks=pytest.mark.slow), "pallas")


def midpoints(kind) -> np.ndarray:
    return (kind.values[:-1] + kind.values[1:]) / np.float32(2)


def nearest(scaled, kind):
    table = jnp.asarray(kind.midpoints)
    return jax.jit(lambda x: adamw_8bit._nearest(x, kind, lambda rank: table[rank]))(scaled)


def test_examples() -> None:
    assert doctest.testmod(adamw_8bit).failed == 0


def test_maps_are_bitsandbytes() -> None:
    np.testing.assert_array_equal(SIGNED.values, VECTORS["signed_map"])
    np.testing.assert_array_equal(UNSIGNED.values, VECTORS["unsigned_map"])


@pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_codes_are_those_of_a_search(kind) -> None:
    """Every midpoint, its two neighbours, every entry, and random values on a linear and a logarithmic scale."""
    rng = np.random.default_rng(0)
    edges = midpoints(kind)
    linear, decades = rng.random(20_000), 10 ** rng.uniform(-9, 0, 20_000)
    beside = [np.nextafter(edges, np.float32(side)) for side in (-9, 9)]
    values = np.concatenate([edges, *beside, kind.values, linear, decades]).astype(np.float32)
    values = np.concatenate([values, -values]) if kind.zero else values[values >= 0]
    np.testing.assert_array_equal(nearest(values, kind), np.searchsorted(edges, values))


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("whole", "zeros")), "partial"]
)
def test_steps_are_those_of_bitsandbytes(name: str, implementation: str) -> None:
    """Three steps, each from bitsandbytes' state before it.

    Its CPU search goes through a coarse table, so its codes are not always of the nearest entry (see the vectors'
    script): parameters and absmax are compared with it, codes with a search in numpy.
    """
    parameter = jnp.asarray(VECTORS[f"{name}.parameter"])
    state = adamw_8bit.init(parameter)
    for step in (1, 2, 3):
        want = {key: VECTORS[f"{name}.{step}.{key}"] for key in ("gradient", "parameter", *State._fields)}
        gradient = jnp.asarray(want["gradient"])
        before = state
        parameter, state = adamw_8bit.update(
            parameter, gradient, state, step=step, implementation=implementation, **SETTINGS
        )
        np.testing.assert_allclose(parameter, want["parameter"], rtol=3e-7, atol=3e-7)
        blocks = np.any(np.asarray(adamw_8bit._blocked(gradient)), axis=1)  # bitsandbytes gives zeros an absmax of 1
        for kind, moment in ((SIGNED, "m"), (UNSIGNED, "v")):
            exact = exact_moment(before, gradient, moment)
            absmax = np.max(np.abs(exact), axis=1)
            np.testing.assert_allclose(getattr(state, f"{moment}_absmax"), absmax, rtol=3e-7)
            np.testing.assert_allclose(want[f"{moment}_absmax"][blocks], absmax[blocks], rtol=3e-7)
            scaled = (exact / np.maximum(absmax, 1e-30)[:, None]).reshape(-1)[: gradient.size].astype(np.float32)
            codes = np.searchsorted(midpoints(kind), scaled).reshape(gradient.shape)
            different = codes != np.asarray(getattr(state, f"{moment}_codes"))
            assert np.sum(different) == 0, (moment, step)
        parameter = jnp.asarray(want["parameter"])
        state = State(*(jnp.asarray(want[key]) for key in State._fields))


def exact_moment(state: State, gradient, moment: str) -> np.ndarray:
    """[blocks, 256] float64: the moment after a step."""
    kind, b, power = (SIGNED, 0.9, 1) if moment == "m" else (UNSIGNED, 0.999, 2)
    codes = np.asarray(adamw_8bit._blocked(getattr(state, f"{moment}_codes")))
    old = kind.values.astype(np.float64)[codes] * np.asarray(getattr(state, f"{moment}_absmax"), np.float64)[:, None]
    new = b * old + (1 - b) * np.asarray(adamw_8bit._blocked(gradient), np.float64) ** power
    new.reshape(-1)[gradient.size :] = 0
    return new


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name == "partial block" else pytest.mark.slow)
        for case in ADAMW_8BIT.cases
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_kernel_gives_the_reference_s_codes(case, dtype) -> None:
    arguments = case.make(np.random.default_rng(0), dtype)
    step = {name: arguments.pop(name) for name in ("step", "learning_rate", "b1", "b2", "eps", "weight_decay")}
    got, want = (
        jax.jit(lambda *arrays, run=run: run.function(*arrays, **step))(*arguments.values())
        for run in ADAMW_8BIT.implementations.values()
    )
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[3], want[3])
    for index in (2, 4):
        np.testing.assert_allclose(got[index], want[index], rtol=3e-7)
    rtol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got[0].astype(jnp.float32), want[0].astype(jnp.float32), rtol=rtol, atol=3e-7)
    assert got[0].dtype == dtype


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_under_scan_and_vmap(implementation: str) -> None:
    rng = np.random.default_rng(0)
    parameters = jnp.asarray(rng.standard_normal((2, 3, 100)), jnp.float32)
    gradients = jnp.asarray(rng.standard_normal((2, 2, 3, 100)), jnp.float32)

    def train(parameter, gradients):
        def body(carry, inputs):
            step, gradient = inputs
            return adamw_8bit.update(
                carry[0], gradient, carry[1], step=step, implementation=implementation, **SETTINGS
            ), None

        return jax.lax.scan(body, (parameter, adamw_8bit.init(parameter)), (jnp.arange(1, 3), gradients))[0]

    got = jax.jit(jax.vmap(train, in_axes=(0, 1)))(parameters, gradients)
    for index in range(2):
        want = jax.jit(train)(parameters[index], gradients[:, index])
        jax.tree.map(lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_nothing_to_update(implementation: str) -> None:
    parameter = jnp.zeros((0, 4))
    got, state = adamw_8bit.update(
        parameter, parameter, adamw_8bit.init(parameter), step=1, learning_rate=0.1, implementation=implementation
    )
    assert got.shape == state.v_codes.shape == (0, 4)


def test_wrong_shapes_are_refused() -> None:
    parameter = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match="do not fit"):
        adamw_8bit.update(parameter, parameter[:1], adamw_8bit.init(parameter), step=1, learning_rate=0.1)
