"""What tests/test_ops.py does not show of nf4_matmul."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpr_tools import all_equations
from pallas_kernels import ImplementationError, explain, nf4, nf4_matmul

GPU = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def quantized(*shape: int, double_quantization: bool = True) -> nf4.QuantizedArrays:
    return jax.jit(lambda w: nf4.quantize(w, double_quantization=double_quantization))(normal(*shape))


@pytest.mark.parametrize(
    ("tokens", "dtype", "rounding", "margin"),
    # float16 shows more of the weights' 11 bits than bfloat16 would: three roundings of each, and that of the result.
    [(1, jnp.float32, 0.0, 100), (4, jnp.float32, 0.0, 100), (5, jnp.float16, 4 * 2.0**-11, 10)],
)
def test_columns_shared_by_programs_are_added_up(tokens: int, dtype: Any, rounding: float, margin: int) -> None:
    """More columns than a program reads at once: a loop for a few tokens, programs that split them for five."""
    columns = 4160
    arrays, x = quantized(16, columns, double_quantization=False), normal(tokens, columns, seed=1).astype(dtype)
    got = jax.jit(lambda x: nf4_matmul(x, *arrays, implementation="pallas"))(x)
    w, x64 = np.asarray(nf4.dequantize(*arrays), np.float64).T, np.asarray(x, np.float64)
    want = x64 @ w
    bound = (2 * np.sqrt(columns) * np.finfo(np.float32).eps + rounding) * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=bound)
    # Leaving out the last block of columns would not pass.
    assert np.abs(want - x64[:, :-64] @ w[:-64]).max() > margin * bound


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_tokens_and_weights_of_any_size_fit_in_float16(size: float, double_quantization: bool) -> None:
    """On tensor cores both are float16, which ends at 65,504; bfloat16 does not. Rows far apart stay apart, too."""
    w = size * normal(24, 256).at[0].multiply(1e3)
    arrays = jax.jit(lambda w: nf4.quantize(w, double_quantization=double_quantization))(w)
    x = (normal(6, 256, seed=1) * 10.0 ** jnp.arange(-9, 9, 3.0)[:, None]).astype(jnp.bfloat16)
    got = np.asarray(nf4_matmul(x, *arrays, implementation="pallas"), np.float64)
    want = np.asarray(x, np.float64) @ np.asarray(nf4.dequantize(*arrays), np.float64).T
    assert np.abs(np.asarray(x, np.float64)).max() > np.finfo(np.float16).max
    for rows in (slice(0, 1), slice(1, None)):  # the row of large weights by itself
        largest = np.abs(want[:, rows]).max(axis=1, keepdims=True)
        assert np.abs((got - want)[:, rows] / largest).max() < 2 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, 64), jnp.float32), ((2, 0, 64), jnp.float32), ((2, 2, 64), jnp.float32), ((2, 3, 64), jnp.float16)],
)
def test_leading_axes_and_no_tokens(implementation: str, shape: tuple[int, ...], dtype: Any) -> None:
    arrays, x = quantized(16, 64), normal(*shape, seed=1).astype(dtype)
    got, pull_back = jax.vjp(lambda x: nf4_matmul(x, *arrays, implementation=implementation), x)
    assert got.shape == (*shape[:-1], 16)
    w = np.asarray(nf4.dequantize(*arrays))
    want = np.asarray(x, np.float32) @ w.T  # by numpy: a GPU would round float32 to TF32
    bound = 1e-4 if dtype == jnp.float32 else 4 * 2.0**-11 * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0, atol=bound)
    assert pull_back(got)[0].shape == x.shape


def test_only_the_codes_are_kept_for_the_backward() -> None:
    arrays, x = quantized(16, 64), normal(2, 64, seed=1)
    _, pull_back = jax.vjp(lambda x: nf4_matmul(x, *arrays), x)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    assert sum(leaf.nbytes for leaf in kept) <= sum(array.nbytes for array in arrays if array is not None)


def test_an_offset_of_zero_is_a_weight_like_any_other() -> None:
    """Nobody's quantizer writes it for weights that are not zeros, but a file may have it."""
    codes, absmax, nested_absmax, nested_offset = quantized(16, 64)
    assert nested_offset is not None
    x = normal(5, 64, seed=1).astype(jnp.bfloat16)
    for arrays in (
        (codes, absmax, nested_absmax, 0 * nested_offset),
        (codes, 0 * absmax, nested_absmax, nested_offset),
    ):
        got, want = (nf4_matmul(x, *arrays, implementation=name).astype(jnp.float32) for name in ("pallas", "xla"))
        np.testing.assert_allclose(
            got, want, rtol=0, atol=2 * float(jnp.finfo(jnp.bfloat16).eps) * float(jnp.abs(want).max())
        )


def test_other_maps_are_used() -> None:
    arrays, x = quantized(16, 64), normal(1, 64, seed=1)
    doubled = jnp.asarray(2 * nf4.QUANT_MAP)
    got = nf4_matmul(x, *arrays, quant_map=doubled, implementation="pallas")
    np.testing.assert_allclose(got, 2 * nf4_matmul(x, *arrays, implementation="xla"), rtol=0, atol=1e-4)


def test_wrong_arguments_are_refused() -> None:
    arrays = quantized(16, 64)
    with pytest.raises(ValueError, match=r"x \(1, 32\) and a weight \(16, 64\) do not fit"):
        nf4_matmul(jnp.ones((1, 32)), *arrays)
    with pytest.raises(ImplementationError, match="50 columns are not whole words of 8 codes"):
        nf4_matmul(jnp.ones((1, 50)), *quantized(16, 50), implementation="pallas")
    with pytest.raises(ImplementationError, match="more than 4 tokens are multiplied in 16 bits"):
        nf4_matmul(jnp.ones((5, 64)), *arrays, implementation="pallas")
    with pytest.raises(ImplementationError, match="it multiplies float32, bfloat16 and float16, not int32"):
        nf4_matmul(jnp.ones((1, 64), jnp.int32), *arrays, implementation="pallas")


def test_few_tokens_run_the_kernel_and_many_a_plain_matmul() -> None:
    codes, absmax = jax.ShapeDtypeStruct((14336, 2048), jnp.uint8), jax.ShapeDtypeStruct((917504,), jnp.float32)
    with jax.sharding.use_abstract_mesh(GPU):
        chosen = {
            tokens: explain(
                "nf4_matmul", jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16), codes, absmax
            ).choice.implementation
            for tokens in (1, 128, 129)
        }
    assert chosen == {1: "pallas", 128: "pallas", 129: "dequantize"}


def test_the_kernel_reads_the_stack_of_words_in_place() -> None:
    arrays = jax.jit(jax.vmap(nf4.quantize))(normal(3, 16, 128))
    jaxpr = jax.make_jaxpr(lambda x: nf4_matmul(x, *arrays, layer=1, implementation="pallas"))(normal(1, 128))
    calls = [equation for equation in all_equations(jaxpr) if equation.primitive.name == "pallas_call"]
    assert calls
    assert all((3, 16, 16) in [variable.aval.shape for variable in cast(Any, call.invars)] for call in calls)
