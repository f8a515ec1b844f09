"""Arrays of more than 2^31 elements: every op's index arithmetic, on a GPU with 80 GB (`pytest -m gpu`).

An array here repeats one period of rows, so what an op makes of it repeats too and one period of the result is computed
alone. The period is odd: an index that overflows lands on another row of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

pytestmark = pytest.mark.gpu

PERIOD, COPIES, WIDTH = 1025, 513, 4096  # 2.15e9 elements
HEADS, HEAD_DIM = 32, 128


class Large(NamedTuple):
    """A call whose arguments are one period; `repeated` names those that are given COPIES times along axis 0.

    Attributes:
      run: keyword arguments -> an array or arrays, each repeating as the arguments do.
      arguments: one period.
      repeated: what is repeated; the rest is given as it is.
      differentiable: which of `repeated` to differentiate.
    """

    run: Callable[..., Any]
    arguments: dict[str, Any]
    repeated: tuple[str, ...]
    differentiable: tuple[str, ...] = ()


def random(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)


def rms_norm() -> Large:
    arguments = {"x": random(0, PERIOD, WIDTH), "weight": random(1, WIDTH)}
    return Large(lambda x, weight: pk.rms_norm(x, weight, eps=1e-5), arguments, ("x",), ("x",))


def add_rms_norm() -> Large:
    arguments = {"x": random(0, PERIOD, WIDTH), "residual": random(2, PERIOD, WIDTH), "weight": random(1, WIDTH)}
    return Large(lambda **a: pk.add_rms_norm(**a, eps=1e-5), arguments, ("x", "residual"), ("x", "residual"))


def gated_activation() -> Large:
    arguments = {"gate": random(0, PERIOD, WIDTH), "up": random(1, PERIOD, WIDTH)}
    run = lambda gate, up: pk.gated_activation(gate, up, implementation="pallas")  # noqa: E731
    return Large(run, arguments, ("gate", "up"), ("gate", "up"))


def rope() -> Large:
    angles = jax.random.normal(jax.random.key(3), (1, PERIOD, HEAD_DIM // 2))
    arguments = {
        "q": random(0, 1, PERIOD, HEADS, HEAD_DIM),
        "k": random(1, 1, PERIOD, HEADS // 4, HEAD_DIM),
        "cos": jnp.cos(angles),
        "sin": jnp.sin(angles),
    }
    return Large(pk.rope, arguments, ("q", "k", "cos", "sin"), ("q", "k"))


def attention() -> Large:
    arguments = {
        "q": random(0, 1, PERIOD, HEADS, HEAD_DIM),
        "k": random(1, 1, PERIOD, HEADS // 4, HEAD_DIM),
        "v": random(2, 1, PERIOD, HEADS // 4, HEAD_DIM),
        "segment_ids": jnp.asarray(1 + np.arange(PERIOD)[None] // 400, jnp.int32),
    }
    run = lambda **a: pk.attention(**a, scale=HEAD_DIM**-0.5, implementation="pallas")  # noqa: E731
    return Large(run, arguments, ("q", "k", "v", "segment_ids"), ("q", "k", "v"))


def nf4_dequantize() -> Large:
    codes = jax.random.bits(jax.random.key(0), (PERIOD, WIDTH // 2), jnp.uint8)
    absmax = jax.random.uniform(jax.random.key(1), (PERIOD * WIDTH // 64,), minval=0.5)
    run = lambda codes, absmax: pk.nf4.dequantize(codes, absmax, dtype=jnp.bfloat16, implementation="pallas")  # noqa: E731
    return Large(run, {"codes": codes, "absmax": absmax}, ("codes", "absmax"))


def adamw_8bit() -> Large:
    state = pk.adamw_8bit.init(jnp.zeros((PERIOD, WIDTH)))
    arguments = {"parameter": random(0, PERIOD, WIDTH), "gradient": random(1, PERIOD, WIDTH), **state._asdict()}

    def run(parameter: jax.Array, gradient: jax.Array, **moments: jax.Array) -> Any:
        old = pk.adamw_8bit.State(**moments)
        return pk.adamw_8bit.update(parameter, gradient, old, step=1, learning_rate=0.1)

    return Large(run, arguments, tuple(arguments))


def linear_cross_entropy() -> Large:
    arguments = {
        "hidden": random(0, PERIOD, WIDTH),
        "head": random(1, 96, WIDTH, scale=0.02),
        "targets": jnp.asarray(np.arange(PERIOD) % 96, jnp.int32),
    }

    def gradient(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return jax.grad(lambda hidden: pk.linear_cross_entropy(hidden, head, targets)[0])(hidden)

    return Large(gradient, arguments, ("hidden", "targets"))


def selected_log_probs() -> Large:
    case = linear_cross_entropy()
    return Large(pk.selected_log_probs, case.arguments, case.repeated, ("hidden",))


def grouped_matmul() -> Large:
    arguments = {
        "x": random(0, PERIOD, WIDTH),
        "weight": random(1, 1, 128, WIDTH, scale=0.02),
        "group_sizes": jnp.asarray([PERIOD], jnp.int32),
        "lora_A": random(2, 1, 16, WIDTH, scale=0.02),
        "lora_B": random(3, 1, 128, 16),
    }
    run = lambda **a: pk.grouped_matmul(**a, implementation="pallas")  # noqa: E731
    return Large(run, arguments, tuple(arguments), ("x", "lora_A", "lora_B"))


CASES = (
    rms_norm,
    add_rms_norm,
    gated_activation,
    rope,
    attention,
    nf4_dequantize,
    adamw_8bit,
    linear_cross_entropy,
    selected_log_probs,
    grouped_matmul,
)


def results(case: Large, arguments: dict[str, Any]) -> Any:
    """The call's result and, for a cotangent of the result itself, the gradients."""

    def run(arguments: dict[str, Any]) -> Any:
        inputs = {name: arguments[name] for name in case.differentiable}
        if not inputs:
            return case.run(**arguments)
        out, pull_back = jax.vjp(lambda inputs: case.run(**(arguments | inputs)), inputs)
        return out, pull_back(out)

    return jax.jit(run)(arguments)


