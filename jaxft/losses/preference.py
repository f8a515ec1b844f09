"""Losses over preferences: pairs of a chosen and a rejected completion, or completions that were liked or not.

With c and r the log-probabilities of chosen and rejected completion, h = (c - c_ref) - (r - r_ref) against a reference
model, C and R the averages of c and r over their tokens, s the logistic function and e the label smoothing:

    sigmoid   -(1 - e) log s(beta h) - e log s(-beta h)                  DPO, arXiv:2305.18290; e: its appendix's cDPO
    robust    (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)    arXiv:2403.00409
    hinge     max(0, 1 - beta h)                                         SLiC, arXiv:2305.10425, as in arXiv:2309.06657
    ipo       (H - 1 / (2 beta))^2                                       arXiv:2310.12036; H: h of averages over tokens
    simpo     sigmoid of beta (C - R) - gamma                            arXiv:2405.14734
    cpo       sigmoid of beta (c - r), plus cpo_alpha * NLL              arXiv:2401.08417
    orpo      -beta log s(log odds(C) - log odds(R)), plus NLL           arXiv:2403.07691; odds(x) = e^x / (1 - e^x)

NLL is the mean over all chosen tokens of a step: each pair's `nll_weight` makes a mean over pairs of it.

    kto       w (1 - s(+-(beta (y - y_ref) - beta z)))                   arXiv:2402.01306; + liked, - not; z: baseline

Shape letters: B rows, T tokens, P pairs of a row, S sequences of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxft import lora
from jaxft.data.batch import PairBatch, Pairs, UnpairedBatch
from jaxft.errors import JaxftError
from jaxft.losses.experts import with_experts
from jaxft.losses.tokens import LossOutput, TokenLogProbs, count_tokens, sequence_sums, token_log_probs
from jaxft.models.decoder import Decoder

LossType = Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "cpo", "orpo"]
WITH_REFERENCE = ("sigmoid", "robust", "hinge", "ipo")


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """Which loss over pairs, with TRL's names.

    Attributes:
      loss_type: see above.
      beta: how far from the reference, or how sharp the comparison; IPO's tau, ORPO's lambda.
      label_smoothing: the share of pairs whose preference is taken to be wrong; of sigmoid, robust, simpo and cpo.
      simpo_gamma: SimPO's target margin.
      cpo_alpha: CPO's factor of the negative log-likelihood.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(LossType):
            raise JaxftError("loss_type", f"is {self.loss_type!r}", f"Known: {', '.join(get_args(LossType))}")
        if not self.beta > 0:
            raise JaxftError("beta", f"must be positive, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise JaxftError("label_smoothing", f"must be in [0, 0.5), not {self.label_smoothing}")
        if self.label_smoothing and self.loss_type in ("hinge", "ipo", "orpo"):
            raise JaxftError("label_smoothing", f"has no meaning for {self.loss_type!r}", "Set it to 0")

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference model."""
        return self.loss_type in WITH_REFERENCE


def preference(
    decoder: Decoder, batch: PairBatch, settings: PreferenceLoss, dropout_key: jax.Array | None = None
) -> LossOutput:
    """The summed loss of a batch's pairs, how many they are, and metrics for each pair.

    Args:
      decoder: the policy; without its adapters it is the reference where `batch.reference` is None.
      batch: arrays [B, T] and [B, P].
      settings: which loss.
      dropout_key: a PRNG key switches LoRA dropout on.
    """
    tokens = token_log_probs(decoder, batch.text, dropout_key=dropout_key)
    reference = batch.reference
    if reference is None and settings.needs_reference:
        reference = reference_log_probs(decoder, batch)
    return with_experts(of_pairs(pair_log_probs(tokens, batch), reference, batch, settings), decoder, tokens.load)


def reference_log_probs(decoder: Decoder, batch: PairBatch) -> Pairs:
    """The pairs' log-probabilities with the adapters off; nothing is differentiated."""
    return jax.lax.stop_gradient(pair_log_probs(token_log_probs(lora.without_adapter(decoder), batch.text), batch))


def pair_log_probs(tokens: TokenLogProbs, batch: PairBatch) -> Pairs:
    """The log-probabilities of whole completions."""
    return _pairs(tokens.log_prob, batch)


def of_pairs(policy: Pairs, reference: Pairs | None, batch: PairBatch, settings: PreferenceLoss) -> LossOutput:
    """`preference` of the completions' log-probabilities [B, P]."""
    mask = batch.pair_mask != 0
    lengths = Pairs(*(jnp.maximum(n, 1) for n in _pairs(batch.text.loss_mask, batch)))
    means = Pairs(*(x / n for x, n in zip(policy, lengths, strict=True)))
    losses, rewards = _losses_and_rewards(policy, means, reference, lengths, settings)
    losses = losses - _nll_factor(settings) * batch.nll_weight * policy.chosen

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, values, 0))

    weight = total(jnp.ones_like(policy.chosen))
    rewards = jax.lax.stop_gradient(rewards)
    reported = {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margins": rewards.chosen - rewards.rejected,
        "rewards/accuracies": (rewards.chosen > rewards.rejected).astype(policy.chosen.dtype),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    metrics = {name: (total(values), weight) for name, values in reported.items()}
    return total(losses), weight, {"tokens": count_tokens(batch.text), **metrics}


def _losses_and_rewards(
    policy: Pairs, means: Pairs, reference: Pairs | None, lengths: Pairs, settings: PreferenceLoss
) -> tuple[jax.Array, Pairs]:
    """Each pair's loss without NLL [B, P], and what the loss takes to be its completions' rewards."""
    beta, kind = settings.beta, settings.loss_type
    if kind == "orpo":
        odds = _log_odds(means.chosen) - _log_odds(means.rejected)
        return -beta * jax.nn.log_sigmoid(odds), _scaled(beta, means)
    if kind == "simpo":
        margin = beta * (means.chosen - means.rejected) - settings.simpo_gamma
        return _sigmoid(margin, settings.label_smoothing), _scaled(beta, means)
    if kind == "cpo":
        return _sigmoid(beta * (policy.chosen - policy.rejected), settings.label_smoothing), _scaled(beta, policy)
    assert reference is not None
    gains = Pairs(*(x - ref for x, ref in zip(policy, reference, strict=True)))
    rewards, h = _scaled(beta, gains), gains.chosen - gains.rejected
    if kind == "ipo":
        h = gains.chosen / lengths.chosen - gains.rejected / lengths.rejected
        return (h - 1 / (2 * beta)) ** 2, rewards
    if kind == "hinge":
        return jax.nn.relu(1 - beta * h), rewards
    if kind == "robust":
        smoothing = settings.label_smoothing
        right, wrong = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
        return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing), rewards
    return _sigmoid(beta * h, settings.label_smoothing), rewards


