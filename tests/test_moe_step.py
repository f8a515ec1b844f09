"""The train steps of models with experts, lowered for an H100: the kernels are in them, copies of experts are not."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.train import MODELS, random_batch, random_decoder
from jaxft import lora, losses, optim
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.train.step import make_train_step
from lowering import h100, kernel_names


def abstract(model: str, quant: str) -> Decoder:
    """The benchmark's decoder with adapters, shapes only."""

    def make() -> Decoder:
        decoder = random_decoder(MODELS[model], quant)
        lora.attach(decoder, lora.LoraConfig(r=16), key=jax.random.key(0), dtype=jnp.bfloat16)
        return decoder

    return nnx.eval_shape(make)


def lowered_step(decoder: Decoder, rows: int, length: int) -> str:
    graphdef, trainable, frozen = labels.split(decoder)
    tx = optim.optimizer("adamw_8bit", 1e-3)
    batch = jax.eval_shape(lambda: random_batch(decoder.config, rows, length))
    inputs: Any = (trainable, frozen, jax.eval_shape(tx.init, trainable), batch)
    step: Any = make_train_step(graphdef, losses.sft, tx, remat=decoder.remat)
    return step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "quant"), [("qwen3-30b-a3b", "none"), ("gpt-oss-20b", "mxfp4"), ("tiny-moe", "none")]
)
def test_a_step_lowers_with_its_kernels(model: str, quant: str) -> None:
    config = MODELS[model]
    decoder = abstract(model, quant)
    decoder.remat = "full"
    with h100():
        text = lowered_step(decoder, 2, 128)
    counts = kernel_names(text)
    # A body a kind of block: gate, up and down, each with A x first; backward with dh first; once more without down.
    bodies = len(
        {config.layer_facts(i) for i in range(config.num_hidden_layers) if config.mlp_layer_types[i] == "sparse"}
    )
    assert counts["grouped_matmul_kernel"] == bodies * (6 + 6 + 5)
    assert counts["grouped_sums_kernel"] == bodies * 6
    assert config.moe is not None
    f, d = config.moe.moe_intermediate_size, config.hidden_size
    decoded = re.findall(rf"-> tensor<{config.moe.num_experts}x{f}x{d}xbf16>", text)
    assert bool(decoded) == (quant == "mxfp4"), "experts in bfloat16 are read out of their stack"