@jax.jit
def furthest(large: jax.Array, one: jax.Array) -> jax.Array:
    """The largest difference of any period from the one, over the one's largest value; NaN where something is NaN."""
    periods = large.reshape(COPIES, *one.shape)
    difference = jnp.abs(periods.astype(jnp.float32) - one.astype(jnp.float32)[None])
    return jnp.max(difference) / jnp.max(jnp.abs(one.astype(jnp.float32)))


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_every_period_of_a_large_array_is_right(make: Callable[[], Large]) -> None:
    case = make()
    one = results(case, case.arguments)
    repeat = jax.jit(lambda x: jnp.tile(x, (COPIES, *[1] * (x.ndim - 1))))
    large = {name: repeat(x) if name in case.repeated else x for name, x in case.arguments.items()}
    for got, want in zip(jax.tree.leaves(results(case, large)), jax.tree.leaves(one), strict=True):
        assert furthest(got, want) <= 4 * float(jnp.finfo(jnp.bfloat16).eps)


def test_the_last_layer_of_a_stack_of_codes_is_right() -> None:
    layers, rows = 80, 14336  # 2.35e9 bytes of codes
    one = jax.random.bits(jax.random.key(0), (rows, WIDTH // 2), jnp.uint8)
    other = jax.random.bits(jax.random.key(1), (rows, WIDTH // 2), jnp.uint8)
    codes = jnp.concatenate([jnp.broadcast_to(other, (layers - 1, *other.shape)), one[None]])
    absmax = jnp.ones((layers, rows * WIDTH // 64), jnp.float32)
    got = pk.nf4.dequantize(codes, absmax, dtype=jnp.bfloat16, layer=layers - 1)
    np.testing.assert_array_equal(got, pk.nf4.dequantize(one, absmax[0], dtype=jnp.bfloat16, implementation="xla"))


def test_the_last_experts_of_a_stack_are_right() -> None:
    layers, shape = 24, (32, 2880, 1440)  # 3.2e9 bytes of codes, as gpt-oss-20b has
    one, other = (jax.random.bits(jax.random.key(i), shape, jnp.uint8) for i in range(2))
    codes = jnp.concatenate([jnp.broadcast_to(other, (layers - 1, *shape)), one[None]])
    scales = 100 + codes[..., ::16] % 40
    got = pk.mxfp4.dequantize(codes, scales, dtype=jnp.bfloat16, layer=layers - 1)
    want = pk.mxfp4.dequantize(one, scales[-1], dtype=jnp.bfloat16, implementation="xla")
    np.testing.assert_array_equal(got, want)


def test_the_8_bit_update_of_so_many_parameters_is_not_the_kernels() -> None:
    """Its codes are bytes, with offsets of 32 bits up to 2^32 of them."""
    shape = jax.ShapeDtypeStruct((PERIOD * COPIES, WIDTH), jnp.bfloat16)
    reason = pk.OPS["adamw_8bit"].refuses("pallas", shape)
    assert reason is not None
    assert "fewer than 2^31" in reason
