"""The device's half of generation: slots that decode together, each with a completion of its own length.

A slot's prompt stands at the start of its row of the cache, whatever its length: a query sees only what lies up to its
own position, so what stands behind is never seen, and is overwritten by the tokens that follow. A slot begins with its
prompt's last token as the one that was drawn last, so every token of a completion comes out of the one decode program.

Shape letters: B slots, S positions of the cache, N completions, M tokens of the longest, V vocab_size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.generation.sampling import Sampling, sample
from jaxft.models.attention import KVCache
from jaxft.models.decoder import Decoder


class Slots(NamedTuple):
    """What the slots are doing.

    Attributes:
      cache: keys and values [L, B, S, K, H].
      token: int32 [B], drawn last, not in the cache yet.
      position: int32 [B], of that token.
      row: int32 [B], the completion that the slot writes.
      left: int32 [B], how many tokens it may still draw; 0 is an idle slot.
      keys: PRNG keys [B], a completion's own.
      seen: bool [B, V], the tokens of prompt and completion so far; None where nothing asks for them.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    row: jax.Array
    left: jax.Array
    keys: jax.Array
    seen: jax.Array | None

    @classmethod
    def idle(cls, decoder: Decoder, slots: int, capacity: int, sampling: Sampling) -> Slots:
        """`slots` idle ones, with a cache of `capacity` positions."""
        config = decoder.config
        cache = KVCache.zeros(config, slots, capacity, jnp.dtype(decoder.model.embed_tokens.dtype))
        # Arrays of their own each, because all of them are donated.
        token, position, row, left = (jnp.zeros(slots, jnp.int32) for _ in range(4))
        keys = jax.random.split(jax.random.key(0), slots)
        seen = jnp.zeros((slots, config.vocab_size), bool) if sampling.penalises else None
        return cls(cache, token, position, row, left, keys, seen)

    @property
    def capacity(self) -> int:
        """Positions of the cache."""
        return self.cache.k.shape[2]


class Results(NamedTuple):
    """The completions so far: tokens int32 [N, M], their log-probabilities float32 [N, M], how many int32 [N]."""

    tokens: jax.Array
    log_probs: jax.Array
    counts: jax.Array

    @classmethod
    def empty(cls, completions: int, length: int) -> Results:
        """Room for so many completions of at most `length` tokens."""
        shape = (completions, length)
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(completions, jnp.int32))


def _decoder(graphdef: nnx.GraphDef, params: nnx.State) -> Decoder:
    decoder: Decoder = nnx.merge(graphdef, params)
    # There is no backward pass to keep anything for; a loop's own kernels cost a few microseconds an iteration.
    decoder.remat = "none,unroll=4"
    # Adapters in the activations' dtype, which the products take, once a call and not once a token; and as stacks that
    # are read where they are used, as the base's are: nothing trains here.
    dtype = decoder.model.embed_tokens.weight.get_value().dtype
    for path, variable in nnx.iter_graph(decoder):
        if isinstance(variable, nnx.LoRAParam):
            variable.set_metadata(trainable=False)
            if path[-1] in ("lora_A", "lora_B"):
                variable.set_value(variable.get_value().astype(dtype))
    return decoder


@partial(jax.jit, static_argnames="graphdef")
def prefill(graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array, lengths: jax.Array) -> KVCache:
    """The keys and values [L, R, W, K, H] of prompts int32 [R, W] of `lengths` tokens, padded on the right."""
    decoder = _decoder(graphdef, params)
    dtype = jnp.dtype(decoder.model.embed_tokens.dtype)
    rows, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    return decoder.extend(tokens, positions, KVCache.zeros(decoder.config, rows, width, dtype), lengths)[1]


