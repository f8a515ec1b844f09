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
from lowering import h100, kernel_names, lowered_text
from pallas_kernels import (
    OPS,
    Case,
    ImplementationError,
    Op,
    attention,
    backend,
    explain,
    gated_activation,
    lora_linear,
    rms_norm,
)
from pallas_kernels import linear_cross_entropy as loss_op

# For what is compared with, and for program transformations: most of these tests' time is LLVM's.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
# Their forward pass computes the gradients, the backward one only scales them.
WITHOUT_BACKWARD_KERNEL = ("linear_cross_entropy",)
# Its kernel multiplies on ordinary cores, in float32.
WITHOUT_PRODUCTS = [("nf4_linears", "pallas")]
EACH_CASE_AND_DTYPE = [
    pytest.param(op, case, dtype, id=f"{op.name}: {case.name}, {dtype.__name__}", marks=marks)
    for op in OPS.values()
    for case in op.cases
    for dtype in (jnp.float32, jnp.bfloat16)
    for marks in [() if case == op.cases[0] else pytest.mark.slow]
]
EACH_IMPLEMENTATION = [(op, name) for op in OPS.values() for name in op.implementations]
EACH_DIFFERENTIABLE = [
    pytest.param(op, name, id=f"{op.name}: {name}") for op, name in EACH_IMPLEMENTATION if op.cases[0].differentiable
]
EACH_KERNEL = [pytest.param(op, name, id=f"{op.name}: {name}") for op, name in EACH_IMPLEMENTATION if name == "pallas"]
EACH_DIFFERENTIABLE_KERNEL = [row for row in EACH_DIFFERENTIABLE if row in EACH_KERNEL]


def is_float(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)


def arguments_of(case: Case, dtype: Any = jnp.float32) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """(the arguments to differentiate, the rest)."""
    rest = case.make(np.random.default_rng(0), dtype)
    return {name: rest.pop(name) for name in case.differentiable}, rest


def supported(op: Op, arguments: dict[str, Any]) -> list[str]:
    """The op's implementations that take these arguments on this platform; the reference is always one."""
    names = [name for name in op.implementations if op.refuses(name, **arguments) is None]
    assert "xla" in names
    return names


def as_float64(tree: Any) -> Any:
    """Float arrays as numpy float64, the rest as it is."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64) if is_float(x) else x, tree)


def poison_free_memory() -> None:
    """On a GPU, fills memory that the next program's outputs will get with NaN: what a kernel does not write shows.

    Interpreted kernels get NaN without this (test_unwritten_output_is_nan).
    """
    if jax.default_backend() == "gpu":
        jax.block_until_ready([jnp.full((1 << size,), jnp.nan, jnp.float32) for size in range(6, 24)])


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


def products_of(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
    """The equations of all matrix products in a function's program."""
    equations = all_equations(jax.make_jaxpr(function)(arguments))
    return [equation for equation in equations if equation.primitive.name in ("dot_general", "ragged_dot_general")]


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
        poison_free_memory()
        out, gradients = pulled_back(op.implementations[name].function, arguments, rest, cotangents)
        errors = [*jax.tree.map(relative_error, jax.tree.leaves(out), jax.tree.leaves(want_out))]
        errors += [relative_error(gradients[key], want_gradients[key]) for key in arguments]
        assert max(errors) <= op.tolerance(case, dtype), name
        assert all(gradients[key].dtype == arguments[key].dtype for key in arguments)


