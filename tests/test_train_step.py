"""The step contract: accumulation, packing and remat change nothing; what the program must never hold, it does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft import lora, losses, optim
from jaxft.data.batch import Batch
from jaxft.models import labels
from jaxft.models.decoded import frozen_for
from jaxft.train.step import make_train_step
from jaxpr_tools import all_avals, computed_avals, count_primitive, max_elements, residual_avals
from models import batch_of, decoder_of, random_examples, with_adapter
from tiny import hf_config

DOCUMENTS = random_examples([9, 4, 12, 7, 16, 3, 8, 13])


def prepared(loss=losses.sft, **settings):
    """(step, trainable, frozen, tx) of an adapted decoder; the trainable arrays are fresh copies."""
    decoder = with_adapter(decoder_of(**settings))
    graphdef, trainable, frozen = labels.split(decoder)
    tx = optax.sgd(1.0)
    return make_train_step(graphdef, loss, tx), jax.tree.map(jnp.copy, trainable), frozen_for(decoder, frozen), tx


def update_of(batch: Batch, **settings) -> tuple[dict[str, np.ndarray], float]:
    """The change that one SGD step makes (minus the gradient), by HF name, and the loss."""
    step, trainable, frozen, tx = prepared(**settings)
    before = jax.tree.map(np.array, trainable)
    after, _, metrics = step(trainable, frozen, tx.init(trainable), batch)
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, after, before)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(change)]
    return dict(zip(names, jax.tree.leaves(change), strict=True)), float(metrics["loss"])


def assert_same(one, two, rtol=1e-5):
    assert one[1] == pytest.approx(two[1], rel=rtol)
    for name, array in one[0].items():
        error = np.linalg.norm(array - two[0][name]) / np.linalg.norm(array)
        assert error < rtol, (name, error)


@pytest.fixture(scope="module")
def unpacked():
    """The reference: eight documents in eight rows of one micro-batch."""
    return update_of(batch_of(DOCUMENTS, [[i] for i in range(8)], 16))


def test_accumulation_changes_nothing(unpacked):
    assert_same(unpacked, update_of(batch_of(DOCUMENTS, [[i] for i in range(8)], 16, accumulation=8)))


def test_packing_changes_nothing(unpacked):
    rows = [[4, 2, 1], [7, 0, 6], [3, 5]]
    assert_same(unpacked, update_of(batch_of(DOCUMENTS, rows, 32)))


def test_packing_without_segments_would_change_it(unpacked):
    """Negative control: the same rows as one document each."""
    batch = batch_of(DOCUMENTS, [[4, 2, 1], [7, 0, 6], [3, 5]], 32)
    leaky = batch._replace(segment_ids=np.minimum(batch.segment_ids, 1))
    with pytest.raises(AssertionError):
        assert_same(unpacked, update_of(leaky))


@pytest.mark.parametrize(
    "settings",
    [
        {"remat": "full"},
        pytest.param({"remat": "full,unroll=all"}, marks=pytest.mark.slow),
        {"remat": "full,unroll=2,tile=7"},
        {"remat": "mid,weights"},
        pytest.param({"remat": "offload"}, marks=pytest.mark.slow),  # on a CPU the program of "full"
    ],
)
def test_remat_changes_nothing(unpacked, settings):
    assert_same(unpacked, update_of(batch_of(DOCUMENTS, [[i] for i in range(8)], 16), **settings))


def test_rows_of_padding_change_nothing(unpacked):
    rows = [[i] for i in range(8)] + [[], []]
    assert_same(unpacked, update_of(batch_of(DOCUMENTS, rows, 16, accumulation=2)))


def test_a_second_step_compiles_nothing_and_donates():
    step, trainable, frozen, tx = prepared(quantization="nf4")
    opt_state = tx.init(trainable)
    first_leaf = jax.tree.leaves(trainable)[0]
    for seed in (0, 1):
        batch = batch_of(random_examples([9, 4, 12], seed=seed), [[0, 1], [2]], 16)
        trainable, opt_state, _ = step(trainable, frozen, opt_state, batch)
    assert step._cache_size() == 1
    assert first_leaf.is_deleted()
    # Negative control: another shape does compile.
    step(trainable, frozen, opt_state, batch_of(random_examples([9]), [[0]], 16))
    assert step._cache_size() == 2


@pytest.mark.slow
def test_a_paged_state_changes_nothing():
    results = []
    batch = batch_of(DOCUMENTS, [[i] for i in range(8)], 16)
    for name in ("adamw", "paged_adamw"):
        tx = optim.optimizer(name, 1e-2)
        decoder = with_adapter(decoder_of(), rank=128)  # large enough to be paged
        graphdef, trainable, frozen = labels.split(decoder)
        step, opt_state = make_train_step(graphdef, losses.sft, tx), tx.init(trainable)
        for _ in range(2):
            trainable, opt_state, metrics = step(trainable, frozen, opt_state, batch)
        results.append((trainable, metrics))
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(opt_state)}
        assert ("pinned_host" in kinds) == (name == "paged_adamw")
    jax.tree.map(np.testing.assert_array_equal, *results)


def naive_sft(decoder, batch):
    """The loss with all logits at once."""
    hidden = decoder(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
    log_p = jax.nn.log_softmax(decoder.logits(hidden))
    chosen = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch.loss_mask), jnp.sum(batch.loss_mask), {}


WIDE = hf_config(vocab_size=49_152)


@pytest.fixture(scope="module")
def wide_batch():
    """4 x 256 tokens: more than the loss takes at a time with SmolLM2's vocabulary."""
    return batch_of(random_examples([256] * 4), [[0], [1], [2], [3]], 256)


