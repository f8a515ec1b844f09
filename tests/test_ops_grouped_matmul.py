"""What tests/test_ops.py does not show of grouped_matmul: its tiles, frozen weights, and nothing outside its rows."""

from __future__ import annotations

import doctest
import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dense_references
from jaxpr_tools import all_equations
from pallas_kernels.grouped_matmul import GROUPED_MATMUL, grouped_matmul
from pallas_kernels.op import Case

# The package exports the function by the module's name.
module = importlib.import_module("pallas_kernels.grouped_matmul")
# The default tier runs the kernel; the reference is what most of its checks compare with.
KERNEL_FIRST = (pytest.param("xla", marks=pytest.mark.slow), "pallas")


def arguments_of(case: Case) -> dict:
    return case.make(np.random.default_rng(0), jnp.float32)


@jax.tree_util.register_pytree_node_class
class Codes:
    """A weight of integers, as a quantized one is."""

    def __init__(self, codes: jax.Array) -> None:
        self.codes = codes

    def dequantize(self, dtype):
        return self.codes.astype(dtype) / jnp.asarray(100, dtype)

    def tree_flatten(self):
        return (self.codes,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


MORE_SIZES = [(0, 0, 0), (16, 1, 15), (0, 0, 40), (1, 1, 1), (32, 8, 0)]


@pytest.mark.parametrize("sizes", [(7, 0, 3), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in MORE_SIZES)])
def test_tiles_cover_every_row_once_and_cross_no_edge(sizes: tuple[int, ...]) -> None:
    rows, block = 40, 16
    expert, start, stop, weight = np.asarray(module._row_tiles(jnp.array(sizes, jnp.int32), rows, block, jnp.int32(6)))
    np.testing.assert_array_equal(weight, 6 + np.minimum(expert, 2))
    ends = np.cumsum(sizes)
    covered = []
    for e, first, last in zip(expert, start, stop, strict=True):
        mine = range(first, min(first + block, last))
        covered += mine
        assert all(np.searchsorted(ends, row, side="right") == e for row in mine)
    assert sorted(covered) == list(range(rows))


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_rows_of_nobody_and_other_groups_change_nothing(implementation: str) -> None:
    """Poison in rows of nobody reaches no result but their own gradient's, which is zero."""
    case = GROUPED_MATMUL.cases[0]
    arguments = arguments_of(case)
    trained = {name: arguments.pop(name) for name in case.differentiable}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # LLVM is slower than the run
    def run(trained):
        y, back = jax.vjp(lambda t: grouped_matmul(**t, **arguments, implementation=implementation), trained)
        return y, back(jnp.ones_like(y))[0]

    used = int(jnp.sum(arguments["group_sizes"]))
    poisoned = trained | {"x": trained["x"].at[used:].set(jnp.float32(1e30))}
    (y, gradients), (clean_y, clean) = run(poisoned), run(trained)
    np.testing.assert_array_equal(y, clean_y)
    assert not np.any(y[used:])
    assert not np.any(gradients["x"][used:])
    jax.tree.map(np.testing.assert_array_equal, gradients, clean)
    # The check can fail: the row before them does change the result.
    assert np.any(run(trained | {"x": trained["x"].at[used - 1].set(jnp.float32(1e3))})[0] != clean_y)


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_a_quantized_weight_gets_no_gradient_and_is_kept_as_codes(implementation: str) -> None:
    rng = np.random.default_rng(0)
    weight = Codes(jnp.asarray(rng.integers(-100, 100, (3, 24, 20)), jnp.int8))
    x = jnp.asarray(rng.standard_normal((9, 20)), jnp.float32)
    sizes = jnp.array([4, 0, 5], jnp.int32)
    run = functools.partial(grouped_matmul, group_sizes=sizes, implementation=implementation)
    y, back = jax.vjp(lambda x: run(x, weight), x)
    want, want_back = jax.vjp(lambda x: run(x, weight.dequantize(jnp.float32)), x)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(back(y)[0], want_back(y)[0])
    assert not [leaf for leaf in jax.tree.leaves(back) if leaf.shape == (3, 24, 20) and leaf.dtype != jnp.int8]