@pytest.mark.parametrize(("op", "implementation"), EACH_DIFFERENTIABLE)
def test_gradients_under_scan_checkpoint_and_vmap(op: Op, implementation: str) -> None:
    case = op.cases[0]
    arguments, rest = arguments_of(case)
    if op.refuses(implementation, **arguments, **rest):
        pytest.skip(f"{implementation} does not run on {jax.default_backend()}")

    def loss(arguments: dict[str, jax.Array]) -> jax.Array:
        out = op(**arguments, **rest, implementation=implementation)
        return sum((jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), jnp.float32(0))

    def scanned(stacked: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.scan(lambda sum, one: (sum + jax.checkpoint(loss)(one), None), jnp.float32(0), stacked)[0]

    stacked = jax.tree.map(lambda x: np.stack([x, x[::-1]]), arguments)
    quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    gradient = quick_jit(jax.grad(loss))
    one_by_one = [gradient(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    for got in quick_jit(lambda stacked: (jax.grad(scanned)(stacked), jax.vmap(jax.grad(loss))(stacked)))(stacked):
        assert max(relative_error(got[name], want[name]) for name in want) <= op.tolerance(case, jnp.float32)


@pytest.mark.parametrize(("op", "implementation"), EACH_KERNEL)
def test_kernels_are_in_the_program_for_a_gpu(op: Op, implementation: str) -> None:
    """Forward and backward are lowered for an H100, whatever machine this is; the reference has no kernel in it."""
    arguments, rest = arguments_of(op.cases[0], jnp.bfloat16)

    def program(name: str) -> str:
        def run(arguments: dict[str, jax.Array]) -> Any:
            out, pull_back = jax.vjp(lambda a: op(**a, **rest, implementation=name), arguments)
            return out, pull_back(jax.tree.map(jnp.ones_like, out)) if arguments else out

        return lowered_text(run, arguments)

    least = 2 if arguments and op.name not in WITHOUT_BACKWARD_KERNEL else 1
    assert kernel_names(program(implementation)).total() >= least
    assert kernel_names(program("xla")).total() == 0


@pytest.mark.parametrize(("op", "implementation"), EACH_DIFFERENTIABLE_KERNEL)
def test_forward_mode_of_a_kernel_is_refused(op: Op, implementation: str) -> None:
    """By name, or by JAX's error; the references that are plain JAX can be differentiated either way."""
    arguments, rest = arguments_of(op.cases[0])
    run = functools.partial(op, **rest, implementation=implementation)
    with pytest.raises(TypeError, match=f"{op.name}: implementation '{implementation}' has reverse mode only"):
        jax.jvp(lambda a: run(**a), (arguments,), (arguments,))
    # linearize itself may pass (reverse mode is built on it), the map that it returns may not.
    with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp"):
        jax.linearize(lambda a: run(**a), arguments)[1](arguments)


@pytest.mark.parametrize(
    ("op", "implementation"), [pytest.param(*row, id=f"{row[0].name}: {row[1]}") for row in EACH_IMPLEMENTATION]
)
def test_float32_products_are_exact(op: Op, implementation: str) -> None:
    """A GPU would otherwise round float32 to TF32, which no CPU test would notice; in kernels too."""
    arguments, rest = arguments_of(op.cases[0])
    if op.refuses(implementation, **arguments, **rest):
        pytest.skip(f"{implementation} does not run on {jax.default_backend()}")

    def run(arguments: dict[str, jax.Array]) -> Any:
        out, pull_back = jax.vjp(lambda a: op(**a, **rest, implementation=implementation), arguments)
        return pull_back(out)

    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    products = products_of(run, arguments)
    assert all(equation.params["precision"] == highest for equation in products)
    with jax.enable_x64(True):
        reference = functools.partial(getattr(dense_references, op.name), **as_float64(rest))
        wanted = products_of(lambda a: reference(**a), as_float64(arguments))
    assert bool(products) == (bool(wanted) and (op.name, implementation) not in WITHOUT_PRODUCTS)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_a_named_implementation_is_used_or_refused(op: Op) -> None:
    arguments = op.cases[0].make(np.random.default_rng(0), jnp.float32)
    assert op.choose(**arguments).why
    for name in supported(op, arguments):
        assert op.choose(**arguments, implementation=name).implementation == name
    with pytest.raises(ImplementationError, match="unknown implementation 'cudnn9'; it has xla"):
        op(**arguments, implementation="cudnn9")


def test_unwritten_output_is_nan() -> None:
    """The control of every test here: a kernel that forgets an element cannot pass."""

    def forgets_the_last(x_ref: Any, out_ref: Any) -> None:
        backend.store(out_ref.at[backend.ds(0, 8)], backend.load(x_ref.at[backend.ds(0, 8)]))

    out = backend.call(forgets_the_last, jnp.ones(9), out=jax.ShapeDtypeStruct((9,), jnp.float32), grid=(1,))
    assert np.isnan(out[8]) or jax.default_backend() != "cpu"
    np.testing.assert_array_equal(out[:8], 1)


def test_explain_says_what_runs_and_why_not_the_others() -> None:
    codes, absmax = jax.ShapeDtypeStruct((64, 128), jnp.uint8), jax.ShapeDtypeStruct((256,), jnp.float32)
    platform, chosen = jax.default_backend(), "xla" if jax.default_backend() == "cpu" else "pallas"
    text = str(explain("nf4_dequantize", codes, absmax))
    assert text.startswith(f"nf4_dequantize on {platform}: {chosen}, because")
    with h100():
        explanation = explain("nf4_dequantize", codes, absmax)
    assert (explanation.platform, explanation.choice.implementation) == ("gpu", "pallas")
    assert explanation.others == {"xla": "pallas is faster here"}
    with pytest.raises(ValueError, match="no op 'nf5'; there are "):
        explain("nf5")


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
