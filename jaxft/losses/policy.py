"""Policy-gradient losses over groups of sampled completions: GRPO and what came of it.

With r[t] = exp(log pi(t) - log pi_old(t)), A the completion's advantage, and m completions of n[i] tokens each:

    token level       w[t] = r[t]                                            GRPO, arXiv:2402.03300
    sequence level    w[t] = exp(mean over the completion of log r)          GSPO, arXiv:2507.18071
    clipped           l[t] = -min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)
                      epsilon_high: DAPO's clip-higher, arXiv:2503.14476; delta: INTELLECT-2's, arXiv:2505.07291
    cispo             l[t] = -stop(min(w, epsilon_high)) A log pi(t)         arXiv:2506.13585; here the bound itself
    KL                l[t] += beta (q - log q - 1), q = pi_ref(t) / pi(t)    k3, unbiased and never negative

and the loss of a step is

    grpo              1/m sum_i 1/n[i] sum_t l[t]
    bnpo dapo cispo   sum l[t] / sum_i n[i]                                  DAPO; bnpo's batch is the whole step here
    dr_grpo           sum l[t] / (m max_completion_length)                   arXiv:2503.20783

Shape letters: B rows, T tokens, S sequences of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import lora
from jaxft.data.batch import Batch, PolicyBatch
from jaxft.errors import JaxftError
from jaxft.losses.tokens import LossOutput, TokenLogProbs, count_tokens, per_token, sequence_sums, token_log_probs
from jaxft.models.decoder import Decoder

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
Level = Literal["token", "sequence"]
ScaleRewards = Literal["group", "batch", "none"]


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """Which loss over sampled completions, with TRL's names.

    Attributes:
      loss_type: how tokens are averaged, and for cispo what is clipped; see above.
      importance_sampling_level: "token" (GRPO) or "sequence" (GSPO).
      epsilon: how far below 1 a ratio still counts.
      epsilon_high: how far above 1; None is epsilon. For cispo the largest ratio itself.
      delta: the largest ratio for negative advantages; None has no limit.
      beta: factor of the KL divergence from the reference.
      temperature: that the completions were sampled at.
      max_completion_length: dr_grpo's constant.
    """

    loss_type: LossType = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    temperature: float = 1.0
    max_completion_length: int = 256

    def __post_init__(self) -> None:
        for name, kind in (("loss_type", LossType), ("importance_sampling_level", Level)):
            if getattr(self, name) not in get_args(kind):
                raise JaxftError(name, f"is {getattr(self, name)!r}", f"Known: {', '.join(get_args(kind))}")
        for name in ("beta", "epsilon"):
            if not getattr(self, name) >= 0:
                raise JaxftError(name, f"must not be negative, not {getattr(self, name)}")
        if not self.temperature > 0:
            raise JaxftError("temperature", f"must be positive to learn from what is drawn, not {self.temperature}")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise JaxftError("epsilon_high", "is missing: cispo's largest ratio", "5.0 is usual")
        if self.delta is not None and (self.loss_type == "cispo" or not self.delta > 1):
            raise JaxftError("delta", f"is {self.delta}", "It must be over 1, and cispo has none")

    @property
    def upper(self) -> float:
        """epsilon_high, or epsilon."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def policy(
    decoder: Decoder, batch: PolicyBatch, settings: PolicyLoss, dropout_key: jax.Array | None = None
) -> LossOutput:
    """The summed loss, its weight (completions, or tokens; see above), and metrics for each token.

    Args:
      decoder: the policy; without its adapters it is the reference where `batch.reference` is None.
      batch: arrays [B, T] and [B, S].
      settings: which loss.
      dropout_key: a PRNG key switches LoRA dropout on.
    """
    tokens = token_log_probs(decoder, batch.text, temperature=settings.temperature, dropout_key=dropout_key)
    reference = batch.reference
    if reference is None and settings.beta:
        reference = reference_log_probs(decoder, batch.text, settings.temperature)
    return of_tokens(tokens, reference, batch, settings)


def reference_log_probs(decoder: Decoder, text: Batch, temperature: float) -> jax.Array:
    """Log-probabilities float32 [B, T] of the targets with the adapters off; nothing is differentiated."""
    tokens = token_log_probs(lora.without_adapter(decoder), text, temperature=temperature)
    return jax.lax.stop_gradient(tokens.log_prob)


