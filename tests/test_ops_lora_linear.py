"""lora_linear over quantized and plain weights: what it keeps, what it differentiates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quant import NF4Tensor
from jaxpr_tools import all_avals, all_equations, max_elements, residual_avals
from pallas_kernels import lora_linear

IN, OUT, RANK, LAYERS = 64, 96, 4, 3


# Compiled once: run eagerly, each of their operations would be compiled on its own.
quantized = jax.jit(NF4Tensor.quantize)
decoded = jax.jit(NF4Tensor.dequantize)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> jax.Array:
    return jnp.asarray((scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def arguments() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, weight, lora_A, lora_B; fewer tokens than a weight has elements, by far."""
    return normal(2, 5, IN), normal(OUT, IN, scale=0.1), normal(RANK, IN, scale=0.1), normal(OUT, RANK)


def test_a_quantized_weight_computes_what_its_decoded_weight_computes() -> None:
    x, weight, lora_A, lora_B = arguments()
    bias, lora_x = normal(OUT, seed=1), normal(2, 5, IN, seed=2)
    packed = quantized(weight)

    def loss(trained, weight):
        x, bias, lora_A, lora_B, lora_x = trained
        return jnp.sum(jnp.sin(lora_linear(x, weight, bias, lora_A, lora_B, scale=0.5, lora_x=lora_x)))

    run = jax.jit(jax.value_and_grad(loss))
    trained = (x, bias, lora_A, lora_B, lora_x)
    got, want = run(trained, packed), run(trained, decoded(packed))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)


def test_the_backward_pass_keeps_no_decoded_weight() -> None:
    x, weight, lora_A, lora_B = arguments()
    packed = quantized(weight)
    kept = residual_avals(lambda x, A, B: lora_linear(x, packed, None, A, B), x, lora_A, lora_B)
    assert max_elements(kept) < OUT * IN
    assert any(aval.dtype == jnp.uint8 for aval in kept)
    naive = residual_avals(lambda x, A, B: lora_linear(x, packed.dequantize(), None, A, B), x, lora_A, lora_B)
    assert max_elements(naive) >= OUT * IN, "the check finds nothing where there is something"


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_keeps_the_stack_once(remat: bool) -> None:
    """No [L, out, in] array, decoded or packed, per iteration: the codes stay one constant of the loop."""
    x, _, lora_A, lora_B = arguments()
    stack = NF4Tensor.stack([quantized(normal(OUT, IN, scale=0.1, seed=seed)) for seed in range(LAYERS)])
    adapters = tuple(jnp.broadcast_to(a, (LAYERS, *a.shape)) for a in (lora_A, lora_B))

    def run(adapters, stack):
        def layer(x, scanned):
            index, lora_A, lora_B = scanned
            return jnp.tanh(lora_linear(x, stack.at_layer(index), None, lora_A, lora_B))[..., :IN], None

        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(body, x, (jnp.arange(LAYERS, dtype=jnp.int32), *adapters))[0]

    jaxpr = jax.make_jaxpr(jax.grad(lambda adapters, stack: jnp.sum(run(adapters, stack))))(adapters, stack)
    assert max_elements(aval for aval in all_avals(jaxpr) if aval.dtype == jnp.uint8) == stack.codes.size
    assert max_elements(all_avals(jaxpr)) < LAYERS * OUT * IN

    @jax.jit
    def one_by_one(x, weights):
        for weight, A, B in zip(weights, *adapters, strict=True):
            x = jnp.tanh(lora_linear(x, weight, None, A, B))[..., :IN]
        return x

    want = one_by_one(x, [decoded(weight) for weight in stack.unstack()])
    np.testing.assert_allclose(jax.jit(run)(adapters, stack), want, rtol=1e-5, atol=1e-5)


def test_a_frozen_plain_weight_keeps_no_input_and_a_trained_one_does() -> None:
    x, weight, _, _ = arguments()
    size_of_x = lambda kept: [aval.shape for aval in kept if aval.shape == x.shape]  # noqa: E731
    assert not size_of_x(residual_avals(lambda x: lora_linear(x, weight), x))
    assert size_of_x(residual_avals(lora_linear, x, weight))


def test_bfloat16_products_stay_bfloat16_and_adapter_gradients_are_not_rounded_to_it() -> None:
    x, weight, lora_A, lora_B = arguments()
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    grad = jax.grad(lambda A, B, w: jnp.sum(lora_linear(x, w, None, A, B).astype(jnp.float32) ** 2), (0, 1, 2))
    equations = all_equations(jax.make_jaxpr(grad)(lora_A, lora_B, weight))
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert {variable.aval.dtype for product in products for variable in product.invars} == {jnp.dtype(jnp.bfloat16)}
    assert {product.params["preferred_element_type"] for product in products} == {jnp.dtype(jnp.float32)}
    d_A, d_B, d_weight = jax.jit(grad)(lora_A, lora_B, weight)
    assert (d_A.dtype, d_B.dtype, d_weight.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert not jnp.array_equal(d_A, d_A.astype(jnp.bfloat16).astype(jnp.float32))
