"""What only a GPU can show: bfloat16 by default, the kernel chosen, offload to pinned host memory, generation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from jaxft import losses
from jaxft.api import default_dtype
from jaxft.generate import generate
from jaxft.models import labels
from models import batch_of, decoder_of, random_examples, relative_l2, with_adapter

pytestmark = pytest.mark.gpu


def test_activations_are_bfloat16_by_default():
    assert default_dtype() == jnp.bfloat16


def test_nf4_is_decoded_by_the_kernel_bit_for_bit():
    weight = jax.random.normal(jax.random.key(0), (512, 1024))
    packed = pk.nf4.quantize(weight)
    assert pk.OPS["nf4_dequantize"].choose(*packed, dtype=jnp.bfloat16).implementation == "pallas"
    ours, reference = (pk.nf4.dequantize(*packed, dtype=jnp.bfloat16, implementation=name) for name in (None, "xla"))
    np.testing.assert_array_equal(ours, reference)


def gradient_program(remat: str):
    decoder = with_adapter(decoder_of(quantization="nf4", remat=remat))
    graphdef, trainable, frozen = labels.split(decoder)
    batch = batch_of(random_examples([30, 20, 38, 25]), [[0, 1], [2, 3]], 64)

    def loss(trainable, frozen, batch):
        micro = jax.tree.map(lambda a: a[0], batch)
        return losses.sft(nnx.merge(graphdef, trainable, frozen), micro)[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, batch).compile()
    return compiled, (trainable, frozen, batch)


def test_offload_moves_layer_inputs_and_changes_nothing():
    results, texts = {}, {}
    for remat in ("full", "offload"):
        compiled, arguments = gradient_program(remat)
        results[remat] = compiled(*arguments)
        texts[remat] = compiled.as_text()
    for full, offload in zip(*(jax.tree.leaves(results[name]) for name in ("full", "offload")), strict=True):
        assert relative_l2(offload, full) < 1e-5
    host = "S(5)"  # XLA's layout annotation of pinned host memory
    assert host in texts["offload"]
    assert host not in texts["full"]


def test_greedy_generation_equals_the_forward_pass():
    decoder = decoder_of()
    prompts = [[5, 6, 7], list(range(20, 31))]
    for prompt, new in zip(prompts, generate(decoder, prompts, max_new_tokens=5), strict=True):
        tokens = [*prompt, *new]
        logits = decoder.logits(decoder(jnp.asarray([tokens], jnp.int32)))[0]
        assert np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == new