def of_tokens(
    tokens: TokenLogProbs, reference: jax.Array | None, batch: PolicyBatch, settings: PolicyLoss
) -> LossOutput:
    """`policy` of the targets' log-probabilities [B, T]."""
    learnt = batch.text.loss_mask != 0
    segment_ids, sequences = batch.text.segment_ids, batch.sequence_mask.shape[1]
    if segment_ids is None:  # one completion a row, whose padding `loss_mask` leaves out
        segment_ids = jnp.ones_like(batch.text.tokens)
    one = jnp.where(learnt, jnp.ones_like(tokens.log_prob), 0)
    length_BS = sequence_sums(one, segment_ids, sequences)
    advantage_BT = per_token(batch.advantages, segment_ids)

    old = jax.lax.stop_gradient(tokens.log_prob) if batch.old_log_probs is None else batch.old_log_probs
    log_ratio = jnp.where(learnt, tokens.log_prob - old, 0)
    if settings.importance_sampling_level == "sequence":
        means_BS = sequence_sums(log_ratio, segment_ids, sequences) / jnp.maximum(length_BS, 1)
        log_ratio = per_token(means_BS, segment_ids)
    ratio = jnp.exp(log_ratio)
    losses = _surrogate(ratio, advantage_BT, tokens.log_prob, settings)

    count = jnp.sum(one)
    means = {"entropy": tokens.entropy, **_clipped(ratio, advantage_BT, settings)}
    if reference is not None:
        behind = jnp.where(learnt, reference - tokens.log_prob, 0)
        means["kl"] = jnp.expm1(behind) - behind
        losses = losses + settings.beta * means["kl"]
    metrics = {name: (jnp.sum(jnp.where(learnt, x, 0)), count) for name, x in jax.lax.stop_gradient(means).items()}

    if settings.loss_type == "grpo":
        losses = losses / jnp.maximum(per_token(length_BS, segment_ids), 1)
    total = jnp.sum(jnp.where(learnt, losses, 0))
    present = jnp.sum(batch.sequence_mask).astype(total.dtype)
    weight = {"grpo": present, "dr_grpo": present * settings.max_completion_length}.get(settings.loss_type, count)
    return total, weight, {"tokens": count_tokens(batch.text), **metrics}


def _surrogate(ratio: jax.Array, advantage: jax.Array, log_prob: jax.Array, settings: PolicyLoss) -> jax.Array:
    """Each token's loss without KL."""
    if settings.loss_type == "cispo":
        return -jax.lax.stop_gradient(jnp.minimum(ratio, settings.upper)) * advantage * log_prob
    kept = ratio if settings.delta is None else jnp.minimum(ratio, settings.delta)
    clipped = jnp.clip(ratio, 1 - settings.epsilon, 1 + settings.upper)
    return -jnp.minimum(kept * advantage, clipped * advantage)


def _clipped(ratio: jax.Array, advantage: jax.Array, settings: PolicyLoss) -> dict[str, jax.Array]:
    """1 where a token's ratio is past the bound that its advantage pushes it towards."""
    if settings.loss_type == "cispo":
        high, low = (ratio > settings.upper) & (advantage > 0), jnp.zeros_like(ratio, dtype=bool)
    else:
        high = (ratio > 1 + settings.upper) & (advantage > 0)
        low = (ratio < 1 - settings.epsilon) & (advantage < 0)
    return {"clip_ratio/low": low.astype(ratio.dtype), "clip_ratio/high": high.astype(ratio.dtype)}


def advantages(rewards: np.ndarray, scale_rewards: ScaleRewards = "group") -> np.ndarray:
    """How much better than its group each completion did: rewards float [groups, G] to float32 [groups, G].

    The group's mean is subtracted, and the rest divided by the standard deviation (of a sample, plus 1e-4) of the
    group (arXiv:2402.03300), of the batch (arXiv:2508.08221), or by nothing (arXiv:2503.20783).
    """
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale_rewards == "none" or rewards.shape[1] == 1:
        return centred.astype(np.float32)
    axis = None if scale_rewards == "batch" else 1
    return (centred / (rewards.std(axis=axis, ddof=1, keepdims=True) + 1e-4)).astype(np.float32)
