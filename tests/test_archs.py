"""Every architecture of the registry: the same numbers as transformers' own class, in every way that it can be run."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import pallas_kernels as pk
from arch_cases import CASES, GGUF_CASES, arch_config, families, greedy_is_compared, smallest, tokens
from converters.archs import ARCHS, models_markdown
from jaxft.data.batch import Batch
from jaxft.lora import LoraConfig
from jaxft.lora.targets import linears, resolved
from jaxft.models.decoder import Decoder, abstract_decoder
from llama_cases import gradient_summary
from models import batch_of, decoder_of, hf_gradients, plain_examples, through_cache, train_everything
from readme import README

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


def test_the_table_claims_what_cases_compare() -> None:
    """`jaxft models` and the README: of each row, greedy tokens and GGUF as far as there are cases for them."""
    in_gguf = {family for family, _ in GGUF_CASES}
    for family, spec in ARCHS.items():
        without = {case for case in CASES[family] if not greedy_is_compared(family, case)}
        kinds = {spec.decoder_config(arch_config(family, case), case).rope.kind for case in without}
        assert kinds == set(spec.no_greedy), family
        assert len(without) < len(CASES[family])
        assert (spec.gguf is not None) == (family in in_gguf), family


def test_the_readmes_table_is_the_registrys() -> None:
    (table,) = re.findall(r"<!-- models: start -->\n(.*?)\n<!-- models: end -->", README.read_text(), re.DOTALL)
    assert table == models_markdown()


def test_the_default_adapter_is_of_every_linear() -> None:
    """ALL_LINEAR and "all-linear" mean the architecture's own, MLA's projections too; a shorter list what it names."""
    for family in families():
        decoder = abstract_decoder(ARCHS[family].decoder_config(arch_config(family, smallest(family)), family), "f4")
        there = {path.rsplit(".", 1)[1] for path in linears(decoder)}
        for config in (LoraConfig(), LoraConfig(target_modules="all-linear")):
            assert set(resolved(decoder, config).target_modules) == there, family
        if family.startswith("deepseek"):
            assert there >= {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
        assert resolved(decoder, LoraConfig(target_modules=("o_proj",))).target_modules == ("o_proj",)


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
