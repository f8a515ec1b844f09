"""Supervised fine-tuning's loss."""

from __future__ import annotations

import jax

import pallas_kernels as pk
from jaxft.data.batch import Batch
from jaxft.losses.experts import with_experts
from jaxft.losses.tokens import LossOutput, count_tokens
from jaxft.models.decoder import Decoder


def sft(decoder: Decoder, batch: Batch, dropout_key: jax.Array | None = None) -> LossOutput:
    """Cross-entropy of the next token where `loss_mask` is 1; the head is computed for those tokens only.

    Args:
      decoder: the model.
      batch: arrays [B, T].
      dropout_key: a PRNG key switches LoRA dropout on.

    Returns:
      float32 sum of -log p(target) * loss_mask, float32 sum of loss_mask, and {"tokens": tokens that are not padding},
      plus what `with_experts` adds.
    """
    hidden_BTD, load = decoder.with_load(
        batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, dropout_key=dropout_key
    )
    total, weight = pk.linear_cross_entropy(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        decoder.head(),
        batch.targets.reshape(-1),
        batch.loss_mask.reshape(-1),
        **decoder.head_settings(),
    )
    return with_experts((total, weight, {"tokens": count_tokens(batch)}), decoder, load)
