"""Losses as pure functions of a decoder and a micro-batch that return (sum, weight, metrics).

The division by the weight happens once, after accumulation, in `jaxft.train.step`: so neither gradient accumulation nor
sequence packing changes a result. `metrics` are sums too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jaxft.data.batch import Batch
from jaxft.models.decoder import Decoder

LossOutput = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


def sft(decoder: Decoder, batch: Batch, dropout_key: jax.Array | None = None) -> LossOutput:
    """Cross-entropy of the next token where `loss_mask` is 1; the head is computed for those tokens only.

    Args:
      decoder: the model.
      batch: arrays [B, T].
      dropout_key: a PRNG key switches LoRA dropout on.

    Returns:
      float32 sum of -log p(target) * loss_mask, float32 sum of loss_mask, and {"tokens": tokens that are not padding}.
    """
    hidden_BTD = decoder(
        batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, dropout_key=dropout_key
    )
    total, weight = pk.linear_cross_entropy(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        decoder.head(),
        batch.targets.reshape(-1),
        batch.loss_mask.reshape(-1),
    )
    tokens = jnp.int32(batch.tokens.size) if batch.segment_ids is None else jnp.sum(batch.segment_ids > 0)
    return total, weight, {"tokens": tokens.astype(jnp.float32)}
