"""Every architecture of the registry: the same numbers as transformers' own class, in every way that it can be run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import pallas_kernels as pk
from arch_cases import CASES, arch_config, families, smallest, tokens
from converters.archs import ARCHS
from jaxft.data.batch import Batch
from jaxft.models.decoder import Decoder
from llama_cases import gradient_summary
from models import batch_of, decoder_of, hf_gradients, plain_examples, through_cache, train_everything

FOLDER = Path(__file__).parent / "vectors"
VECTORS = {**load_file(FOLDER / "archs.safetensors"), **load_file(FOLDER / "archs_moe.safetensors")}
# float32 through a few layers: both sides round, so a few hundred units in the last place of O(1) logits.
TOLERANCE = 1e-4


@functools.cache
def smallest_decoder(family: str) -> Decoder:
    """Of the family's smallest case; shared, so it is only read."""
    return train_everything(decoder_of(arch_config(family, smallest(family))))


def loss_and_logits(decoder: Decoder, batch: Batch) -> tuple[Any, jax.Array]:
    """(gradients of the mean loss for all parameters, logits [B, T, V]) of one micro-batch [1, B, T]."""
    graphdef, params = nnx.split(decoder)
    one = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)

    def loss(params: nnx.State, one: Batch) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        hidden = model(one.tokens, segment_ids=one.segment_ids)
        rows = hidden.reshape(-1, hidden.shape[-1])
        targets, weights = one.targets.reshape(-1), one.loss_mask.reshape(-1)
        total, weight = pk.linear_cross_entropy(rows, model.head(), targets, weights, **model.head_settings())
        return total / weight, model.logits(hidden)

    return jax.jit(jax.grad(loss, has_aux=True))(params, one)


def check_gradients(gradients: dict[str, np.ndarray], expected: np.ndarray) -> None:
    """Each within TOLERANCE of its own norm, as far as the stored norm and projections tell."""
    for name, (norm, *projections) in zip(sorted(gradients), expected, strict=True):
        found = gradient_summary(name, gradients[name])
        without = (".experts.", "e_score_correction_bias")  # experts that no token goes to, and what only chooses them
        assert norm > 0 or any(part in name for part in without), name
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
    gradients, logits = loss_and_logits(smallest_decoder(family), packed)
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=TOLERANCE, rtol=TOLERANCE)
    check_gradients(hf_gradients(gradients, config), VECTORS[f"{family}/{case}/gradients"])


@pytest.mark.parametrize("family", families())
def test_the_cache_gives_torchs_logits(family: str) -> None:
    case = smallest(family)
    config = arch_config(family, case)
    decoder = smallest_decoder(family)
    hidden = through_cache(decoder, jnp.asarray(tokens(config), jnp.int32), prefill=1)
    np.testing.assert_allclose(
        decoder.logits(hidden), VECTORS[f"{family}/{case}/logits"], atol=TOLERANCE, rtol=TOLERANCE
    )


def test_every_architecture_has_cases() -> None:
    assert set(CASES) == set(ARCHS)


def test_changing_a_weight_is_noticed() -> None:
    """Negative control of the comparisons above."""
    config = arch_config("llama", smallest("llama"))
    decoder = train_everything(decoder_of(config))
    weight = decoder.model.layers.self_attn.k_proj.weight
    weight.set_value(weight.get_value().at[1, 0, 0].add(0.05))
    ids = tokens(config)
    gradients, logits = loss_and_logits(decoder, batch_of(plain_examples(ids), [[0], [1]], ids.shape[1]))
    assert np.abs(logits - VECTORS[f"llama/{smallest('llama')}/logits"]).max() > 2 * TOLERANCE
    with pytest.raises(AssertionError):
        check_gradients(hf_gradients(gradients, config), VECTORS[f"llama/{smallest('llama')}/gradients"])
