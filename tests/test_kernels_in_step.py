"""The train step that a GPU runs, lowered here: every kernel is in it, as often as it should be."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from benchmarks.train import MODELS, random_batch
from jaxft import lora, losses
from jaxft.lora import LoraConfig
from jaxft.models import labels
from jaxft.models.decoded import frozen_for
from jaxft.plan import abstract_model
from jaxft.train.step import make_train_step
from lowering import h100, kernel_names
from models import batch_of, decoder_of, random_examples, with_adapter
from tiny import hf_config

# One layer's calls (a scan's body counts once) and those of the final norm and the loss.
WITHOUT_REMAT = {
    "nf4_dequantize": 7 + 7,  # seven linears, each decoded once a direction
    "rms_norm_forward": 1 + 1,
    "add_rms_norm_forward": 1,
    "rms_norm_backward": 2 + 1,
    "rope": 1 + 1,
    "attention_forward": 1,
    "attention_backward_queries": 1,
    "attention_backward_keys": 1,
    "gated_activation_backward": 1,
    "linear_cross_entropy_kernel": 1,
}
# The layer's forward pass again, up to the MLP's input: the MLP's backward pass decodes each of its weights once, also
# to make gate and up again, and what down_proj gave nobody needs.
RECOMPUTED = {
    "nf4_dequantize": 4,
    "rms_norm_forward": 1,
    "add_rms_norm_forward": 1,
    "rope": 1,
    "attention_forward": 1,
}


# DoRA takes the norms of every linear's rows from a product with the packed weight, once a step. For the gradient of
# the magnitudes it makes what down_proj gave again, of the weight that the backward pass decodes anyway: two products,
# with the weight and with the adapter, which keeping "mlp_out" spares.
OF_DORA = {"matvec_kernel": 7}

# Dropout has three products for each of the layer's four inputs; remat policies keep the forward ones' results, but h
# of the MLP is made and multiplied once more.
OF_DROPOUT = {"dropout_low_rank_kernel": 4, "dropout_d_A_kernel": 4, "dropout_d_x_kernel": 4}


def lowered_step(remat: str, **settings: Any) -> str:
    """Of a decoder with an adapter of these settings; without any, with one that trains already."""
    # Biases, so that there are some to train.
    hf = hf_config(attention_bias=True, mlp_bias=True) if "bias" in settings else hf_config()
    decoder = decoder_of(hf, quantization="nf4", remat=remat)
    if settings:
        lora.attach(decoder, lora.LoraConfig(r=4, **settings), key=jax.random.key(0))
    else:
        decoder = with_adapter(decoder)
    graphdef, trainable, frozen = labels.split(decoder)
    names = {str(path[-1]) for path in nnx.to_flat_state(trainable).paths}
    assert ("bias" in names) == ("bias" in settings), "biases train where they are meant"
    frozen = frozen_for(decoder, frozen)
    tx = optax.sgd(1.0)
    batch = batch_of(random_examples([9, 4, 12, 7]), [[0, 1], [2, 3]], 32)
    loss = functools.partial(losses.sft, dropout_key=jax.random.key(0))  # of use only where adapters drop something
    step = make_train_step(graphdef, loss, tx)
    return step.trace(trainable, frozen, tx.init(trainable), batch).lower(lowering_platforms=("cuda",)).as_text()


# "full" is among the slow ones because DoRA's test below has all of its kernels.
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_the_kernels_are_in_the_step_once_each_where_expected(remat: str) -> None:
    with h100():
        counts = kernel_names(lowered_step(remat))
    again = RECOMPUTED if remat == "full" else {}
    assert counts == {name: count + again.get(name, 0) for name, count in WITHOUT_REMAT.items()}


def test_decoded_weights_are_not_decoded_again() -> None:
    with h100():
        counts = kernel_names(lowered_step("none,weights"))
    assert "nf4_dequantize" not in counts
    assert counts["attention_forward"] == 2  # straight code: one for each layer


@pytest.mark.slow
def test_dora_has_the_same_kernels_and_a_product_for_its_norms() -> None:
    with h100():
        plain, full, kept = lowered_step("mlp_out"), *(lowered_step(p, use_dora=True) for p in ("full", "mlp_out"))
    expected = {name: count + RECOMPUTED.get(name, 0) for name, count in WITHOUT_REMAT.items()}
    assert kernel_names(plain) == expected
    assert kernel_names(full) == kernel_names(kept) == {**expected, **OF_DORA}
    assert full.count("dot_general") == kept.count("dot_general") + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"use_rslora": True}, {}),
        ({"bias": "all"}, {}),
        ({"modules_to_save": ("embed_tokens", "norm")}, {}),
        ({"lora_dropout": 0.1}, OF_DROPOUT),
    ],
)
def test_kinds_of_adapters_have_the_same_kernels(settings: dict[str, Any], more: dict[str, int]) -> None:
    with h100():
        counts = kernel_names(lowered_step("none", **settings))
    assert counts == {**WITHOUT_REMAT, **more}


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the default there is what the test above shows")
def test_a_program_whose_ops_chose_for_a_cpu_has_none() -> None:
    """Negative control: outside of `h100` the ops choose XLA."""
    assert not kernel_names(lowered_step("none"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"tiny"}))
def test_steps_of_real_shapes_lower_for_a_gpu(name: str) -> None:
    """From shapes alone; what the kernels of these sizes need of a GPU is not known here."""
    decoder = abstract_model(MODELS[name], jnp.bfloat16, LoraConfig(r=16), "nf4")
    decoder.remat = "offload"
    graphdef, trainable, frozen = labels.split(decoder)
    tx = optax.sgd(1.0)
    batch = jax.eval_shape(lambda: random_batch(MODELS[name], 2, 2048))
    step = make_train_step(graphdef, losses.sft, tx)
    with h100():
        arguments = (trainable, frozen, jax.eval_shape(tx.init, trainable), batch)
        counts = kernel_names(step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text())
    assert {"nf4_dequantize", "rms_norm_forward", "rope", "linear_cross_entropy_kernel"} <= set(counts)
    ours = MODELS[name].attention_soft_cap is not None or MODELS[name].attention_sinks
    assert ("attention_forward" in counts) == ours, "cuDNN's attention is the choice without soft caps and sinks"
