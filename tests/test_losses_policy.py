"""Policy losses: values and gradients against the papers' formulas, the reference, what is never held."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import loss_references as references
from jaxft import losses
from jaxft.data.batch import PolicyBatch
from jaxft.errors import JaxftError
from jaxft.losses import PolicyLoss, advantages
from jaxft.losses.policy import of_tokens
from jaxft.losses.tokens import TokenLogProbs, token_log_probs
from jaxft.models import labels
from jaxft.train.step import make_train_step
from jaxpr_tools import all_avals, max_elements
from models import decoder_of, with_adapter
from test_losses_preference import (
    LENGTHS,
    assert_close,
    gradients,
    in_float64,
    name_of,
    random_log_probs,
    text_of,
)
from tiny import hf_config

CASES = [
    *(PolicyLoss(kind, beta=0.04, max_completion_length=9) for kind in ("grpo", "bnpo", "dr_grpo", "dapo")),
    PolicyLoss("cispo", epsilon_high=1.3),
    PolicyLoss("dapo", epsilon=0.2, epsilon_high=0.28),
    PolicyLoss("grpo", epsilon=0.2, epsilon_high=0.28, delta=1.5),
    PolicyLoss("grpo", importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.15),
    PolicyLoss("dapo", importance_sampling_level="sequence", epsilon=0.1, delta=1.2, beta=0.04),
    PolicyLoss("cispo", importance_sampling_level="sequence", epsilon_high=1.1),
]
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], np.float32)


def policy_batch(old: Any = None) -> PolicyBatch:
    """Eight completions of random advantages; the last is truncated, so it is not learnt but counts."""
    text = text_of()
    text.loss_mask[2, text.segment_ids[2] == 2] = 0
    values = np.random.default_rng(5).standard_normal(MASK.shape).astype(np.float32)
    return PolicyBatch(text, MASK, values, old)


def near(text: Any, log_probs: np.ndarray, seed: int, scale: float = 0.3) -> np.ndarray:
    """`log_probs` [B, T] moved a little where there are any."""
    return log_probs + scale * np.random.default_rng(seed).standard_normal(log_probs.shape) * (text.loss_mask != 0)


@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_policy_losses_equal_the_papers_formulas(settings: PolicyLoss) -> None:
    batch = policy_batch()
    text = batch.text
    new = random_log_probs(text, 1)
    old, ref = near(text, new, 2), near(text, new, 3)
    batch = batch._replace(old_log_probs=old)

    def ours(log_probs: jax.Array, ref: jax.Array, batch: PolicyBatch) -> Any:
        tokens = TokenLogProbs(log_probs, jnp.ones_like(log_probs))
        total, weight, metrics = of_tokens(tokens, ref, batch, settings)
        return total / weight, metrics

    advantage = [a for a, there in zip(batch.advantages.ravel(), MASK.ravel(), strict=True) if there]

    def each(values: np.ndarray) -> list[np.ndarray]:
        return [x for row in references.completions(values, text.segment_ids, text.loss_mask) for x in row]

    def paper(log_probs: np.ndarray) -> complex:
        completions = zip(each(log_probs), each(old), each(ref), advantage, strict=True)
        return references.policy_loss(
            [references.token_losses(x, y, z, float(a), settings) for x, y, z, a in completions], settings
        )

    (value, metrics), gradient = in_float64(jax.value_and_grad(ours, has_aux=True), new, ref, batch)
    want = references.gradient(paper, new)
    np.testing.assert_allclose(value, paper(new.astype(complex)).real, rtol=1e-10)
    np.testing.assert_allclose(gradient, want, rtol=1e-8, atol=1e-12)
    assert np.abs(want).max() > 1e-3

    q = np.exp(ref - new)
    learnt = text.loss_mask != 0
    np.testing.assert_allclose(metrics["kl"][0], np.sum((q - np.log(q) - 1)[learnt]), rtol=1e-10)
    assert metrics["entropy"][0] == metrics["entropy"][1] == learnt.sum()


def test_clipping_happens_and_is_counted() -> None:
    """Negative control of the cases: bounds out of reach give another loss, and nothing is counted."""
    batch = policy_batch()
    new = random_log_probs(batch.text, 1)
    batch = jax.tree.map(jnp.asarray, batch._replace(old_log_probs=near(batch.text, new, 2).astype(np.float32)))
    tokens = TokenLogProbs(jnp.asarray(new, jnp.float32), jnp.zeros(new.shape, jnp.float32))
    totals = {}
    for epsilon in (0.2, 1e6):
        total, _, metrics = of_tokens(tokens, None, batch, PolicyLoss(epsilon=epsilon))
        totals[epsilon] = float(total)
        assert (metrics["clip_ratio/low"][0] > 0) == (metrics["clip_ratio/high"][0] > 0) == (epsilon < 1)
    assert totals[0.2] != totals[1e6]


@pytest.mark.parametrize("settings", CASES[:1] + CASES[-2:], ids=name_of)
def test_rows_of_one_completion_need_no_segment_ids(settings: PolicyLoss) -> None:
    """Their padding is not learnt, so it changes nothing that it counts as theirs."""
    batch = policy_batch()
    one = np.where(batch.text.segment_ids == 1, batch.text.loss_mask, 0)
    text = batch.text._replace(segment_ids=(batch.text.segment_ids == 1).astype(np.int32), loss_mask=one)
    new = random_log_probs(text, 1)
    batch = PolicyBatch(text, MASK[:, :1], batch.advantages[:, :1], near(text, new, 2))

    def found(log_probs: jax.Array, batch: PolicyBatch) -> Any:
        total, weight, metrics = of_tokens(TokenLogProbs(log_probs, log_probs), None, batch, settings)
        return total / weight, {name: x for name, x in metrics.items() if isinstance(x, tuple)}

    gradient = jax.value_and_grad(found, has_aux=True)
    without = batch._replace(text=text._replace(segment_ids=None))
    got, want = (in_float64(gradient, new, each) for each in (without, batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), got, want)
    assert np.abs(want[1]).max() > 1e-3


def test_without_old_log_probs_the_policy_is_its_own() -> None:
    """The ratio is 1 and the gradient that of REINFORCE: -A for each token."""
    batch = policy_batch()
    new = random_log_probs(batch.text, 1)

    def total(log_probs: jax.Array, batch: PolicyBatch) -> jax.Array:
        return of_tokens(TokenLogProbs(log_probs, jnp.zeros_like(log_probs)), None, batch, PolicyLoss())[0]

    gradient = in_float64(jax.grad(total), new, batch)
    ids = batch.text.segment_ids
    each = np.take_along_axis(batch.advantages, np.maximum(ids - 1, 0), axis=1)
    np.testing.assert_allclose(gradient, np.where(batch.text.loss_mask != 0, -each, 0), rtol=1e-12)


@pytest.fixture(scope="module")
def decoder() -> Any:
    return with_adapter(decoder_of())


def dense(decoder: Any, base: Any, batch: PolicyBatch, beta: float, temperature: float) -> Any:
    """dapo at ratio 1 with k3 and all logits at once."""
    text = batch.text

    def log_probs(model: Any) -> jax.Array:
        hidden = model(text.tokens, segment_ids=text.segment_ids, positions=text.positions)
        log_p = jax.nn.log_softmax(model.logits(hidden) / temperature)
        return jnp.take_along_axis(log_p, text.targets[..., None], axis=-1)[..., 0]

    new, ref = log_probs(decoder), jax.lax.stop_gradient(log_probs(base))
    advantage = jnp.take_along_axis(batch.advantages, jnp.maximum(text.segment_ids - 1, 0), axis=1)
    k3 = jnp.exp(ref - new) - (ref - new) - 1
    loss = -jnp.exp(new - jax.lax.stop_gradient(new)) * advantage + beta * k3
    return jnp.sum(loss * text.loss_mask), jnp.sum(text.loss_mask), {}


def test_policy_of_a_decoder_equals_the_dense_one(decoder: Any) -> None:
    batch, settings = policy_batch(), PolicyLoss(beta=0.5, temperature=0.7)
    ours = gradients(decoder, batch, partial(losses.policy, settings=settings))
    base = decoder_of()
    assert_close(ours, gradients(decoder, batch, lambda d, b: dense(d, base, b, 0.5, 0.7)))
    given = batch._replace(reference=token_log_probs(base, jax.tree.map(jnp.asarray, batch.text), temperature=0.7)[0])
    assert_close(ours, gradients(decoder, given, partial(losses.policy, settings=settings)))


def test_neither_packing_nor_accumulation_changes_a_step() -> None:
    """Eight completions in three rows of one micro-batch, and in eight micro-batches of one: update and metrics."""
    packed = policy_batch()
    alone = text_of(length=10, rows=[[i] for i in range(len(LENGTHS))])
    alone.loss_mask[7] = 0
    one_a_row = PolicyBatch(alone, np.ones((8, 1), np.float32), packed.advantages[MASK != 0][:, None])
    graphdef, trainable, frozen = labels.split(with_adapter(decoder_of()))
    tx = optax.sgd(1.0)
    step = make_train_step(graphdef, partial(losses.policy, settings=PolicyLoss("grpo", beta=0.1)), tx)
    results = []
    for batch in (jax.tree.map(lambda x: x[None], packed), jax.tree.map(lambda x: x[:, None], one_a_row)):
        fresh = jax.tree.map(jnp.copy, trainable)
        after, _, metrics = step(fresh, frozen, tx.init(fresh), batch)
        results.append((jax.tree.map(lambda a, b: np.asarray(a - b), after, trainable), metrics))
    (one, metrics), (two, others) = results
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.linalg.norm(x - y) < 1e-5 * np.linalg.norm(x)
    assert metrics["weight"] == 8
    for name in ("loss", "entropy", "kl", "tokens", "grad_norm"):
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("settings", [PolicyLoss(beta=0.1), PolicyLoss(importance_sampling_level="sequence")])
def test_no_array_of_tokens_times_vocabulary(settings: PolicyLoss) -> None:
    hf = hf_config(vocab_size=49_152)
    wide = with_adapter(decoder_of(hf), hf)
    text = text_of(49_152, 256, [(100, 28)] * 8, [[0, 1], [2, 3], [4, 5], [6, 7]])
    batch = PolicyBatch(text, np.ones((4, 2), np.float32), np.ones((4, 2), np.float32))
    graphdef, trainable, frozen = labels.split(wide)

    def total(trainable: nnx.State, batch: PolicyBatch) -> jax.Array:
        return losses.policy(nnx.merge(graphdef, trainable, frozen), batch, settings)[0]

    assert max_elements(all_avals(jax.make_jaxpr(jax.grad(total))(trainable, batch))) < text.tokens.size * 49_152


def test_advantages() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 0.0, 0.0]])
    centred = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(advantages(rewards, "none"), centred)
    group = centred[[0, 2]] / (np.array([[3**-0.5], [1.5]]) + 1e-4)
    np.testing.assert_allclose(advantages(rewards)[[0, 2]], group, rtol=1e-6)
    assert not advantages(rewards)[1].any()
    np.testing.assert_allclose(advantages(rewards, "batch"), centred / (rewards.std(ddof=1) + 1e-4), rtol=1e-6)
    assert advantages(rewards).dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"importance_sampling_level": "group"}, "importance_sampling_level"),
        ({"beta": -1.0}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"delta": 0.9}, "delta"),
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0}, "delta"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(JaxftError) as error:
        PolicyLoss(**settings)
    assert error.value.where == where
