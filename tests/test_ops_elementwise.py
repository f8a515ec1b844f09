"""RMSNorm, RoPE and gated activation beyond what tests/test_ops.py shows of every op."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpr_tools import computed_avals, residual_avals
from lowering import kernel_names, lowered_text
from pallas_kernels import add_rms_norm, gated_activation, gated_activation_backward, rms_norm, rope
from pallas_kernels.gated_activation import Kind
from pallas_kernels.gated_activation import _kernel_call as gated_kernel_call
from pallas_kernels.gated_activation import _Tiling as GatedTiling
from pallas_kernels.rms_norm import _kernel_call as norm_kernel_call
from pallas_kernels.rms_norm import _Norm
from pallas_kernels.rope import _kernel_call as rope_kernel_call
from pallas_kernels.rope import _Tiling as RopeTiling

EPS = 1e-5
EXACT = 2e-6  # some roundings of float32 values around 1
IMPLEMENTATIONS = ("xla", "pallas")
# The default tier runs the kernel; the reference is what most of its checks compare with.
KERNEL_FIRST = (pytest.param("xla", marks=pytest.mark.slow), "pallas")


def normals(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes]


def gradients(function: Any, *arguments: jax.Array) -> Any:
    """Of the sum of sines, so that every element's cotangent is another."""

    def loss(*arguments: jax.Array) -> jax.Array:
        return sum((jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(*arguments))), jnp.float32(0))

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)


def assert_close(got: Any, want: Any, tolerance: float = EXACT) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.parametrize("rows", [*(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 5, 12)), 13])
def test_weight_gradient_of_programs_that_take_several_blocks(rows: int) -> None:
    """Two rows a block and three programs: fewer blocks than programs, whole and ragged rounds."""
    x, weight = normals((rows, 24), (24,))
    norm = _Norm(EPS, 0.0, elements=64, weight_programs=3)
    want = gradients(functools.partial(rms_norm, eps=EPS, implementation="xla"), x, weight)
    assert_close(gradients(lambda x, weight: norm_kernel_call(x, weight, norm), x, weight), want, 1e-5)


def test_frozen_weight_costs_no_gradient() -> None:
    x, weight = normals((6, 4096), (4096,))
    norm = functools.partial(rms_norm, eps=EPS, implementation="pallas")

    def partial_sums(function: Any) -> int:
        avals = computed_avals(jax.make_jaxpr(function)(x, weight))
        return sum(getattr(aval, "shape", ()) == (6, 4096) and aval.dtype == jnp.float32 for aval in avals)

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(norm(x.astype(jnp.bfloat16), weight))

    frozen, trained = jax.grad(loss), jax.grad(loss, argnums=(0, 1))
    assert partial_sums(trained) > partial_sums(frozen)
    checkpointed = jax.grad(jax.checkpoint(loss))
    assert kernel_names(lowered_text(frozen, x, weight)) == {"rms_norm_forward": 1, "rms_norm_backward": 1}
    assert kernel_names(lowered_text(checkpointed, x, weight))["rms_norm_backward"] == 1


def test_norms_keep_one_float_a_row() -> None:
    x, residual, weight = normals((2, 3, 64), (2, 3, 64), (64,), dtype=jnp.bfloat16)
    kept = residual_avals(functools.partial(rms_norm, eps=EPS, implementation="pallas"), x, weight)
    assert sorted(aval.shape for aval in kept) == [(2, 3, 64), (6,), (64,)]
    kept = residual_avals(functools.partial(add_rms_norm, eps=EPS, implementation="pallas"), x, residual, weight)
    assert sorted(aval.shape for aval in kept) == [(2, 3, 64), (6,), (64,)]