class InStack(NamedTuple):
    """One layer of a stack of weights, as a decoder's `LayerView`."""

    stack: jax.Array
    layer: jax.Array

    def dequantize(self, dtype):
        return self.stack[self.layer].astype(dtype)


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
def test_a_weight_is_read_out_of_a_stack_of_layers(implementation: str) -> None:
    """As from a layer of its own, and the kernel's program holds no copy of the layer."""
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((3, 2, 8, 16)), jnp.float32)
    x, sizes = jnp.asarray(rng.standard_normal((9, 16)), jnp.float32), jnp.array([4, 3], jnp.int32)
    run = functools.partial(grouped_matmul, x, group_sizes=sizes, implementation=implementation)
    of_stack = lambda stack, layer: run(InStack(stack, layer))  # noqa: E731
    compiled = jax.jit(of_stack, compiler_options={"xla_backend_optimization_level": 0})
    np.testing.assert_allclose(compiled(stack, jnp.int32(1)), run(stack[1], implementation="xla"), rtol=0, atol=1e-5)
    jaxpr = jax.make_jaxpr(of_stack)(stack, jnp.int32(1))
    shapes = [getattr(out.aval, "shape", None) for equation in all_equations(jaxpr) for out in equation.outvars]
    assert ((2, 8, 16) in shapes) == (implementation == "xla")


def test_no_weight_gradient_unless_it_is_asked_for() -> None:
    case = GROUPED_MATMUL.cases[0]
    arguments = arguments_of(case)

    def sums(*trained: str) -> int:
        rest = {name: value for name, value in arguments.items() if name not in trained}
        loss = lambda t: jnp.sum(grouped_matmul(**t, **rest, implementation="xla"))  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))({name: arguments[name] for name in trained})
        shapes = [getattr(out.aval, "shape", None) for equation in all_equations(jaxpr) for out in equation.outvars]
        return sum(shape == arguments["weight"].shape for shape in shapes)

    assert sums("x", "lora_A", "lora_B") == 0
    assert sums("x", "weight") > 0


@pytest.mark.parametrize("implementation", KERNEL_FIRST)
@pytest.mark.parametrize("shape", [(0, 8, 4), pytest.param((5, 8, 0), marks=pytest.mark.slow)])
def test_nothing_to_multiply(implementation: str, shape: tuple[int, int, int]) -> None:
    rows, size_in, size_out = shape
    x, weight = jnp.ones((rows, size_in)), jnp.ones((2, size_out, size_in))
    y, back = jax.vjp(lambda x: grouped_matmul(x, weight, jnp.zeros(2, jnp.int32), implementation=implementation), x)
    assert y.shape == (rows, size_out)
    assert not np.any(back(y)[0])


@pytest.mark.parametrize("transposed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_several_tiles_and_blocks_of_ranks(transposed: bool) -> None:
    rng = np.random.default_rng(0)
    sizes, rows = (37, 0, 1, 50), 100
    x = jnp.asarray(rng.standard_normal((rows, 72)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((4, 88, 72) if transposed else (4, 72, 88)), jnp.float32)
    group_sizes = jnp.array(sizes, jnp.int32)
    rank = module.LOW_RANK_BLOCK + 1
    h = jnp.asarray(rng.standard_normal((rows, rank)), jnp.float32)
    factor = jnp.asarray(rng.standard_normal((4, 88, rank) if transposed else (4, rank, 88)), jnp.float32)
    products = module._Tiled(x, group_sizes)
    experts = module._Experts(weight)
    got = products.times(x, experts, (h, factor), jnp.float32(0.5), transposed=transposed, block=(16, 32, 16))
    # The low-rank term is more columns of x and of the weight.
    joined = np.concatenate([weight, factor], axis=2 if transposed else 1).astype(np.float64)
    wide, dense = np.concatenate([x, h], axis=1).astype(np.float64), joined if transposed else joined.swapaxes(1, 2)
    with jax.enable_x64(True):
        want = dense_references.grouped_matmul(wide, dense, group_sizes, None, None, scale=1.0)
    np.testing.assert_allclose(got, 0.5 * np.asarray(want), rtol=0, atol=1e-4)
    sums = products.sums(x, got, jnp.float32, block=(16, 32, 16))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for e in range(4):
        mine = slice(starts[e], starts[e + 1])
        np.testing.assert_allclose(sums[e], np.asarray(x[mine]).T @ np.asarray(got[mine]), rtol=0, atol=5e-3)


def test_wrong_arguments_are_refused() -> None:
    x, weight, sizes = jnp.ones((4, 8)), jnp.ones((2, 3, 8)), jnp.array([2, 2])
    with pytest.raises(ValueError, match="come together"):
        grouped_matmul(x, weight, sizes, lora_A=jnp.ones((2, 1, 8)))
    with pytest.raises(ValueError, match="does not fit"):
        grouped_matmul(x, weight[:, :, :7], sizes)
    with pytest.raises(ValueError, match="integer group_sizes"):
        grouped_matmul(x, weight, jnp.ones(2))
