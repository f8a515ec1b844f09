"""What every loss over log-probabilities starts from: those of the targets, a chunk of the vocabulary's logits a time.

Shape letters: B rows, T tokens, S sequences (segments) of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jaxft.data.batch import Batch
from jaxft.models.decoder import Decoder
from jaxft.models.moe import Load

Metric = jax.Array | tuple[jax.Array, jax.Array]
LossOutput = tuple[jax.Array, jax.Array, dict[str, Metric]]


class TokenLogProbs(NamedTuple):
    """Of each target: its log-probability and the entropy of its distribution, float32 [B, T], 0 where not learnt.

    With what the experts were asked for, where there are any.
    """

    log_prob: jax.Array
    entropy: jax.Array
    load: Load | None = None


def token_log_probs(
    decoder: Decoder, batch: Batch, *, temperature: float = 1.0, dropout_key: jax.Array | None = None
) -> TokenLogProbs:
    """The log-probabilities of a batch's targets [B, T] at a temperature; differentiable, without [tokens, vocab]."""
    hidden_BTD, load = decoder.with_load(
        batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, dropout_key=dropout_key
    )
    log_prob, entropy, _ = pk.selected_log_probs(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        decoder.head(),
        batch.targets.reshape(-1),
        **decoder.head_settings(temperature),
    )
    learnt = batch.loss_mask != 0
    log_prob, entropy = (jnp.where(learnt, x.reshape(learnt.shape), 0.0) for x in (log_prob, entropy))
    return TokenLogProbs(log_prob, entropy, load)


def sequence_sums(values: jax.Array, segment_ids: jax.Array, sequences: int) -> jax.Array:
    """[B, T] summed over each of a row's segments 1 to `sequences`: [B, S].

    A masked sum, not a scatter: a GPU adds those in any order.
    """
    return jnp.sum(jnp.where(_membership(segment_ids, sequences), values[:, None, :], 0), axis=-1)


def per_token(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, S] values of a row's segments given to each of their tokens: [B, T], 0 in the padding."""
    return jnp.sum(jnp.where(_membership(segment_ids, values.shape[1]), values[:, :, None], 0), axis=1)


def _membership(segment_ids: jax.Array, sequences: int) -> jax.Array:
    """bool [B, S, T]."""
    return segment_ids[:, None, :] == jnp.arange(1, sequences + 1, dtype=jnp.int32)[None, :, None]


def count_tokens(batch: Batch) -> jax.Array:
    """float32: how many tokens are not padding."""
    return jnp.sum(batch.present).astype(jnp.float32)
