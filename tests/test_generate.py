"""Generation: greedy against repeated whole forwards, rows that know nothing of each other, sampling, settings."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft import lora
from jaxft.errors import JaxftError
from jaxft.generate import BUCKET, CHUNK, Sampling, bucket, complete, generate, room
from jaxft.generation import slots as device
from jaxft.generation.text import StopStrings, TextStream
from jaxft.models.decoder import Decoder
from llama_cases import ALPHA, RANK, adapter, case_config
from models import decoder_of, hidden_states, with_adapter
from pallas_kernels import selected_log_probs

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


def test_weights_apart_change_nothing(
    decoder: Decoder, prompts: list[list[int]], greedy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where many tokens are drawn and the device has room, each layer's weights are an array of their own."""
    monkeypatch.setattr("jaxft.generate.MANY_STEPS", 1)
    monkeypatch.setattr("jaxft.generate._free_memory", lambda: 2**40)
    assert generate(decoder, prompts, max_new_tokens=NEW) == greedy


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


@pytest.mark.slow
def test_dora_is_decoded_as_it_trains(prompts):
    """Its row scale needs the factors, which decoding reads from their stacks."""
    decoder = decoder_of(HF)
    lora.attach(decoder, lora.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True), key=jax.random.key(0))
    lora.load_adapter_tensors(decoder, lora.adapter_tensors(decoder) | adapter(HF, RANK))
    found = generate(decoder, prompts, max_new_tokens=NEW)
    assert found == by_whole_forwards(decoder, prompts, NEW)
    assert found != by_whole_forwards(with_adapter(decoder_of(HF), HF), prompts, NEW), "the scale changes nothing"


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


# Log-probabilities.


