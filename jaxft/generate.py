"""Generation: prefill and decode as one jitted program over a KV cache; every row has its own length.

Prompts stand at the start of their row, whatever their length: a query sees only the cache slots up to its own
position, so what stands behind a short prompt is never seen and is overwritten by the tokens that follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder, KVCache

BUCKET = 64  # prompt and cache lengths are rounded up to it, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: keep only the k most likely; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches it (arXiv:1904.09751); 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise JaxftError("temperature", f"must not be negative, not {self.temperature}")
        if self.top_k < 0:
            raise JaxftError("top_k", f"must not be negative, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise JaxftError("top_p", f"must be in (0, 1], not {self.top_p}")


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and including the first of `eos_token_ids`.

    Args:
      decoder: the model, adapters included.
      prompts: token ids, at least one each.
      max_new_tokens: at most so many for each prompt.
      eos_token_ids: what ends a row.
      sampling: how tokens are drawn; noise depends on (seed, row, position) only.
      batch_size: rows that are generated at once.

    Raises:
      JaxftError: an empty prompt, one that leaves no room below the model's max_position_embeddings, a token without an
        embedding, or a setting that is not positive.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise JaxftError(name, f"must be at least 1, not {value}")
    for row, prompt in enumerate(prompts):
        _check_prompt(f"prompt {row}", prompt, max_new_tokens, decoder.config)
    graphdef, params = nnx.split(decoder)
    eos = jnp.asarray(sorted(eos_token_ids), jnp.int32)
    results: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        size = batch_size if len(prompts) > batch_size else len(rows)
        tokens, lengths = _pad(rows, size)
        row_ids = jnp.arange(start, start + size, dtype=jnp.int32)
        new, counts = _generate(
            graphdef,
            params,
            tokens,
            lengths,
            row_ids,
            jax.random.key(seed),
            eos,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
        )
        new, counts = np.asarray(new), np.asarray(counts)
        results += [new[i, : counts[i]].tolist() for i in range(len(rows))]
    return results


def _check_prompt(where: str, prompt: Sequence[int], max_new_tokens: int, config: DecoderConfig) -> None:
    limit = config.max_position_embeddings
    if not len(prompt):
        raise JaxftError(where, "is empty")
    if len(prompt) + max_new_tokens > limit:
        raise JaxftError(
            where, f"has {len(prompt)} tokens, and {max_new_tokens} more pass the model's limit of {limit}"
        )
    unknown = [token for token in prompt if not 0 <= token < config.vocab_size]
    if unknown:
        raise JaxftError(where, f"has the token id {unknown[0]}, and the model has only {config.vocab_size} embeddings")


def _pad(rows: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [size, a multiple of BUCKET] and lengths int32 [size]; rows beyond `rows` repeat the first."""
    rows = [*rows, *[rows[0]] * (size - len(rows))]
    longest = max(len(row) for row in rows)
    tokens = np.zeros((size, -(-longest // BUCKET) * BUCKET), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.asarray([len(row) for row in rows], np.int32)


class _Loop(NamedTuple):
    """The decode loop's state: `token` [B] was drawn last and is not in the cache yet."""

    count: jax.Array
    token: jax.Array
    done: jax.Array
    out: jax.Array
    counts: jax.Array
    cache: KVCache


@partial(jax.jit, static_argnames=("graphdef", "sampling", "max_new_tokens"))
def _generate(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: jax.Array,
    lengths: jax.Array,
    row_ids: jax.Array,
    key: jax.Array,
    eos: jax.Array,
    *,
    sampling: Sampling,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """New tokens int32 [B, max_new_tokens] and how many of them count [B]."""
    decoder: Decoder = nnx.merge(graphdef, params)
    batch, width = tokens.shape
    slots = -(-(width + max_new_tokens) // BUCKET) * BUCKET
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)

    def draw(hidden_BD: jax.Array, positions: jax.Array) -> jax.Array:
        logits_BV = decoder.logits(hidden_BD[:, None])[:, 0]
        return sample(logits_BV, jax.vmap(jax.random.fold_in)(keys, positions), sampling)

    cache = KVCache.zeros(decoder.config, batch, slots, decoder.model.embed_tokens.weight.get_value().dtype)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    hidden, cache = decoder.extend(tokens, positions, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = draw(last, lengths)
    start = _Loop(
        count=jnp.int32(0),
        token=first,
        done=jnp.zeros(batch, bool),
        out=jnp.zeros((batch, max_new_tokens), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        cache=cache,
    )

    def record(loop: _Loop) -> _Loop:
        """Notes the drawn tokens of the rows that are not done, then marks the rows that ended with them."""
        out = loop.out.at[:, loop.count].set(jnp.where(loop.done, 0, loop.token))
        counts = loop.counts + (~loop.done).astype(jnp.int32)
        done = loop.done | jnp.any(loop.token[:, None] == eos[None, :], axis=1)
        return loop._replace(out=out, counts=counts, done=done, count=loop.count + 1)

    def advance(loop: _Loop) -> _Loop:
        positions = lengths + loop.count - 1
        hidden, cache = decoder.extend(loop.token[:, None], positions[:, None], loop.cache)
        return record(loop._replace(token=draw(hidden[:, 0], positions + 1), cache=cache))

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.count < max_new_tokens) & ~jnp.all(loop.done)

    final = jax.lax.while_loop(unfinished, advance, record(start))
    return final.out, final.counts


def sample(logits_BV: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """One token int32 [B] for each row of float32 logits [B, V], with one PRNG key a row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys, logits_BV).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """-inf for what top_k and then top_p leave out."""
    if sampling.top_k:
        kth = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        order = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities = jax.nn.softmax(order, axis=-1)
        # A token stays while the mass before it is short of top_p, so the most likely one always does.
        kept = jnp.sum(jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < jnp.take_along_axis(order, kept - 1, axis=-1), -jnp.inf, logits_BV)
    return logits_BV
