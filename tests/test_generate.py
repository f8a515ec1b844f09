"""Generation: greedy against repeated whole forwards, rows that know nothing of each other, sampling, settings."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.errors import JaxftError
from jaxft.generate import BUCKET, Sampling, filter_logits, generate, sample
from jaxft.models.decoder import Decoder
from llama_cases import case_config
from models import decoder_of, with_adapter

HF = case_config("one kv head, odd sizes, linear rope")
NEW = 9
# The third ends at a bucket's border, so its new tokens are the first of the next.
LENGTHS = (3, 11, BUCKET, 1, 26)
SAMPLING = Sampling(temperature=1.3, top_k=40, top_p=0.9)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """With a non-zero adapter."""
    return with_adapter(decoder_of(HF), HF)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, HF["vocab_size"], length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def greedy(decoder: Decoder, prompts: list[list[int]]) -> list[list[int]]:
    return generate(decoder, prompts, max_new_tokens=NEW)


def by_whole_forwards(decoder: Decoder, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Greedy tokens without a cache: each from a forward over the row so far."""
    graphdef, params = nnx.split(decoder)

    @jax.jit
    def forward(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens))

    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), max(lengths) + new), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    for step in range(new):
        logits = np.asarray(forward(params, tokens))
        for row, length in enumerate(lengths):
            # What stands behind is still zero, and causal attention does not see it.
            tokens[row, length + step] = logits[row, length + step - 1].argmax()
    return [tokens[row, length : length + new].tolist() for row, length in enumerate(lengths)]


def test_greedy_equals_whole_forwards(decoder, prompts, greedy):
    assert greedy == by_whole_forwards(decoder, prompts, NEW)
    assert len({tuple(row) for row in greedy}) == len(prompts), "the rows do not tell apart"
    assert len({token for row in greedy for token in row}) > 20, "the case is degenerate"


def test_a_row_does_not_depend_on_the_others(decoder, prompts, greedy):
    assert generate(decoder, prompts[::-1], max_new_tokens=NEW) == greedy[::-1]
    assert generate(decoder, [prompts[1], prompts[2], *prompts[:3]], max_new_tokens=NEW)[0] == greedy[1]


def test_end_of_sequence_ends_only_its_row(decoder, prompts, greedy):
    """Each row stops with the first of two ends that it draws; a row that draws none goes on."""
    ends = (greedy[0][2], greedy[4][5])
    found = generate(decoder, prompts, max_new_tokens=NEW, eos_token_ids=ends)
    cut = [next((i + 1 for i, token in enumerate(row) if token in ends), NEW) for row in greedy]
    assert found == [row[:n] for row, n in zip(greedy, cut, strict=True)]
    assert cut[0] <= 3
    assert NEW in cut, "no row goes on"


def test_samples_depend_on_seed_row_and_position(decoder, prompts, greedy):
    def sampled(prompts, seed, **settings):
        return generate(decoder, prompts, max_new_tokens=NEW, sampling=SAMPLING, seed=seed, **settings)

    first = sampled(prompts, 1)
    assert sampled(prompts, 1) == first
    assert sampled(prompts, 1, batch_size=2) == first
    assert sampled(prompts[:1] * 5, 1)[0] == first[0]
    other = sampled(prompts, 2)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert all(a != b for a, b in zip(first, greedy, strict=True))
    same_prompt = sampled(prompts[:1] * 5, 1)
    assert len(set(map(tuple, same_prompt))) == 5, "rows share their noise"


def test_the_one_most_likely_token_is_greedy(decoder, prompts, greedy):
    found = generate(decoder, prompts, max_new_tokens=1, sampling=Sampling(temperature=2.0, top_k=1))
    assert found == [row[:1] for row in greedy]
    assert generate(decoder, [], max_new_tokens=1) == []


def reference_filter(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Row by row, in plain words: keep the k largest, then the fewest whose probability reaches p."""
    result = np.full_like(logits, -np.inf)
    for row, kept in zip(logits, result, strict=True):
        order = np.argsort(-row)
        order = order[:top_k] if top_k else order
        weights = np.exp(row[order].astype(np.float64) - row.max())
        mass = np.cumsum(weights / weights.sum())
        order = order[: int(np.searchsorted(mass, top_p)) + 1] if top_p < 1 else order
        kept[order] = row[order]
    return result


@pytest.mark.parametrize("top_p", [1.0, 0.97, 0.5, 0.03])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
def test_filter_equals_the_plain_reference(top_k: int, top_p: float):
    logits = np.random.default_rng(0).standard_normal((6, 263), np.float32) * 3
    found = filter_logits(jnp.asarray(logits), Sampling(1.0, top_k, top_p))
    np.testing.assert_array_equal(found, reference_filter(logits, top_k, top_p))


def test_frequencies_are_the_softmax_of_what_is_kept():
    """40,000 draws: every frequency within four standard errors, and nothing that was left out."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
    sampling, n = Sampling(temperature=0.7, top_k=5, top_p=0.95), 40_000
    kept = reference_filter(logits[None] / np.float32(0.7), 5, 0.95)[0]
    expected = np.exp(kept) / np.exp(kept).sum()
    assert (expected > 0).sum() == 3
    keys = jax.random.split(jax.random.key(0), n)
    draws = sample(jnp.broadcast_to(logits, (n, 6)), keys, sampling)
    found = np.bincount(draws, minlength=6) / n
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[1, 2], []], {}, "prompt 1: is empty"),
        ([[1] * 250], {"max_new_tokens": 7}, "prompt 0: has 250 tokens, and 7 more pass the model's limit of 256"),
        ([[1], [5, 263]], {}, "prompt 1: has the token id 263, and the model has only 263 embeddings"),
        ([[1], [-1]], {}, "prompt 1: has the token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: must be at least 1, not 0"),
        ([[1]], {"batch_size": 0}, "batch_size: must be at least 1, not 0"),
    ],
)
def test_bad_prompts_are_named(decoder, prompts, settings, words):
    with pytest.raises(JaxftError, match=words):
        generate(decoder, prompts, **{"max_new_tokens": 1, **settings})


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_p", float("nan"))]
)
def test_bad_settings_are_named(field: str, value: float):
    with pytest.raises(JaxftError, match=f"{field}: must .*{value}"):
        Sampling(**{field: value})