@pytest.mark.parametrize("used", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_add_rms_norm_with_one_result_unused(used: int) -> None:
    arguments = normals((3, 40), (3, 40), (40,))
    got, want = (
        gradients(lambda *args, name=name: add_rms_norm(*args, eps=EPS, implementation=name)[used], *arguments)
        for name in ("pallas", "xla")
    )
    assert_close(got, want)
    assert used == 0 or not np.any(got[2])


def test_add_rms_norm_takes_the_norm_of_the_rounded_sum() -> None:
    x, residual, weight = normals((3, 512), (3, 512), (512,), dtype=jnp.bfloat16)
    for implementation in IMPLEMENTATIONS:
        normed, s = add_rms_norm(x, residual, weight, eps=EPS, implementation=implementation)
        assert np.array_equal(s, x + residual)
        assert np.array_equal(normed, rms_norm(x + residual, weight, eps=EPS, implementation=implementation))


@pytest.mark.parametrize(
    "tokens", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_rope_programs_of_several_tokens(tokens: int) -> None:
    q, k, angle = normals((1, 7, 3, 12), (1, 7, 1, 12), (1, 7, 5))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    want = gradients(lambda q, k: rope(q, k, cos, sin, implementation="xla"), q, k)
    assert_close(gradients(lambda q, k: rope_kernel_call(q, k, cos, sin, RopeTiling(tokens)), q, k), want)


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_rope_passes_the_rest_through_and_gives_angles_no_gradient(implementation: str) -> None:
    q, k, angle = normals((1, 4, 2, 16), (1, 4, 1, 16), (1, 4, 3))
    rotated, _ = rope(q, k, jnp.cos(angle), jnp.sin(angle), implementation=implementation)
    assert np.array_equal(rotated[..., 6:], q[..., 6:])
    assert not np.array_equal(rotated[..., :6], q[..., :6])
    of_angles = gradients(lambda cos, sin: rope(q, k, cos, sin, implementation=implementation), angle, angle)
    assert not any(np.any(gradient) for gradient in of_angles)


def test_one_kernel_in_place_each_way() -> None:
    q, k, angle = normals((1, 8, 4, 64), (1, 8, 2, 64), (1, 8, 32))

    def turned(q: jax.Array, k: jax.Array) -> Any:
        return gradients(lambda q, k: rope(q, k, angle, angle), q, k)

    text = lowered_text(turned, q, k)
    assert kernel_names(text) == {"rope": 2}
    assert text.count("output_operand_alias<") == 4

    gate, up = normals((4, 4096), (4, 4096))
    gated = functools.partial(gated_activation, implementation="pallas")
    text = lowered_text(lambda gate, up: gradients(gated, gate, up), gate, up)
    assert kernel_names(text) == {"gated_activation_forward": 1, "gated_activation_backward": 1}
    assert text.count("output_operand_alias<") == 2


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_gelu_is_exact_into_the_tails(implementation: str) -> None:
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    ones = jnp.ones(x.shape)
    got = np.asarray(gated_activation(jnp.asarray(x), ones, activation="gelu", implementation=implementation))
    want = np.asarray([v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.astype(np.float64)])
    np.testing.assert_allclose(got, want, rtol=5e-7, atol=5e-7)
    if implementation == "pallas":  # its lower tail is relatively accurate too, as far as exp of a rounded square is
        np.testing.assert_allclose(got[x < 0], want[x < 0], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_gradient_at_the_limit_is_that_of_an_unclamped_value(implementation: str) -> None:
    gate, up = jnp.array([7.0, 7.0, 8.0, -8.0, 1.0]), jnp.array([7.0, -7.0, 3.0, 3.0, -7.5])
    act = functools.partial(gated_activation, activation="clamped_swiglu", implementation=implementation)
    d_gate, d_up = jax.grad(lambda gate, up: jnp.sum(act(gate, up)), argnums=(0, 1))(gate, up)
    assert np.array_equal(d_gate != 0, [True, True, False, True, True])
    assert np.array_equal(d_up != 0, [True, True, True, True, False])


@pytest.mark.parametrize(
    "activation",
    ["gelu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("silu", "gelu_pytorch_tanh", "clamped_swiglu"))],
)
def test_large_values_overflow_nowhere(activation: str) -> None:
    gate, up = jnp.array([[-1e4, -200.0, 0.0, 200.0, 1e4]]), jnp.ones((1, 5))
    for implementation in IMPLEMENTATIONS:
        results = gated_activation_backward(gate, up, up, activation, implementation=implementation)
        assert all(np.all(np.isfinite(result)) for result in results)


@pytest.mark.parametrize("block", [pytest.param(64, marks=pytest.mark.slow), 128])
def test_gated_blocks_that_do_and_do_not_divide(block: int) -> None:
    gate, up = normals((2, 96), (2, 96))
    call = functools.partial(gated_kernel_call, kind=Kind("silu", 1.0, 1.0), tiling=GatedTiling(block))
    assert_close(
        gradients(call, gate, up), gradients(functools.partial(gated_activation, implementation="xla"), gate, up)
    )


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_no_rows(implementation: str) -> None:
    x, weight = jnp.ones((0, 3, 8)), jnp.ones(8)
    d_x, d_weight = gradients(functools.partial(rms_norm, eps=EPS, implementation=implementation), x, weight)
    assert d_x.shape == x.shape
    assert not np.any(d_weight)
    assert gated_activation(x, x, implementation=implementation).shape == x.shape
    q, angle = jnp.ones((2, 0, 4, 8)), jnp.ones((2, 0, 4))
    assert rope(q, q, angle, angle, implementation=implementation)[1].shape == q.shape


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = jnp.ones((2, 8))
    with pytest.raises(ValueError, match=r"rms_norm: x \(2, 8\) and weight \(4,\) do not fit"):
        rms_norm(x, jnp.ones(4), eps=EPS)
    with pytest.raises(ValueError, match="must be of one shape and dtype"):
        add_rms_norm(x, x.astype(jnp.bfloat16), jnp.ones(8), eps=EPS)
    with pytest.raises(ValueError, match="must have one shape"):
        gated_activation(x, x[:1])
    q, angle = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 3, 5))
    with pytest.raises(ValueError, match=r"rope: .* do not fit"):
        rope(q, q, angle, angle)
