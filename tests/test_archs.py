"""Every architecture of the registry: the same numbers as transformers' own class, in every way that it can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from arch_cases import CASES, arch_config, families, smallest, tokens
from converters.archs import ARCHS
from jaxft import losses
from jaxft.data.batch import Batch
from jaxft.models.decoder import Decoder
from llama_cases import gradient_summary
from models import batch_of, decoder_of, hf_gradients, plain_examples, through_cache, train_everything
from tiny import random_tensors

VECTORS = load_file(Path(__file__).parent / "vectors" / "archs.safetensors")
# float32 through a few layers: both sides round, so a few hundred units in the last place of O(1) logits.
TOLERANCE = 1e-4


def loss_and_logits(decoder: Decoder, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
    """(gradients of all parameters, mean loss, logits [B, T, V]) of one micro-batch [1, B, T]."""
    graphdef, params = nnx.split(train_everything(decoder))
    one = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)

    @jax.jit
    def run(params: nnx.State, one: Batch) -> Any:
        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            total, weight, _ = losses.sft(model, one)
            return total / weight, model.logits(model(one.tokens, segment_ids=one.segment_ids))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, logits), gradients = run(params, one)
    return gradients, value, logits


def check_gradients(gradients: dict[str, np.ndarray], expected: np.ndarray) -> None:
    """Each within TOLERANCE of its own norm, as far as the stored norm and projections tell."""
    for name, (norm, *projections) in zip(sorted(gradients), expected, strict=True):
        found = gradient_summary(name, gradients[name])
        assert norm > 0, name
        np.testing.assert_allclose(found, [norm, *projections], atol=TOLERANCE * norm, rtol=0, err_msg=name)


@pytest.mark.parametrize("family", families())
def test_packed_rows_equal_torchs_documents(family: str) -> None:
    """Logits and the loss gradients of all parameters, of both documents in one row."""
    case = smallest(family)
    config = arch_config(family, case)
    ids = tokens(config)
    expected = VECTORS[f"{family}/{case}/logits"]
    assert expected.std() > 0.3, "the case is degenerate"
    packed = batch_of(plain_examples(ids), [[0, 1]], ids.size)
    gradients, _, logits = loss_and_logits(decoder_of(config), packed)
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=TOLERANCE, rtol=TOLERANCE)
    check_gradients(hf_gradients(gradients, config), VECTORS[f"{family}/{case}/gradients"])


@pytest.mark.parametrize("family", families())
def test_the_cache_gives_torchs_logits(family: str) -> None:
    case = smallest(family)
    config = arch_config(family, case)
    decoder = decoder_of(config)
    hidden = through_cache(decoder, jnp.asarray(tokens(config), jnp.int32), prefill=5)
    np.testing.assert_allclose(
        decoder.logits(hidden), VECTORS[f"{family}/{case}/logits"], atol=TOLERANCE, rtol=TOLERANCE
    )


def test_every_architecture_has_cases() -> None:
    assert set(CASES) == set(ARCHS)


def test_changing_a_weight_is_noticed() -> None:
    """Negative control of the comparisons above."""
    config = arch_config("llama", smallest("llama"))
    decoder = decoder_of(config)
    weight = decoder.model.layers.self_attn.k_proj.weight
    weight.set_value(weight.get_value().at[1, 0, 0].add(0.05))
    ids = tokens(config)
    gradients, _, logits = loss_and_logits(decoder, batch_of(plain_examples(ids), [[0], [1]], ids.shape[1]))
    assert np.abs(logits - VECTORS[f"llama/{smallest('llama')}/logits"]).max() > 2 * TOLERANCE
    with pytest.raises(AssertionError):
        check_gradients(hf_gradients(gradients, config), VECTORS[f"llama/{smallest('llama')}/gradients"])
