"""The decoder against torch's Llama, and against itself: scanned, unrolled, packed, cached."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxft.data.batch import lay_out
from jaxft.errors import JaxftError
from jaxft.models.attention import KVCache, attend_to_chunks, chunk_ids
from jaxft.models.config import DecoderConfig, LayerFacts, RopeConfig
from jaxft.models.decoder import Decoder, Segment, segment_positions, segments
from jaxft.models.remat import LayerPolicy
from jaxft.models.rope import inverse_frequencies
from llama_cases import CASES, FIRST, OTHERS, case_config, case_tokens
from models import decoder_of, hidden_states, random_examples, through_cache
from tiny import hf_config, random_tensors

VECTORS = Path(__file__).parent / "vectors" / "llama.safetensors"
# float32 through a few layers: both sides round, so a few hundred units in the last place of O(1) logits.
TOLERANCE = 1e-4


def forward(decoder: Decoder, tokens, **kwargs) -> jax.Array:
    graphdef, params = nnx.split(decoder)

    @jax.jit
    def run(params, tokens, kwargs):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, **kwargs))

    return run(params, jnp.asarray(tokens, jnp.int32), kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "unroll"),
    [
        *((case, False) for case in CASES),
        (FIRST, True),
        *(pytest.param(case, True, marks=pytest.mark.slow) for case in OTHERS),
    ],
)
def test_logits_equal_torch(case, unroll):
    config = case_config(case)
    expected = load_file(VECTORS)[f"{case}/logits"]
    assert expected.std() > 0.3, "the case is degenerate"
    logits = forward(decoder_of(config, remat="none,unroll=all" if unroll else "none"), case_tokens(config))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_changing_a_weight_is_noticed():
    """Negative control of the comparison above."""
    config = case_config("gqa")
    decoder = decoder_of(config)
    weight = decoder.model.layers.mlp.up_proj.weight
    weight.set_value(weight.get_value().at[1, 0, 0].add(0.05))
    difference = np.abs(forward(decoder, case_tokens(config)) - load_file(VECTORS)["gqa/logits"]).max()
    assert difference > 10 * TOLERANCE


def test_packed_documents_equal_each_alone():
    decoder = decoder_of()
    examples = random_examples([5, 9, 1, 7])
    packed = lay_out(examples, [[0, 1, 2, 3]], 24)
    logits = forward(decoder, packed.tokens, segment_ids=packed.segment_ids)
    start = 0
    for example in examples:
        alone = forward(decoder, example.tokens[None])
        stop = start + len(example.tokens)
        np.testing.assert_allclose(logits[0, start:stop], alone[0], atol=1e-5, rtol=1e-5)
        start = stop


@pytest.mark.parametrize("huge", [1.0, 1e18, 3e38], ids=["ordinary", "large", "near overflow"])
def test_no_document_sees_another(huge):
    """One document's tokens change, even to embeddings near overflow: the others' logits stay bit for bit."""
    config = hf_config()
    embedding = random_tensors(config)["model.embed_tokens.weight"]
    embedding[-8:] = np.where(embedding[-8:] > 0, huge, -huge)
    decoder = decoder_of(config)
    decoder.model.embed_tokens.weight.set_value(jnp.asarray(embedding))
    packed = lay_out(random_examples([6, 8, 5], vocab_size=290), [[0, 1, 2]], 24)
    other = packed.tokens.copy()
    other[0, 6:14] = np.arange(292, 300)

    graphdef, params = nnx.split(decoder)

    @jax.jit
    def run(params, tokens, segment_ids):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, segment_ids=segment_ids))

    before, after = (np.asarray(run(params, tokens, packed.segment_ids)) for tokens in (packed.tokens, other))
    keep = np.r_[0:6, 14:19]
    np.testing.assert_array_equal(before[0, keep], after[0, keep])
    assert np.isfinite(before[0, keep]).all()
    assert not np.array_equal(before[0, 6:14], after[0, 6:14])
    # Negative control: as one document, what follows does change.
    one = np.asarray(run(params, other, np.ones_like(packed.segment_ids)))
    assert not np.array_equal(one[0, 14:19], after[0, 14:19])


def test_positions_restart_with_every_segment():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(segment_positions(ids, ids), expected)
    np.testing.assert_array_equal(segment_positions(ids, None)[0], np.arange(8))


def with_windows(pattern: str) -> DecoderConfig:
    kinds = {"f": "full_attention", "s": "sliding_attention"}
    return DecoderConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=len(pattern), num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=4,
        layer_types=tuple(kinds[letter] for letter in pattern), qk_norm="head",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("fff", [(0, 3, "f")]),
        ("sfsf", [(0, 4, "sf")]),
        ("ssfssfs", [(0, 6, "ssf"), (6, 7, "s")]),
        ("sff", [(0, 1, "s"), (1, 3, "f")]),
        ("ffsfsfsf", [(0, 2, "f"), (2, 8, "sf")]),
    ],
)
def test_layers_become_few_scans(pattern, expected):
    facts = {"f": LayerFacts(None), "s": LayerFacts(4)}
    found = segments(with_windows(pattern))
    everything = LayerPolicy(everything=True)
    assert found == tuple(Segment(a, b, tuple(facts[letter] for letter in p), everything) for a, b, p in expected)


def test_layers_of_different_policies_are_scans_of_their_own():
    found = segments(with_windows("sfsfsfs"), "full+none*3")
    assert [(s.start, s.stop, len(s.pattern), s.policy.everything) for s in found] == [
        (0, 4, 2, False),
        (4, 5, 1, True),
        (5, 6, 1, True),
        (6, 7, 1, True),
    ]


@pytest.mark.parametrize("pattern", [pytest.param("sfsf", marks=pytest.mark.slow), "ssfssfs"])
def test_mixed_layers_scanned_equal_unrolled_and_cached(pattern):
    decoder = Decoder(with_windows(pattern), rngs=nnx.Rngs(1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 11)), jnp.int32)
    scanned = hidden_states(decoder, tokens)
    decoder.remat = "none,unroll=all"
    np.testing.assert_allclose(scanned, hidden_states(decoder, tokens), atol=1e-5)
    decoder.remat = "none"
    np.testing.assert_allclose(scanned, through_cache(decoder, tokens, prefill=3), atol=1e-5)
    full = Decoder(with_windows("f" * len(pattern)), rngs=nnx.Rngs(1))
    assert np.abs(hidden_states(full, tokens) - scanned).max() > 1e-3, "the window does nothing"


def test_chunks_begin_at_multiples_of_their_size_in_each_document():
    ids = jnp.array([[4, 4, 4, 4, 4, 7, 7, 7, 0]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0]], jnp.int32)
    of = jax.jit(chunk_ids, static_argnums=2)
    assert of(positions, ids, 2).tolist() == [[1, 1, 2, 2, 3, 4, 4, 5, 0]]
    one = jnp.array([[-2, -1, 0, 1, 2], [1, 2, 3, 4, 5]], jnp.int32)
    assert of(one, None, 2).tolist() == [[0, 0, 2, 2, 3], [1, 2, 2, 3, 3]], "negative positions are padding"


@pytest.mark.parametrize("slots", [12, 10])
def test_cached_queries_see_their_own_chunk(slots):
    """Whether or not the cache is a whole number of chunks."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 2, 2, slots, 1, 8), np.float32)
    q = rng.standard_normal((2, 3, 1, 8), np.float32)
    positions = np.array([[3, 4, 5], [8, 9, -1]], np.int32)
    attend = jax.jit(partial(attend_to_chunks, size=4, scale=0.3))
    found = attend(q, KVCache(jnp.asarray(k), jnp.asarray(v)), positions, layer=jnp.int32(1))
    for row, t in np.ndindex(positions.shape):
        position = positions[row, t]
        seen = slice(max(position, 0) // 4 * 4, position + 1)
        weights = np.exp(0.3 * k[1, row, seen, 0] @ q[row, t, 0])
        expected = weights @ v[1, row, seen, 0] / max(weights.sum(), 1e-9)
        np.testing.assert_allclose(found[row, t, 0], expected, atol=1e-6)


@pytest.mark.parametrize("case", [FIRST, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_cached_steps_equal_the_whole_forward(case):
    config = case_config(case)
    decoder = decoder_of(config)
    tokens = jnp.asarray(case_tokens(config), jnp.int32)
    np.testing.assert_allclose(
        through_cache(decoder, tokens, prefill=5), hidden_states(decoder, tokens), atol=2e-5, rtol=2e-5
    )


def test_llama3_rope_blends_between_the_bands():
    rope = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_position_embeddings=8192)
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 128)
    scaled = inverse_frequencies(rope, 128)
    ratio = plain / scaled
    assert np.isclose(ratio[0], 1.0)
    assert np.isclose(ratio[-1], 8.0)
    assert (np.diff(ratio) >= -1e-6).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("vocab_size", 0),
        ("hidden_act", "relu"),
        ("layer_types", ("full_attention",)),
        ("layer_types", ("sliding_attention",) * 3),
        ("layer_types", ("chunked_attention",) * 3),
    ],
)
def test_bad_configs_are_named(field, value):
    hf = hf_config()
    fields = {name: hf[name] for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings")}  # fmt: skip
    name = {
        ("sliding_attention",) * 3: "sliding_window", ("chunked_attention",) * 3: "attention_chunk_size",
    }.get(value, field)  # fmt: skip
    with pytest.raises(JaxftError, match=name):
        DecoderConfig(**{**fields, field: value})
