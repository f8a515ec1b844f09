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


@pytest.mark.parametrize("tokens", [1, 5])
def test_columns_shared_by_programs_are_added_up(tokens: int) -> None:
    """More columns than a program reads at once: a loop for one token, programs that split them for five."""
    columns = 4160
    arrays, x = quantized(16, columns, double_quantization=False), normal(tokens, columns, seed=1)
    got = jax.jit(lambda x: nf4_matmul(x, *arrays, implementation="pallas"))(x)
    w = np.asarray(nf4.dequantize(*arrays), np.float64).T
    want = np.asarray(x, np.float64) @ w
    bound = 2 * np.sqrt(columns) * np.finfo(np.float32).eps * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)
    # Leaving out the last block of columns would not pass.
    assert np.abs(want - np.asarray(x)[:, :-64] @ w[:-64]).max() > 100 * bound


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (2, 3, 64)])
def test_leading_axes_and_no_tokens(implementation: str, shape: tuple[int, ...]) -> None:
    arrays, x = quantized(16, 64), normal(*shape, seed=1)
    got, pull_back = jax.vjp(lambda x: nf4_matmul(x, *arrays, implementation=implementation), x)
    assert got.shape == (*shape[:-1], 16)
    want = np.asarray(x) @ np.asarray(nf4.dequantize(*arrays)).T  # by numpy: a GPU would round float32 to TF32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert pull_back(got)[0].shape == x.shape


def test_only_the_codes_are_kept_for_the_backward() -> None:
    arrays, x = quantized(16, 64), normal(2, 64, seed=1)
    _, pull_back = jax.vjp(lambda x: nf4_matmul(x, *arrays), x)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    assert sum(leaf.nbytes for leaf in kept) <= sum(array.nbytes for array in arrays if array is not None)


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
