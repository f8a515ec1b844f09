"""Every op, every case, every implementation: values and gradients against a dense float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dense_references
from jaxpr_tools import all_equations
from pallas_kernels import OPS, Case, ImplementationError, Op, attention, gated_activation, lora_linear, rms_norm
from pallas_kernels import linear_cross_entropy as loss_op

# For what is compared with, and for program transformations: most of these tests' time is LLVM's.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
EACH_CASE = [pytest.param(op, case, id=f"{op.name}: {case.name}") for op in OPS.values() for case in op.cases]
EACH_CASE_AND_DTYPE = [
    pytest.param(op, case, dtype, id=f"{op.name}: {case.name}, {dtype.__name__}", marks=marks)
    for op in OPS.values()
    for case in op.cases
    for dtype in (jnp.float32, jnp.bfloat16)
    for marks in [pytest.mark.slow if dtype == jnp.bfloat16 and case != op.cases[0] else ()]
]
EACH_DIFFERENTIABLE = [pytest.param(op, op.cases[0], id=op.name) for op in OPS.values() if op.cases[0].differentiable]


def is_float(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)


def arguments_of(case: Case, dtype: Any = jnp.float32) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """(the arguments to differentiate, the rest)."""
    rest = case.make(np.random.default_rng(0), dtype)
    return {name: rest.pop(name) for name in case.differentiable}, rest


def supported(op: Op, arguments: dict[str, Any]) -> list[str]:
    """The op's implementations that take these arguments on this platform; the reference is always one."""
    platform = jax.default_backend()
    names = [name for name in op.implementations if op.refuses(name, **arguments) is None]
    assert "xla" in names
    return names


def as_float64(tree: Any) -> Any:
    """Float arrays as numpy float64, the rest as it is."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64) if is_float(x) else x, tree)


def random_like(tree: Any) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape).astype(leaf.dtype)), tree)


def pulled_back(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    rest: dict[str, Any],
    cotangents: Any,
    compiler_options: dict[str, int] | None = None,
) -> Any:
    """(outputs, gradients by argument), jitted."""

    def run(arguments: dict[str, jax.Array], cotangents: Any) -> Any:
        out, pull_back = jax.vjp(lambda arguments: function(**arguments, **rest), arguments)
        return out, pull_back(cotangents)[0]

    return jax.jit(run, compiler_options=compiler_options)(arguments, cotangents)


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """The largest difference over the largest value."""
    assert got.shape == want.shape
    got64, want64 = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return float(np.max(np.abs(got64 - want64), initial=0) / max(np.max(np.abs(want64), initial=0), 1e-3))


@pytest.mark.parametrize(("op", "case", "dtype"), EACH_CASE_AND_DTYPE)
def test_value_and_gradients(op: Op, case: Case, dtype: Any) -> None:
    arguments, rest = arguments_of(case, dtype)
    cotangents = random_like(jax.eval_shape(lambda arguments: op.reference(**arguments, **rest), arguments))
    with jax.enable_x64(True):
        reference = getattr(dense_references, op.name)
        want_out, want_gradients = pulled_back(
            reference, *as_float64((arguments, rest, cotangents)), compiler_options=QUICK_COMPILE
        )
    for name in supported(op, arguments | rest):
        out, gradients = pulled_back(op.implementations[name].function, arguments, rest, cotangents)
        errors = [*jax.tree.map(relative_error, jax.tree.leaves(out), jax.tree.leaves(want_out))]
        errors += [relative_error(gradients[key], want_gradients[key]) for key in arguments]
        assert max(errors) <= op.tolerance(case, dtype), name
        assert all(gradients[key].dtype == arguments[key].dtype for key in arguments)


@pytest.mark.parametrize(("op", "case"), EACH_DIFFERENTIABLE)
def test_gradients_under_scan_checkpoint_and_vmap(op: Op, case: Case) -> None:
    arguments, rest = arguments_of(case)

    def loss(arguments: dict[str, jax.Array]) -> jax.Array:
        return sum((jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(op(**arguments, **rest))), jnp.float32(0))

    def scanned(stacked: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.scan(lambda sum, one: (sum + jax.checkpoint(loss)(one), None), jnp.float32(0), stacked)[0]

    stacked = jax.tree.map(lambda x: np.stack([x, x[::-1]]), arguments)
    quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    gradient = quick_jit(jax.grad(loss))
    one_by_one = [gradient(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    for got in quick_jit(lambda stacked: (jax.grad(scanned)(stacked), jax.vmap(jax.grad(loss))(stacked)))(stacked):
        assert max(relative_error(got[name], want[name]) for name in want) <= op.tolerance(case, jnp.float32)


@pytest.mark.parametrize(("op", "case"), EACH_CASE)
def test_float32_products_are_exact(op: Op, case: Case) -> None:
    """A GPU would otherwise round float32 to TF32, which no CPU test would notice."""
    arguments, rest = arguments_of(case)
    out = jax.eval_shape(lambda arguments: op(**arguments, **rest), arguments)
    jaxpr = jax.make_jaxpr(lambda *args: jax.vjp(lambda a: op(**a, **rest), args[0])[1](args[1]))(arguments, out)
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    products = [equation for equation in all_equations(jaxpr) if equation.primitive.name == "dot_general"]
    assert all(equation.params["precision"] == highest for equation in products)
    assert products or op.name in ("rms_norm", "rope", "gated_activation", "nf4_dequantize")


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_a_named_implementation_is_used_or_refused(op: Op) -> None:
    arguments = op.cases[0].make(np.random.default_rng(0), jnp.float32)
    assert op.choose(**arguments).why
    for name in supported(op, arguments):
        assert op.choose(**arguments, implementation=name).implementation == name
    with pytest.raises(ImplementationError, match="unknown implementation 'cudnn9'; it has xla"):
        op(**arguments, implementation="cudnn9")


def test_wrong_arguments_are_refused() -> None:
    x = jnp.ones((1, 2, 4, 8))
    with pytest.raises(ValueError, match="do not fit"):
        attention(x, x[:, :, :3], x[:, :, :3], scale=1.0)
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        attention(x, x, x, scale=1.0, sliding_window=0)
    with pytest.raises(ValueError, match="unknown activation 'relu'; there are silu"):
        gated_activation(x, x, activation="relu")
    with pytest.raises(ValueError, match="come together"):
        lora_linear(x, jnp.ones((3, 8)), lora_A=jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="do not fit"):
        loss_op(jnp.ones((3, 8)), jnp.ones((5, 7)), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        loss_op(jnp.ones((3, 8)), jnp.ones((5, 8)), jnp.zeros(3, jnp.int32), chunk_size=0)


def test_rms_norm_keeps_x_dtype_whatever_the_weight() -> None:
    x = jnp.ones((2, 4), jnp.bfloat16)
    assert rms_norm(x, jnp.ones(4, jnp.float32), eps=1e-5).dtype == jnp.bfloat16
