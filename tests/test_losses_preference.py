"""Preference losses: values and gradients against the papers' formulas, packing, the reference, what is never held."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import loss_references as references
from jaxft import lora, losses
from jaxft.data.batch import Batch, Example, PairBatch, Pairs, UnpairedBatch, lay_out
from jaxft.errors import JaxftError
from jaxft.losses import KTOLoss, PreferenceLoss
from jaxft.losses.preference import of_pairs, of_unpaired, pair_log_probs
from jaxft.losses.tokens import TokenLogProbs, sequence_sums, token_log_probs
from jaxft.models import labels
from jaxpr_tools import all_avals, max_elements
from models import decoder_of, with_adapter
from tiny import hf_config

# Tokens of (prompt, completion): pairs are neighbours. One completion is empty, one is a single token.
LENGTHS = [(3, 5), (3, 2), (1, 7), (1, 0), (4, 1), (4, 6), (2, 3), (2, 3)]
ROWS = [[0, 1, 2, 3], [4, 5], [6, 7]]
CASES = [
    PreferenceLoss("sigmoid", beta=0.3),
    PreferenceLoss("sigmoid", beta=0.3, label_smoothing=0.2),
    PreferenceLoss("robust", beta=0.3, label_smoothing=0.2),
    PreferenceLoss("hinge", beta=0.3),
    PreferenceLoss("ipo", beta=0.3),
    PreferenceLoss("simpo", beta=2.0, simpo_gamma=0.7),
    PreferenceLoss("simpo", beta=2.0, label_smoothing=0.1),
    PreferenceLoss("cpo", beta=0.3, cpo_alpha=0.5),
    PreferenceLoss("orpo", beta=0.3),
]


def name_of(settings: Any) -> str:
    return "-".join(str(value) for value in dataclasses.astuple(settings))


def text_of(vocab_size: int = 300, length: int = 24, lengths: Any = LENGTHS, rows: Any = ROWS) -> Batch:
    """[B, T]: documents of a prompt and a completion."""
    rng = np.random.default_rng(0)
    examples = [
        Example(f"row {i}", rng.integers(0, vocab_size, p + c, np.int32), np.arange(p + c) >= p)
        for i, (p, c) in enumerate(lengths)
    ]
    return lay_out(examples, rows, length)


def pairs_of(text: Batch, reference: Pairs | None) -> PairBatch:
    """Two pairs a row, of which the second and the third row have one."""
    mask = np.array([[1, 1], [1, 0], [1, 0]], np.float32)
    weight = np.float32(mask.sum() / text.loss_mask[(text.segment_ids % 2 == 1)].sum())
    return PairBatch(text, mask, mask * weight, reference)


def random_log_probs(text: Batch, seed: int) -> np.ndarray:
    """float64 [B, T], 0 where nothing is learnt."""
    return -np.random.default_rng(seed).exponential(0.8, text.tokens.shape) * (text.loss_mask != 0)


def in_float64(function: Any, *arguments: Any) -> Any:
    """`function` of the arguments with all their floats in float64."""
    double = lambda x: np.float64(x) if np.asarray(x).dtype == np.float32 else x  # noqa: E731
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(double, arguments)))


@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_pairs_equal_the_papers_formulas(settings: PreferenceLoss) -> None:
    text = text_of()
    new, ref = random_log_probs(text, 1), random_log_probs(text, 2)
    batch = pairs_of(text, None)
    kept = [(0, 0), (0, 1), (1, 0), (2, 0)]
    if settings.loss_type == "orpo":  # the odds of an empty completion are infinite: leave that pair out
        kept.remove((0, 1))
        batch.pair_mask[0, 1] = 0

    def ours(log_probs: jax.Array, ref: jax.Array, batch: Any) -> Any:
        learnt = batch.text.loss_mask != 0
        tokens = (TokenLogProbs(jnp.where(learnt, x, 0), jnp.zeros_like(x)) for x in (log_probs, ref))
        policy, reference = (pair_log_probs(x, batch) for x in tokens)
        total, weight, metrics = of_pairs(policy, reference, batch, settings)
        return total / weight, metrics

    factor = {"orpo": 1.0, "cpo": settings.cpo_alpha}.get(settings.loss_type, 0.0)

    def paper(log_probs: np.ndarray) -> complex:
        policy, reference = (references.completions(x, text.segment_ids, text.loss_mask) for x in (log_probs, ref))
        total = 0
        for row, pair in kept:
            two = slice(2 * pair, 2 * pair + 2)
            total += references.pair_loss(settings.loss_type, *policy[row][two], *reference[row][two], settings)
            total -= factor * float(batch.nll_weight[row, pair]) * np.sum(policy[row][2 * pair])
        return total / len(kept)

    (value, metrics), gradient = in_float64(jax.value_and_grad(ours, has_aux=True), new, ref, batch)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, paper(new.astype(complex)).real, rtol=1e-10)
    np.testing.assert_allclose(gradient, references.gradient(paper, new), rtol=1e-8, atol=1e-12)
    assert metrics["rewards/margins"][1] == len(kept)
    np.testing.assert_allclose(
        metrics["rewards/margins"][0], metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]
    )


def test_a_certain_completion_has_finite_odds() -> None:
    settings = PreferenceLoss("orpo")
    batch = jax.tree.map(jnp.asarray, pairs_of(text_of(), None))

    def loss(chosen: jax.Array) -> jax.Array:
        return of_pairs(Pairs(chosen, jnp.full((3, 2), -1.0)), None, batch, settings)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.zeros((3, 2)))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("baseline", [0.4, -0.3])
def test_kto_equals_the_papers_formula(baseline: float) -> None:
    settings = KTOLoss(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    text = text_of()
    new, ref = random_log_probs(text, 1), random_log_probs(text, 2)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], np.float32)
    liked = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], np.float32)
    batch = UnpairedBatch(text, mask, liked, np.float32(baseline))

    def ours(log_probs: jax.Array, ref: jax.Array, batch: Any) -> Any:
        learnt = batch.text.loss_mask != 0
        masked = (jnp.where(learnt, x, 0) for x in (log_probs, ref))
        policy, reference = (sequence_sums(x, batch.text.segment_ids, 4) for x in masked)
        total, weight, metrics = of_unpaired(policy, reference, batch, settings)
        return total / weight, (weight, metrics)

    def paper(log_probs: np.ndarray) -> complex:
        policy, reference = (references.completions(x, text.segment_ids, text.loss_mask) for x in (log_probs, ref))
        z = float(batch.baseline)
        return sum(
            references.kto_loss(y, y_ref, bool(liked[row, s]), z, settings)
            for row in range(3)
            for s, (y, y_ref) in enumerate(zip(policy[row], reference[row], strict=True))
        ) / int(mask.sum())

    (value, (weight, metrics)), gradient = in_float64(jax.value_and_grad(ours, has_aux=True), new, ref, batch)
    assert weight == 8
    assert metrics["rewards/chosen"][1] == 4
    np.testing.assert_allclose(value, paper(new.astype(complex)).real, rtol=1e-10)
    np.testing.assert_allclose(gradient, references.gradient(paper, new), rtol=1e-8, atol=1e-12)


def gradients(decoder: Any, batch: Any, loss: Any) -> tuple[float, dict[str, np.ndarray]]:
    """A loss (divided by its weight) of a decoder, and the gradient of each trainable leaf."""
    graphdef, trainable, frozen = labels.split(decoder)

    def run(trainable: nnx.State, batch: Any) -> jax.Array:
        total, weight, _ = loss(nnx.merge(graphdef, trainable, frozen), batch)
        return total / weight

    value, gradient = jax.jit(jax.value_and_grad(run))(trainable, batch)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return float(value), {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}


def assert_close(one: Any, two: Any, rtol: float = 1e-5) -> None:
    assert one[0] == pytest.approx(two[0], rel=rtol)
    for name, array in one[1].items():
        assert np.linalg.norm(array - two[1][name]) < rtol * np.linalg.norm(array), name


def dense_dpo(decoder: Any, base: Any, text: Batch, beta: float) -> tuple[jax.Array, jax.Array, Any]:
    """DPO of three pairs with all logits at once, each completion [8, T] in a row of its own."""

    def log_prob(model: Any) -> jax.Array:
        log_p = jax.nn.log_softmax(model.logits(model(text.tokens)))
        return jnp.sum(jnp.take_along_axis(log_p, text.targets[..., None], axis=-1)[..., 0] * text.loss_mask, axis=1)

    gain = log_prob(decoder) - jax.lax.stop_gradient(log_prob(base))
    h = jnp.stack([gain[0] - gain[1], gain[4] - gain[5], gain[6] - gain[7]])
    return jnp.sum(jax.nn.softplus(-beta * h)), jnp.float32(3), {}


@pytest.fixture(scope="module")
def decoder() -> Any:
    return with_adapter(decoder_of())


@pytest.mark.slow
def test_dpo_of_a_decoder_equals_the_dense_one(decoder: Any) -> None:
    """Packed pairs, chunked log-probabilities and the adapter switched off, against none of that."""
    batch = pairs_of(text_of(), None)
    batch.pair_mask[0, 1] = 0
    settings = PreferenceLoss(beta=0.3)
    ours = gradients(decoder, batch, partial(losses.preference, settings=settings))
    base = decoder_of()  # never had an adapter
    alone = text_of(length=10, rows=[[i] for i in range(8)])
    assert_close(ours, gradients(decoder, alone, lambda d, text: dense_dpo(d, base, text, 0.3)))
    assert abs(ours[0] - math.log(2)) > 0.01, "the reference makes no difference"


def test_reference_log_probs_given_or_computed(decoder: Any) -> None:
    batch, settings = pairs_of(text_of(), None), PreferenceLoss(beta=0.3)
    loss = partial(losses.preference, settings=settings)
    on_device = jax.tree.map(jnp.asarray, batch)
    tokens = token_log_probs(decoder_of(), on_device.text)
    given = batch._replace(reference=pair_log_probs(tokens, on_device))
    assert_close(gradients(decoder, batch, loss), gradients(decoder, given, loss))


def test_without_adapter_leaves_the_decoder_alone(decoder: Any) -> None:
    base = lora.without_adapter(decoder)
    assert not lora.adapter_tensors(base)
    assert lora.adapter_tensors(decoder)
    tokens = jnp.arange(7)[None]
    np.testing.assert_array_equal(base(tokens), decoder_of()(tokens))


@pytest.mark.parametrize("settings", [PreferenceLoss(), PreferenceLoss("orpo")], ids=name_of)
def test_no_array_of_tokens_times_vocabulary(settings: PreferenceLoss) -> None:
    hf = hf_config(vocab_size=49_152)
    wide = with_adapter(decoder_of(hf), hf)
    text = text_of(49_152, 256, [(100, 28)] * 8, [[0, 1], [2, 3], [4, 5], [6, 7]])
    batch = PairBatch(text, np.ones((4, 1), np.float32), np.ones((4, 1), np.float32))
    graphdef, trainable, frozen = labels.split(wide)

    def total(trainable: nnx.State, batch: PairBatch) -> jax.Array:
        return losses.preference(nnx.merge(graphdef, trainable, frozen), batch, settings)[0]

    def dense(trainable: nnx.State, batch: PairBatch) -> jax.Array:
        decoder = nnx.merge(graphdef, trainable, frozen)
        return jnp.sum(jax.nn.log_softmax(decoder.logits(decoder(batch.text.tokens))))

    largest = [max_elements(all_avals(jax.make_jaxpr(jax.grad(f))(trainable, batch))) for f in (total, dense)]
    assert largest[0] < text.tokens.size * 49_152 <= largest[1]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"loss_type": "dpo"}, "loss_type"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(JaxftError) as error:
        PreferenceLoss(**settings)
    assert error.value.where == where