def step_jaxpr(loss, batch):
    """The whole train step of a tiny NF4 model with SmolLM2's vocabulary."""
    decoder = with_adapter(decoder_of(WIDE, quantization="nf4"), WIDE)
    graphdef, trainable, frozen = labels.split(decoder)
    tx = optax.sgd(1.0)
    return jax.make_jaxpr(make_train_step(graphdef, loss, tx))(trainable, frozen, tx.init(trainable), batch)


def logits_sized(jaxpr, batch):
    """Arrays that have the vocabulary as an axis and one row for every token."""
    size = batch.tokens.size * WIDE["vocab_size"]
    return [a for a in all_avals(jaxpr) if WIDE["vocab_size"] in getattr(a, "shape", ()) and np.prod(a.shape) >= size]


def test_the_step_holds_no_tokens_by_vocabulary_array(wide_batch):
    assert not logits_sized(step_jaxpr(losses.sft, wide_batch), wide_batch)
    assert logits_sized(step_jaxpr(naive_sft, wide_batch), wide_batch), "the check would not notice"


def residuals_of(decoder, batch):
    """What the backward pass of the SFT loss keeps."""
    graphdef, trainable, frozen = labels.split(decoder)
    micro = jax.tree.map(lambda a: jnp.asarray(a[0]), batch)
    return residual_avals(lambda t: losses.sft(nnx.merge(graphdef, t, frozen), micro)[0], trainable)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_no_weight_is_kept_for_the_backward_pass(remat, quantization):
    """No residual has a weight's shape, one layer's or a stack's: neither decoded from NF4 nor sliced from bfloat16."""
    batch = batch_of(DOCUMENTS, [[i] for i in range(8)], 16)
    decoder = with_adapter(decoder_of(quantization=quantization, remat=remat))
    shapes = [a.shape for a in residuals_of(decoder, batch)]
    weights = [(160, 64), (64, 160), (64, 64)]
    stacked = [(3, *w) for w in weights]
    # The frozen stacks themselves may be passed through, once each: seven linears.
    assert sum(s in stacked for s in shapes) <= (0 if quantization else 7)
    assert not [s for s in shapes if s in weights]


def test_a_decoded_weight_would_be_noticed():
    """Negative control: a linear that decodes its weight outside the custom rule keeps it."""
    decoder = with_adapter(decoder_of(quantization="nf4"))
    weight = decoder.model.layers.mlp.up_proj.weight.get_value().at_layer(0)
    kept = residual_avals(lambda x: jnp.sum(jnp.tanh(x @ weight.dequantize(jnp.float32).T)), jnp.ones((2, 64)))
    assert any(sorted(a.shape) == [64, 160] for a in kept)


def test_the_base_gets_no_gradient(wide_batch):
    """Nothing of the size of a stack of base weights, or of the head, is computed."""
    shapes = [getattr(a, "shape", ()) for a in computed_avals(step_jaxpr(losses.sft, wide_batch))]
    assert not {(3, 160, 64), (3, 64, 160), (3, 64, 64), (3, 32, 64), (WIDE["vocab_size"], 64)} & set(shapes)
    assert {(160, 64), (64, 160), (64, 64), (32, 64)} <= set(shapes), "one layer's weights are decoded"


def test_full_fine_tuning_is_the_same_path():
    """Every kind trains through the same step; its gradient of the head equals a naive loss's."""
    batch = batch_of(DOCUMENTS, [[i] for i in range(8)], 16)
    changes = []
    for loss in (losses.sft, naive_sft):
        decoder = decoder_of()
        labels.set_trainable(decoder, {"base", "norm", "embedding", "head"})
        graphdef, trainable, frozen = labels.split(decoder)
        assert not jax.tree.leaves(frozen)
        before = jax.tree.map(np.array, trainable)
        tx = optax.sgd(1.0)
        after, _, _ = make_train_step(graphdef, loss, tx)(trainable, frozen, tx.init(trainable), batch)
        changes.append(jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a) - b, after, before)))
    for ours, naive in zip(*changes, strict=True):
        assert np.linalg.norm(ours - naive) < 1e-5 * np.linalg.norm(naive)


def test_layers_are_one_loop():
    """The forward's layers are scanned: one attention in the program, not one a layer."""
    decoder = decoder_of()
    tokens = jnp.zeros((1, 8), jnp.int32)
    scanned = jax.make_jaxpr(lambda t: decoder(t))(tokens)
    assert count_primitive(scanned, "scan") == 1
    assert max_elements(computed_avals(scanned)) < 300 * 64 + 1
    assert isinstance(decoder.model.layers.mlp.up_proj.weight.get_value(), jax.Array)
    assert lora.linears(decoder).keys() >= {"model.layers.mlp.up_proj"}
