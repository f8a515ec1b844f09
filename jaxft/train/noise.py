"""Randomness of a step: keys by step number, so that a run that goes on draws what it would have drawn; NEFTune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.losses import LossOutput
from jaxft.models.decoder import Decoder
from jaxft.models.layers import Embedding


class Keyed(NamedTuple):
    """Micro-batches with a PRNG key each."""

    batch: Any
    key: jax.Array


def keyed(batch: Any, key: jax.Array, step: int) -> Keyed:
    """A batch [A, ...] with the keys [A] of a step."""
    accumulation = jax.tree.leaves(batch)[0].shape[0]
    return Keyed(batch, jax.random.split(jax.random.fold_in(key, step), accumulation))


def noisy_loss(
    decoder: Decoder,
    micro: Keyed,
    *,
    loss: Callable[..., LossOutput],
    dropout: bool,
    neftune_noise_alpha: float | None,
) -> LossOutput:
    """`loss` of a keyed micro-batch with LoRA dropout, with NEFTune's noise on the embeddings, or with both."""
    noise_key, dropout_key = jax.random.split(micro.key)
    if neftune_noise_alpha:
        embedding: Any = NoisyEmbedding(decoder.model.embed_tokens, micro.batch, noise_key, neftune_noise_alpha)
        decoder.model.embed_tokens = embedding
    return loss(decoder, micro.batch, dropout_key=dropout_key if dropout else None)


class NoisyEmbedding:
    """An embedding with uniform noise in +-alpha / sqrt(n D) (Jain et al. 2023, arXiv:2310.05914).

    n is the number of tokens of the document that a token is of, so packed documents get the noise that they would get
    alone.
    """

    def __init__(self, embedding: Embedding, batch: Batch, key: jax.Array, alpha: float) -> None:
        self.weight, self.dtype = embedding.weight, embedding.dtype  # of a head that is tied to it, which has no noise
        self._embedding = embedding
        self._bound_BT = alpha / jnp.sqrt(document_lengths(batch) * embedding.out_features)
        self._key = key

    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden_BTD = self._embedding(tokens)
        noise = jax.random.uniform(self._key, hidden_BTD.shape, jnp.float32, -1.0, 1.0)
        return hidden_BTD + (noise * self._bound_BT[..., None]).astype(hidden_BTD.dtype)


def document_lengths(batch: Batch) -> jax.Array:
    """float32 [B, T]: how many tokens the document of each token has."""
    rows, length = batch.tokens.shape
    if batch.segment_ids is None:
        present = jnp.sum(batch.present, axis=-1, keepdims=True).astype(jnp.float32)
        return jnp.broadcast_to(present, (rows, length))
    counts = jax.vmap(lambda segments: jnp.bincount(segments, length=length + 1)[segments])(batch.segment_ids)
    return counts.astype(jnp.float32)
