"""How tokens are drawn: filters against plain references, frequencies against the exact distribution."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxft.errors import JaxftError
from jaxft.generate import Sampling, complete
from jaxft.generation.sampling import filter_logits, sample
from models import decoder_of, hidden_states


def reference_filter(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Row by row, in plain words: the k largest, of them the fewest whose probability reaches p, and those near the
    largest."""
    result = np.full_like(logits, -np.inf)
    for row, kept in zip(logits, result, strict=True):
        order = np.argsort(-row)
        order = order[: sampling.top_k] if sampling.top_k else order
        weights = np.exp(row[order].astype(np.float64) - row.max())
        mass = np.cumsum(weights / weights.sum())
        count = int(np.searchsorted(mass, sampling.top_p)) + 1 if sampling.top_p < 1 else len(order)
        near = weights >= sampling.min_p
        order = order[(np.arange(len(order)) < count) & near]
        kept[order] = row[order]
    return result


def reference_probabilities(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> np.ndarray:
    """float64 [V], the exact distribution of the next token."""
    penalty = np.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    logits = np.where(seen, logits * penalty, logits) / sampling.temperature
    weights = np.exp(reference_filter(logits[None].astype(np.float32), sampling)[0].astype(np.float64))
    return weights / weights.sum()


@pytest.mark.parametrize("min_p", [0.0, 0.07, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.97, 0.5, 0.03])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
def test_filter_equals_the_plain_reference(top_k: int, top_p: float, min_p: float):
    logits = np.random.default_rng(0).standard_normal((6, 263), np.float32) * 3
    sampling = Sampling(1.0, top_k, top_p, min_p)
    np.testing.assert_array_equal(filter_logits(jnp.asarray(logits), sampling), reference_filter(logits, sampling))


LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -3.0, -0.5], np.float32)
SEEN = np.array([True, False, False, True, True, False, False, False])
CASES = {
    "temperature": Sampling(0.7),
    "top_k": Sampling(1.0, top_k=4),
    "top_p": Sampling(1.0, top_p=0.8),
    "min_p": Sampling(1.0, min_p=0.2),
    "repetition penalty": Sampling(1.0, repetition_penalty=1.7),
    "all": Sampling(1.4, top_k=6, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
}


def p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's chi-square test; 0 where something was drawn that cannot be."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    expected = probabilities[possible] * len(tokens)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, possible.sum() - 1))


@pytest.mark.parametrize("name", CASES)
def test_frequencies_pass_a_chi_square_test(name: str):
    """10,000 draws; they fail it against the distribution of plain sampling."""
    sampling, n = CASES[name], 10_000
    logits, seen = (jnp.broadcast_to(array, (n, len(LOGITS))) for array in (LOGITS, SEEN))
    keys = jax.random.split(jax.random.key(0), n)
    # Arguments, because constants would be folded, slowly.
    tokens, log_probs = jax.jit(partial(sample, sampling=sampling))(logits, keys, seen_BV=seen)
    tokens = np.asarray(tokens)
    assert p_value(tokens, reference_probabilities(LOGITS, sampling, SEEN)) > 0.01
    assert p_value(tokens, reference_probabilities(LOGITS, Sampling(1.0), SEEN)) < 1e-6
    own = LOGITS.astype(np.float64) / sampling.temperature
    np.testing.assert_allclose(log_probs, (own - np.log(np.exp(own).sum()))[tokens], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_frequencies_of_a_models_tokens():
    """The first token of 1,000 completions, in slots that are refilled, and the second one given the most frequent."""
    decoder, prompt = decoder_of(), [5, 6, 7]
    sampling = Sampling(0.8, top_k=5, repetition_penalty=1.5)
    found = complete(
        decoder, [prompt], max_new_tokens=2, num_return_sequences=1000, sampling=sampling, batch_size=128
    ).tokens
    first = np.array([row[0] for row in found])
    most = int(np.bincount(first).argmax())
    for context, drawn in (([], first), ([most], np.array([row[1] for row in found if row[0] == most]))):
        logits = np.asarray(decoder.logits(hidden_states(decoder, [[*prompt, *context]])))[0, -1]
        seen = np.isin(np.arange(len(logits)), [*prompt, *context])
        assert len(drawn) > 200
        assert p_value(drawn, reference_probabilities(logits, sampling, seen)) > 0.01


@pytest.mark.slow
def test_the_penalty_counts_for_greedy_tokens_too():
    """No token of the prompt or the completion comes again."""
    prompt, sampling = [5, 6, 7], Sampling(repetition_penalty=1e6)
    tokens = complete(decoder_of(), [prompt], max_new_tokens=60, sampling=sampling).tokens[0]
    assert len({*prompt, *tokens}) == 63


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_bad_settings_are_named(field: str, value: float):
    with pytest.raises(JaxftError, match=f"{field}: must .*{value}"):
        Sampling(**{field: value})