def _sigmoid(margin: jax.Array, smoothing: float) -> jax.Array:
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)


def _log_odds(mean_log_prob: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of log p; a p that rounds to 1, whose odds are infinite, counts as the next below."""
    x = jnp.minimum(mean_log_prob, -jnp.finfo(mean_log_prob.dtype).eps)
    # log(1 - e^x), exact near 0 and far from it; `where` is safe, as both are finite for x < 0.
    return x - jnp.where(x > -0.6931472, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def _nll_factor(settings: PreferenceLoss) -> float:
    return {"orpo": 1.0, "cpo": settings.cpo_alpha}.get(settings.loss_type, 0.0)


def _scaled(beta: float, values: Pairs) -> Pairs:
    return Pairs(beta * values.chosen, beta * values.rejected)


def _pairs(values: jax.Array, batch: PairBatch) -> Pairs:
    sums = sequence_sums(values, batch.text.segment_ids, 2 * batch.pair_mask.shape[1])
    return Pairs(sums[:, 0::2], sums[:, 1::2])


@dataclasses.dataclass(frozen=True)
class KTOLoss:
    """KTO's settings, with TRL's names.

    Attributes:
      beta: how far from the reference.
      desirable_weight, undesirable_weight: factors of the losses of liked completions, and of the others.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def kto(decoder: Decoder, batch: UnpairedBatch, settings: KTOLoss, dropout_key: jax.Array | None = None) -> LossOutput:
    """KTO's summed loss, how many completions there are, and metrics for each kind; arguments as of `preference`."""
    sequences = batch.sequence_mask.shape[1]

    def of_sequences(tokens: TokenLogProbs) -> jax.Array:
        return sequence_sums(tokens.log_prob, batch.text.segment_ids, sequences)

    reference = batch.reference
    if reference is None:
        reference = jax.lax.stop_gradient(of_sequences(token_log_probs(lora.without_adapter(decoder), batch.text)))
    tokens = token_log_probs(decoder, batch.text, dropout_key=dropout_key)
    return with_experts(of_unpaired(of_sequences(tokens), reference, batch, settings), decoder, tokens.load)


def of_unpaired(policy: jax.Array, reference: jax.Array, batch: UnpairedBatch, settings: KTOLoss) -> LossOutput:
    """`kto` of the completions' log-probabilities [B, S]."""
    liked, there = batch.desirable != 0, batch.sequence_mask != 0
    rewards = settings.beta * (policy - reference)
    above = rewards - settings.beta * jnp.maximum(jax.lax.stop_gradient(batch.baseline), 0)
    losses = jnp.where(
        liked,
        settings.desirable_weight * jax.nn.sigmoid(-above),
        settings.undesirable_weight * jax.nn.sigmoid(above),
    )

    def total(values: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where, values, 0))

    metrics = {}
    rewards = jax.lax.stop_gradient(rewards)
    for name, where in (("chosen", there & liked), ("rejected", there & ~liked)):
        metrics[f"rewards/{name}"] = (total(rewards, where), total(jnp.ones_like(rewards), where))
    tokens = {"tokens": count_tokens(batch.text)}
    return total(losses, there), total(jnp.ones_like(rewards), there), {**tokens, **metrics}
