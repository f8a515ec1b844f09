"""MXFP4: the values of the OCP specification, and gguf's own implementation as a second opinion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

from jaxft.errors import JaxftError
from jaxft.quant import QUANTIZATIONS, MXFP4Tensor, QTensor


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return rows * np.float32(2.0) ** np.arange(-6, shape[0] - 6, dtype=np.float32)[:, None]


def test_codes_and_scales_mean_what_the_specification_says() -> None:
    codes = jnp.arange(16, dtype=jnp.uint8)
    weight = MXFP4Tensor(
        jnp.tile(codes[0::2] | (codes[1::2] << 4), 2)[None], jnp.asarray([[128]], jnp.uint8), shape=(1, 32)
    )
    one = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = 2 * np.array(2 * [*one, *(-x for x in one)], np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(np.asarray(weight.dequantize(dtype), np.float32)[0], expected)


def test_quantize_and_dequantize_equal_ggufs() -> None:
    """Its blocks are a scale and 16 bytes, whose low bits are the first half of the values."""
    w = normal(12, 96)
    ours = MXFP4Tensor.quantize(jnp.asarray(w))
    theirs = gguf_quantize(w, GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(ours.scales, theirs.reshape(12, 3, 17)[..., 0])
    np.testing.assert_array_equal(ours.dequantize(), gguf_dequantize(theirs, GGMLQuantizationType.MXFP4))
    assert ours.nbytes * 32 == w.size * 17


def test_values_go_to_the_nearest_and_ties_to_even_codes() -> None:
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, 4.0], np.float32)
    w = jnp.zeros((1, 32)).at[0, :9].set(middles)
    np.testing.assert_array_equal(MXFP4Tensor.quantize(w).dequantize()[0, :9], [0, 1, 1, 2, 2, 4, 4, 6, 4])


def test_a_stack_of_experts_is_read_a_layer_at_a_time() -> None:
    weights = [[MXFP4Tensor.quantize(jnp.asarray(normal(6, 64, seed=3 * i + j))) for j in range(3)] for i in range(2)]
    stack = MXFP4Tensor.stack([MXFP4Tensor.stack(layer) for layer in weights])
    read = jax.jit(lambda stack, layer: stack.at_layer(layer).dequantize(jnp.float32))(stack, jnp.int32(1))
    np.testing.assert_array_equal(read, np.stack([weight.dequantize() for weight in weights[1]]))
    jax.tree.map(np.testing.assert_array_equal, stack.unstack()[1].unstack()[2], weights[1][2])
    x = jnp.asarray(normal(2, 64))
    np.testing.assert_allclose(weights[0][1].matmul(x), x @ weights[0][1].dequantize().T, rtol=1e-5, atol=1e-4)


def test_wrong_use_is_refused_in_words() -> None:
    weight = MXFP4Tensor.quantize(jnp.asarray(normal(6, 64)))
    assert isinstance(weight, QTensor)
    assert QUANTIZATIONS["mxfp4"] is MXFP4Tensor
    for misuse, message in (
        (lambda: MXFP4Tensor.quantize(jnp.ones((3, 40))), "whole blocks of 32"),
        (lambda: MXFP4Tensor.stack([]), "needs weights of one kind"),
        (lambda: weight.at_layer(0), "is not a stack"),
        (lambda: weight.unstack(), "is not a stack"),
    ):
        with pytest.raises(JaxftError, match=message):
            misuse()