@pytest.mark.parametrize(
    ("sampling", "new"),
    [
        (Sampling(), NEW),
        # The cache grows on the way.
        (Sampling(1.3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2), 2 * CHUNK + 5),
    ],
    ids=["greedy", "sampled"],
)
def test_log_probs_are_the_training_forwards(decoder, prompts, sampling, new):
    """In float32 to 1e-4, whatever the filters."""
    found = complete(decoder, prompts, max_new_tokens=new, sampling=sampling)
    assert isinstance(found.log_probs, jax.Array)
    assert found.log_probs.shape == (len(prompts), new)
    rows = [prompt + tokens for prompt, tokens in zip(prompts, found.tokens, strict=True)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    hidden = hidden_states(decoder, tokens)[:, :-1].reshape(-1, HF["hidden_size"])
    scale = 1 / (sampling.temperature or 1)
    expected = selected_log_probs(hidden, decoder.head(), tokens[:, 1:].reshape(-1), logit_scale=scale)[0]
    expected = np.asarray(expected).reshape(len(rows), -1)
    for i, prompt in enumerate(prompts):
        of_new = expected[i, len(prompt) - 1 : len(prompt) - 1 + new]
        np.testing.assert_allclose(found.log_probs[i], of_new, rtol=0, atol=1e-4)
        assert np.std(of_new) > 0.1, "the case is degenerate"


def test_log_probs_end_with_their_row(decoder, prompts, greedy):
    found = complete(decoder, prompts, max_new_tokens=NEW, eos_token_ids=[greedy[0][2], greedy[4][5]])
    assert found.finished == [row[-1] in (greedy[0][2], greedy[4][5]) for row in found.tokens]
    assert set(found.finished) == {True, False}
    drawn = np.arange(NEW)[None, :] < np.array([len(row) for row in found.tokens])[:, None]
    np.testing.assert_array_equal(np.asarray(found.log_probs) != 0, drawn)


# Rows and what else is in the batch.


def test_a_row_is_the_same_bit_for_bit_whatever_the_others_hold(decoder, prompts):
    """Other prompts (of the same bucket), other seeds, other ends: tokens and log-probabilities of the row stay."""
    rng = np.random.default_rng(1)
    settings = {"max_new_tokens": CHUNK + 9, "sampling": SAMPLING}
    first = complete(decoder, prompts, seed=[7, 1, 2, 3, 4], **settings)
    for seed in range(3):
        others = [rng.integers(0, HF["vocab_size"], rng.integers(1, BUCKET)).tolist() for _ in prompts[1:]]
        ends = set(range(263)) - set(first.tokens[0])
        found = complete(
            decoder, [prompts[0], *others], seed=[7, *range(seed + 9, seed + 13)], eos_token_ids=ends, **settings
        )
        assert found.tokens[0] == first.tokens[0]
        np.testing.assert_array_equal(found.log_probs[0], first.log_probs[0])
        assert not set(map(tuple, found.tokens[1:])) & set(map(tuple, first.tokens[1:])), "the others are no others"
    assert complete(decoder, prompts, seed=[8, 1, 2, 3, 4], **settings).tokens[0] != first.tokens[0]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_other_shapes_change_log_probs_by_rounding_only(decoder, prompts, greedy, batch_size):
    """Fewer slots, refilled: the same greedy tokens, log-probabilities within 1e-4."""
    first = complete(decoder, prompts, max_new_tokens=NEW)
    found = complete(decoder, prompts, max_new_tokens=NEW, batch_size=batch_size)
    assert found.tokens == first.tokens == greedy
    np.testing.assert_allclose(found.log_probs, first.log_probs, rtol=0, atol=1e-4)


def test_what_is_left_goes_on_in_fewer_slots(decoder, prompts, monkeypatch):
    """Five slots, of which the last needs longest: two, then one, the same tokens, log-probabilities within 1e-4."""
    sizes = []
    compact = device.compact
    monkeypatch.setattr(device, "compact", lambda slots, which: sizes.append(len(which)) or compact(slots, which))
    settings = {"max_new_tokens": [3, 2, 4, 20, 20 + CHUNK + 8]}
    first = complete(decoder, prompts, **settings)
    assert not sizes
    found = complete(decoder, prompts, compact=True, **settings)
    assert sizes == [2, 1]
    assert found.tokens == first.tokens
    np.testing.assert_allclose(found.log_probs, first.log_probs, rtol=0, atol=1e-4)
    assert found.utilisation > 0.9 > 0.5 > first.utilisation
    # A slot that is free stays while a completion waits for it.
    again = complete(decoder, prompts, compact=True, batch_size=2, **settings)
    assert again.tokens == first.tokens
    assert sizes == [2, 1, 1]


def test_a_prompt_runs_once_for_its_group(decoder, prompts, monkeypatch):
    """Slots fewer than the group, so that it is refilled in its midst."""
    calls = []
    prefill = device.prefill
    monkeypatch.setattr(device, "prefill", lambda *arguments: calls.append(arguments[2]) or prefill(*arguments))
    settings = {"max_new_tokens": NEW, "sampling": SAMPLING, "seed": list(range(12)), "batch_size": 3}
    groups = complete(decoder, prompts[:3], num_return_sequences=4, **settings)
    assert sum(row.any() for tokens in calls for row in tokens) == 3  # the rest is padding
    singles = complete(decoder, [prompt for prompt in prompts[:3] for _ in range(4)], **settings)
    assert groups.tokens == singles.tokens
    np.testing.assert_array_equal(groups.log_probs, singles.log_probs)
    assert len(set(map(tuple, groups.tokens))) == 12


def test_every_prompt_has_its_own_limit(decoder, prompts, greedy):
    limits = [3, 9, 1, 5, 2]
    found = complete(decoder, prompts, max_new_tokens=limits, batch_size=2)
    assert found.tokens == [row[:limit] for row, limit in zip(greedy, limits, strict=True)]
    assert found.log_probs.shape == (5, 9)


def test_new_lengths_compile_nothing_new(decoder, prompts):
    settings = {"batch_size": 2, "sampling": Sampling(0.9)}
    complete(decoder, prompts[:3], max_new_tokens=4, **settings)
    programs = device.prefill, device.admit, device.decode
    before = [program._cache_size() for program in programs]
    complete(decoder, [prompts[2], prompts[1], prompts[4], prompts[0]], max_new_tokens=11, **settings)
    assert [program._cache_size() for program in programs] == before


def test_the_cache_is_decoded_in_place(decoder):
    state, results = device.Slots.idle(decoder, 2, 64, Sampling()), device.Results.empty(2, 64)
    rest = np.zeros(1, np.int32), np.ones(2, bool), np.int32(1), np.int32(1)
    lowered = device.decode.lower(*nnx.split(decoder), state, results, *rest, sampling=Sampling())
    donated = len(jax.tree.leaves((state, results)))
    assert lowered.as_text().count("tf.aliasing_output") == donated


def simulated_utilisation(lengths: np.ndarray, slots: int) -> float:
    """Of slots that take the next length as soon as they are free."""
    free = np.zeros(slots)
    for length in lengths:
        free[free.argmin()] += length
    return float(lengths.sum() / (slots * free.max()))


def test_slots_stay_busy(decoder):
    """8 x 16 completions of 50 to 2,000 tokens, a twentieth of that here, over 16 slots: over 85 % are busy."""
    rng = np.random.default_rng(0)
    simulated = [simulated_utilisation(rng.integers(50, 2001, 128), 16) for _ in range(100)]
    assert np.mean(simulated) > 0.88
    assert np.quantile(simulated, 0.05) > 0.85
    lengths = rng.integers(50, 2001, 128)
    small = (lengths // 20).tolist()
    found = complete(decoder, [[1, 2, 3]] * 128, max_new_tokens=small, batch_size=16, sampling=Sampling(1.0))
    assert [len(row) for row in found.tokens] == small
    assert found.utilisation > 0.85
    assert found.utilisation == pytest.approx(simulated_utilisation(lengths // 20, 16))


# Text.


def letters(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + token % 26) for token in tokens)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_stop_strings_end_their_row(decoder, prompts, batch_size):
    new = CHUNK + 20
    plain = generate(decoder, prompts, max_new_tokens=new)
    # One in the first chunk, one that begins in the first and ends in the second.
    strings = letters(plain[1])[4:7], letters(plain[3])[CHUNK - 2 : CHUNK + 2]
    pieces: list[tuple[int, list[int]]] = []
    found = complete(
        decoder,
        prompts,
        max_new_tokens=new,
        stop=StopStrings(strings, letters),
        batch_size=batch_size,
        on_tokens=lambda row, tokens: pieces.append((row, tokens)),
    )
    ends = [min((text.find(s) + len(s) for s in strings if s in text), default=new) for text in map(letters, plain)]
    assert found.tokens == [row[:end] for row, end in zip(plain, ends, strict=True)]
    assert (ends[1], ends[3]) == (7, CHUNK + 2)
    assert found.finished == [end < new for end in ends]
    assert [int((row != 0).sum()) for row in found.log_probs] == ends
    assert [[token for row, tokens in pieces if row == i for token in tokens] for i in range(5)] == found.tokens
    assert len(pieces) > 5


def test_text_streams_in_whole_characters():
    written: list[tuple[int, str]] = []
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"), lambda *piece: written.append(piece))
    data = list("naïve €".encode())
    for start in range(0, len(data), 2):
        stream(3, data[start : start + 2])
        stream(5, data[start : start + 1])
    assert "".join(piece for row, piece in written if row == 3) == "naïve €"
    assert all("\ufffd" not in piece for row, piece in written if row == 3)
    assert all(piece for _, piece in written)


@pytest.mark.parametrize(("length", "expected"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 256)])
def test_buckets_are_powers_of_two(length, expected):
    assert bucket(length) == expected


@pytest.mark.parametrize(
    ("prompt", "row", "expected"),
    [(1, 2, 64), (64, 133, 192), (130, 133, 256), (64, 600, 640), (128, 2128, 2560), (128, 4000, 4096)],
)
def test_a_cache_is_not_much_larger_than_its_longest_row(prompt, row, expected):
    assert room(prompt, row) == expected


# Bad input.


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[1, 2], []], {}, "prompt 1: is empty"),
        ([[1] * 250], {"max_new_tokens": 7}, "prompt 0: has 250 tokens, and 7 more pass the model's limit of 256"),
        ([[1], [5, 263]], {}, "prompt 1: has the token id 263, and the model has only 263 embeddings"),
        ([[1], [-1]], {}, "prompt 1: has the token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: must be at least 1, not 0"),
        ([[1], [1]], {"max_new_tokens": [1, 0]}, "max_new_tokens: must be at least 1, not 0"),
        ([[1]], {"max_new_tokens": [1, 2]}, "max_new_tokens: has 2 values for 1 prompts"),
        ([[1]], {"batch_size": 0}, "batch_size: must be at least 1, not 0"),
        ([[1]], {"num_return_sequences": 0}, "num_return_sequences: must be at least 1, not 0"),
        ([[1]], {"num_return_sequences": 3, "seed": [1, 2]}, "seed: has 2 values for 3 completions"),
    ],
)
def test_bad_prompts_are_named(decoder, prompts, settings, words):
    with pytest.raises(JaxftError, match=words):
        generate(decoder, prompts, **{"max_new_tokens": 1, **settings})