@partial(jax.jit, donate_argnames="slots")
def admit(
    slots: Slots,
    prompts: KVCache,
    tokens: jax.Array,
    prompt: jax.Array,
    length: jax.Array,
    slot: jax.Array,
    row: jax.Array,
    limit: jax.Array,
    key: jax.Array,
) -> Slots:
    """Gives `slot` the completion `row` of at most `limit` tokens, of a prompt that `prefill` ran.

    Args:
      prompts: keys and values [L, R, W, K, H], W at most the cache's capacity; `prompt` is the one of them.
      tokens: int32 [W], of which `length` are the prompt.
      key: the completion's own.
    """

    def put(whole: jax.Array, parts: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(parts, prompt, 1, axis=1)
        return jax.lax.dynamic_update_slice(whole, part, (0, slot, 0, 0, 0))

    cache = jax.tree.map(put, slots.cache, prompts)
    seen = slots.seen
    if seen is not None:
        vocab = seen.shape[1]
        present = jnp.where(jnp.arange(tokens.shape[0]) < length, tokens, vocab)
        seen = seen.at[slot].set(jnp.zeros(vocab, bool).at[present].set(True, mode="drop"))
    return Slots(
        cache,
        token=slots.token.at[slot].set(tokens[length - 1]),
        position=slots.position.at[slot].set(length - 1),
        row=slots.row.at[slot].set(row),
        left=slots.left.at[slot].set(limit),
        keys=slots.keys.at[slot].set(key),
        seen=seen,
    )


@partial(jax.jit, static_argnames="capacity")
def grow(slots: Slots, capacity: int) -> Slots:
    """The same with a cache of `capacity` positions."""
    more = ((0, 0), (0, 0), (0, capacity - slots.capacity), (0, 0), (0, 0))
    return slots._replace(cache=jax.tree.map(lambda array: jnp.pad(array, more), slots.cache))


@jax.jit
def compact(slots: Slots, which: jax.Array) -> Slots:
    """The slots int32 [any], in that order, as a smaller batch. Nothing is donated: no array keeps its shape."""
    cache = jax.tree.map(lambda array: array.at[:, which].get(mode="promise_in_bounds"), slots.cache)
    token, position, row, left, keys, seen = jax.tree.map(lambda array: array[which], slots[1:])
    return Slots(cache, token, position, row, left, keys, seen)


class _Loop(NamedTuple):
    step: jax.Array
    slots: Slots
    results: Results


@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames=("slots", "results"))
def decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    slots: Slots,
    results: Results,
    eos: jax.Array,
    occupied: jax.Array,
    steps: jax.Array,
    least: jax.Array,
    *,
    sampling: Sampling,
) -> tuple[Slots, Results, jax.Array]:
    """Draws a token for every busy slot, up to `steps` times; also returns how many times it was.

    It ends early when fewer than `least` slots are busy, of which there is at least one.

    Args:
      eos: int32 [any], the tokens that end a completion.
      occupied: bool [B], False makes a slot idle.
      steps, least: int32 scalars. The cache must hold `steps` more tokens of every busy slot, or as many as
        it may still draw.
    """
    decoder = _decoder(graphdef, params)
    slots = slots._replace(left=jnp.where(occupied, slots.left, 0))

    def advance(loop: _Loop) -> _Loop:
        # Attention reads a row up to its position, so an idle one stands at the start of its own.
        position = jnp.where(loop.slots.left > 0, loop.slots.position, 0)
        hidden, cache = decoder.extend(loop.slots.token[:, None], position[:, None], loop.slots.cache)
        logits_BV = decoder.logits(hidden)[:, 0]
        return _Loop(loop.step + 1, *_record(loop.slots._replace(cache=cache), loop.results, logits_BV, eos, sampling))

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.step < steps) & (jnp.sum(loop.slots.left > 0, dtype=jnp.int32) >= least)

    step, slots, results = jax.lax.while_loop(goes_on, advance, _Loop(jnp.int32(0), slots, results))
    return slots, results, step


def _record(
    slots: Slots, results: Results, logits_BV: jax.Array, eos: jax.Array, sampling: Sampling
) -> tuple[Slots, Results]:
    """Draws every slot's next token and notes those of the busy ones."""
    busy = slots.left > 0
    position = slots.position + 1
    keys = jax.vmap(jax.random.fold_in)(slots.keys, position)
    token, log_prob = sample(logits_BV, keys, sampling, slots.seen)
    row = jnp.where(busy, slots.row, results.counts.shape[0])  # out of range: dropped
    where = (row, results.counts[slots.row])
    results = Results(
        results.tokens.at[where].set(token, mode="drop"),
        results.log_probs.at[where].set(log_prob, mode="drop"),
        results.counts.at[row].add(1, mode="drop"),
    )
    ended = jnp.any(token[:, None] == eos[None, :], axis=1)
    seen = slots.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    slots = slots._replace(
        token=jnp.where(busy, token, slots.token),
        position=jnp.where(busy, position, slots.position),
        left=jnp.where(busy & ~ended, slots.left - 1, 0),
        seen=seen,
    )
    return slots, results
