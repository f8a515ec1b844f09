"""NF4 against bitsandbytes' own numbers (tests/vectors/make_nf4_vectors.py made them), and the tensor built on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from jaxft.errors import JaxftError
from jaxft.quant import QUANTIZATIONS, NF4Tensor, QTensor
from jaxpr_tools import all_equations
from pallas_kernels import ImplementationError, nf4

VECTORS = Path(__file__).parent / "vectors" / "nf4.safetensors"
CASES = ("whole", "whole_bf16", "partial", "partial_bf16", "zeros", "nested_bf16")


def vectors(prefix: str) -> dict[str, jax.Array]:
    return {key.removeprefix(prefix): x for key, x in load_file(VECTORS).items() if key.startswith(prefix)}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


# Compiled once a shape: run eagerly, each of their operations would be compiled on its own.
quantized = jax.jit(NF4Tensor.quantize, static_argnames="double_quantization")
decoded = jax.jit(NF4Tensor.dequantize, static_argnames="dtype")


def test_the_maps_are_bitsandbytes_maps() -> None:
    stored = vectors("")
    np.testing.assert_array_equal(nf4.QUANT_MAP, stored["quant_map"])
    np.testing.assert_array_equal(nf4.NESTED_QUANT_MAP, stored["nested_quant_map"])


@pytest.mark.parametrize("case", CASES)
def test_quantize_gives_bitsandbytes_codes(case: str) -> None:
    weight = vectors(f"{case}.")["weight"]
    plain, double = vectors(f"{case}.plain."), vectors(f"{case}.double.")
    got = jax.jit(nf4.quantize, static_argnames="double_quantization")(weight, double_quantization=False)
    np.testing.assert_array_equal(got.codes, plain["codes"])
    np.testing.assert_array_equal(got.absmax, plain["absmax"])
    got = jax.jit(nf4.quantize)(weight)
    np.testing.assert_array_equal(got.codes, double["codes"])
    # bitsandbytes rounds absmax codes through a table of 65,536 entries and sums the mean in another order.
    steps = np.abs(np.asarray(got.absmax, np.int32) - np.asarray(double["absmax"], np.int32))
    assert steps.max() <= 1
    assert np.mean(steps > 0) < 0.02
    np.testing.assert_allclose(got.nested_absmax, double["nested_absmax"], rtol=1e-5)
    np.testing.assert_allclose(got.nested_offset, double["nested_offset"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "double"])
@pytest.mark.parametrize("case", CASES)
def test_dequantize_gives_bitsandbytes_bits(case: str, kind: str) -> None:
    arrays = vectors(f"{case}.{kind}.")
    want = arrays.pop("dequantized")
    got = jax.jit(lambda arrays: nf4.dequantize(**arrays, dtype=want.dtype))(arrays)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_the_kernel_gives_the_references_bits(dtype) -> None:
    stack = NF4Tensor.stack([quantized(normal(8, 768, seed=seed)) for seed in range(2)])
    arrays = stack.codes, stack.absmax, stack.nested_absmax, stack.nested_offset
    got, want = (
        jax.jit(lambda layer, name=name: nf4.dequantize(*arrays, dtype=dtype, layer=layer, implementation=name))(1)
        for name in ("pallas", "xla")
    )
    np.testing.assert_array_equal(got, want)


def test_the_kernel_is_in_the_program_for_a_gpu_and_reads_the_stack_in_place() -> None:
    stack = NF4Tensor.stack([quantized(normal(8, 768, seed=seed)) for seed in range(2)])
    run = jax.jit(lambda *arrays: nf4.dequantize(*arrays, layer=1, implementation="pallas"))
    arrays = stack.codes, stack.absmax, stack.nested_absmax, stack.nested_offset
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    # Only the lowering is for that GPU, and jax takes it from here where this machine has none.
    with jax.sharding.use_abstract_mesh(mesh):
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    (kernel_call,) = [line for line in text.splitlines() if "custom_call @" in line]
    assert "triton" in kernel_call
    assert f"tensor<2x{8 * 768 // 8}xi32>" in kernel_call


def test_the_kernel_decodes_a_partial_block_and_program() -> None:
    arrays = jax.jit(nf4.quantize)(normal(12, 1010))
    got, want = (nf4.dequantize(*arrays, implementation=name) for name in ("pallas", "xla"))
    np.testing.assert_array_equal(got, want)


def test_the_kernel_refuses_partial_words() -> None:
    arrays = jax.jit(nf4.quantize)(normal(5, 50))
    with pytest.raises(
        ImplementationError, match="'pallas' cannot run this: 5 x 50 codes do not fill words of 32 bits"
    ):
        nf4.dequantize(*arrays, implementation="pallas")
    np.testing.assert_array_equal(nf4.dequantize(*arrays), nf4.dequantize(*arrays, implementation="xla"))


def test_quantize_is_deterministic_and_refuses_odd_columns() -> None:
    w = normal(6, 130)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(nf4.quantize)(w), jax.jit(nf4.quantize)(w))
    with pytest.raises(ValueError, match="even number of columns"):
        nf4.quantize(normal(4, 5))


@pytest.mark.parametrize("shape", [(33, 514), (5, 50)])
def test_quantize_gives_the_same_bits_eager_jitted_and_under_vmap(shape: tuple[int, int]) -> None:
    weights = jnp.stack([normal(*shape, seed=seed) for seed in range(3)])
    eager = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[nf4.quantize(w) for w in weights])
    jax.tree.map(np.testing.assert_array_equal, eager, jax.jit(jax.vmap(nf4.quantize))(weights))
    jax.tree.map(np.testing.assert_array_equal, eager, jax.lax.map(nf4.quantize, weights))


def test_quantize_makes_no_wide_integers_of_the_weights_size() -> None:
    w = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    arrays = [v.aval for e in all_equations(jax.make_jaxpr(nf4.quantize)(w)) for v in e.outvars]
    large = [a.dtype for a in arrays if getattr(a, "size", 0) >= w.size and jnp.issubdtype(a.dtype, jnp.integer)]
    assert set(large) == {jnp.dtype(jnp.uint8)}


@pytest.mark.parametrize("double_quantization", [True, False])
def test_a_stack_is_its_weights(double_quantization: bool) -> None:
    weights = [quantized(normal(6, 64, seed=seed), double_quantization=double_quantization) for seed in range(3)]
    stack = NF4Tensor.stack(weights)
    assert stack.nbytes == sum(weight.nbytes for weight in weights)
    for index, (weight, again) in enumerate(zip(weights, stack.unstack(), strict=True)):
        jax.tree.map(np.testing.assert_array_equal, weight, again)
        assert jax.tree.structure(weight) == jax.tree.structure(again)
        np.testing.assert_array_equal(decoded(weight), decoded(stack.at_layer(index)))
    read = jax.jit(lambda stack, index: stack.at_layer(index).dequantize(jnp.bfloat16))(stack, jnp.int32(2))
    np.testing.assert_array_equal(read, decoded(weights[2], dtype=jnp.bfloat16))
    sliced = jax.lax.scan(lambda carry, weight: (carry, weight.dequantize()), None, stack)[1]
    np.testing.assert_array_equal(sliced[1], decoded(weights[1]))


def test_a_view_shares_the_stacks_arrays() -> None:
    stack = NF4Tensor.stack([quantized(normal(6, 64))] * 2)
    assert stack.at_layer(1).codes is stack.codes


def test_a_stored_checkpoints_own_maps_are_used() -> None:
    weight = quantized(normal(6, 64))
    doubled = dataclasses.replace(weight, quant_map=weight.quant_map * 2)
    np.testing.assert_array_equal(decoded(doubled), 2 * decoded(weight))


def test_wrong_use_is_refused_in_words() -> None:
    weight = quantized(normal(6, 64))
    stack = NF4Tensor.stack([weight, weight])
    for misuse, message in (
        (lambda: NF4Tensor.quantize(normal(3, 7)), r"weight of shape \(3, 7\): NF4 needs a matrix with an even number"),
        (lambda: NF4Tensor.stack([weight, quantized(normal(4, 64))]), "needs weights of one kind"),
        (lambda: NF4Tensor.stack([]), "needs weights of one kind"),
        (lambda: NF4Tensor.stack([stack.at_layer(0)]), "needs weights of one kind"),
        (lambda: stack.dequantize(), "has no single value"),
        (lambda: weight.at_layer(0), "is not a stack"),
        (lambda: weight.unstack(), "is not a stack"),
    ):
        with pytest.raises(JaxftError, match=message):
            misuse()


def test_nf4_is_registered() -> None:
    assert QUANTIZATIONS["nf4"] is NF4Tensor
    assert isinstance(quantized(normal(6, 64)), QTensor)


@pytest.mark.slow
def test_the_vectors_are_what_bitsandbytes_makes_now() -> None:
    pytest.importorskip("bitsandbytes")
    from vectors import make_nf4_vectors

    stored = vectors("")
    made = make_nf4_vectors.vectors()
    assert made.keys() == stored.keys()
    for key, tensor in made.items():
        np.testing.assert_array_equal(np.asarray(stored[key]).astype(np.float32), tensor.float().numpy())
