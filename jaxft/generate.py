"""Generation: a few slots decode together, and a queue of completions refills the ones that are done.

Every row has its own length; prompts are run a few at once, each once for all of its completions; the host looks only
every `CHUNK` tokens, or when a slot is free and a completion waits for it, or when half of the slots would be enough.
The device's half is `jaxft.generation.slots`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.errors import JaxftError
from jaxft.generation import slots as device
from jaxft.generation.sampling import GREEDY, Sampling
from jaxft.generation.text import StopStrings
from jaxft.models.config import DecoderConfig
from jaxft.models.decoded import decode_layers, decoded_bytes
from jaxft.models.decoder import Decoder

__all__ = ["BUCKET", "CHUNK", "Completions", "Sampling", "complete", "generate"]

BUCKET = 64  # the least length of prompts and cache; longer ones are powers of two, so that few programs are compiled
CHUNK = 32  # tokens that the device draws before the host looks
STREAMED = 4  # the same where somebody watches them
MANY_STEPS = 256  # of decoding, for which it pays to copy the layers' weights apart
PREFILL = 1024  # tokens, padding included, of the prompts that are run at once, unless one is longer


@dataclasses.dataclass(frozen=True)
class Completions:
    """What `complete` returns, N completions: those of the first prompt, those of the second, and so on.

    Attributes:
      tokens: the new tokens of each, up to and including what ended it.
      log_probs: float32 [N, max_new_tokens] on the device: each token's log-probability, 0 behind the last; see
        `jaxft.generation.sampling` for of which distribution.
      finished: whether each was ended by an end-of-sequence token or a stop string, not by its length.
      utilisation: which part of the slots' steps drew one of `tokens`.
    """

    tokens: list[list[int]]
    log_probs: jax.Array
    finished: list[bool]
    utilisation: float


def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """The `tokens` of what `complete` returns with these settings."""
    return complete(decoder, prompts, **settings).tokens


def complete(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    num_return_sequences: int = 1,
    eos_token_ids: Collection[int] = (),
    stop: StopStrings | None = None,
    sampling: Sampling = GREEDY,
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    compact: bool = False,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Completions:
    """Continues prompts.

    Args:
      decoder: the model, adapters included; a quantized base is used as it is.
      prompts: token ids, at least one each.
      max_new_tokens: at most so many for each completion, or for each prompt's.
      num_return_sequences: completions of each prompt, which is run once for all of them.
      eos_token_ids: what ends a completion.
      stop: strings that end a completion, too; what was drawn behind one is dropped.
      sampling: how tokens are drawn.
      seed: of the call; or one for each completion, whose noise then depends on its seed and the position only.
      batch_size: slots, that is, completions that are decoded at once.
      compact: when nothing waits and at most half of the slots are busy, go on with half as many. Each size is a
        program of its own, so this is for who runs them again and again; and how a row's numbers are rounded then
        depends on when the others end: in float32 log-probabilities agree within 1e-4, in bfloat16 another token may be
        drawn. Without it a row has the same bits whatever the others of its batch hold.
      on_tokens: is called with a completion's number and its next tokens, as they are drawn.

    Raises:
      JaxftError: an empty prompt, one that leaves no room below the model's max_position_embeddings, a token without an
        embedding, or a setting that is not positive.
    """
    limits = _for_each("max_new_tokens", max_new_tokens, len(prompts))
    settings = (("num_return_sequences", num_return_sequences), ("batch_size", batch_size))
    for name, value in (*settings, *(("max_new_tokens", limit) for limit in limits)):
        if value < 1:
            raise JaxftError(name, f"must be at least 1, not {value}")
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        _check_prompt(f"prompt {row}", prompt, limit, decoder.config)
    total = len(prompts) * num_return_sequences
    keys = _keys(seed, total)
    if not total:
        return Completions([], jnp.zeros((0, 0), jnp.float32), [], 1.0)
    lengths = np.asarray([len(prompt) for prompt in prompts])
    most = room(int(lengths.max()), int(np.max(lengths + limits)))
    slots, capacity = min(batch_size, total), min(bucket(int(lengths.max()) + CHUNK), most)
    batch = _Batch(
        model=nnx.split(decoder),
        decoding=_for_decoding(decoder, sum(limits) * num_return_sequences // slots),
        prompts=prompts,
        lengths=np.repeat(lengths, num_return_sequences),
        limits=np.repeat(limits, num_return_sequences),
        keys=keys,
        eos=np.asarray(sorted(eos_token_ids), np.int32),
        stop=stop,
        sampling=sampling,
        compact=compact,
        on_tokens=on_tokens,
        room=most,
        slots=device.Slots.idle(decoder, slots, capacity, sampling),
        results=device.Results.empty(bucket(total, least=1), bucket(max(limits))),
    )
    while batch.refill():
        batch.decode()
    return batch.completions()


def _for_decoding(decoder: Decoder, steps: int) -> nnx.State:
    """The decoder's parameters for so many steps of decoding.

    A loop over stacked layers copies plain weights out of their stack for every token, which takes as long as reading
    them does. Where that is done often and the device has room, each layer gets an array of its own.
    """
    params = nnx.state(decoder)
    dtype = decoder.model.embed_tokens.dtype
    copied, _ = decoded_bytes(decoder.config, params, dtype, quantized=False)
    if steps < MANY_STEPS or 2 * copied > _free_memory():
        return params
    return decode_layers(decoder.config, params, dtype, quantized=False)


def _free_memory() -> int:
    """Bytes of the device that nothing uses yet; 0 on a CPU, whose memory JAX does not know."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)


class _Prefilled(NamedTuple):
    """Prompts that were run at once: the first one's number, their padded tokens, keys and values [L, R, W, K, H]."""

    first: int
    tokens: np.ndarray
    cache: Any


@dataclasses.dataclass
class _Batch:
    """One call of `complete`: the host's view of its N completions and B slots.

    Attributes:
      model: the decoder, split.
      decoding: its parameters as `decode` takes them.
      prompts: token ids.
      lengths, limits: int [N], of each completion's prompt, and how many tokens it may have.
      keys: PRNG keys [N].
      eos, stop, sampling, compact, on_tokens: as of `complete`, eos as an array.
      room: positions that the cache has at most.
      slots, results: what is on the device.
    """

    model: tuple[nnx.GraphDef, nnx.State]
    decoding: nnx.State
    prompts: Sequence[Sequence[int]]
    lengths: np.ndarray
    limits: np.ndarray
    keys: jax.Array
    eos: np.ndarray
    stop: StopStrings | None
    sampling: Sampling
    compact: bool
    on_tokens: Callable[[int, list[int]], None] | None
    room: int
    slots: device.Slots
    results: device.Results

    def __post_init__(self) -> None:
        total = len(self.lengths)
        self.waiting = deque(range(total))
        self.occupants: list[int | None] = [None] * self.slots.token.shape[0]
        self.counts = np.zeros(total, int)
        self.stopped = np.zeros(total, bool)
        self.slot_steps = 0  # steps times slots
        self.prefilled = _Prefilled(0, np.zeros((0, 0), np.int32), None)

    def refill(self) -> bool:
        """Gives idle slots the next completions; False when no slot has any."""
        for slot, occupant in enumerate(self.occupants):
            if occupant is None and self.waiting:
                self.occupants[slot] = row = self.waiting.popleft()
                prompt = row * len(self.prompts) // len(self.lengths)
                self._prefill(prompt)
                first, tokens, cache = self.prefilled
                numbers = map(np.int32, (prompt - first, self.lengths[row], slot, row, self.limits[row]))
                self.slots = device.admit(self.slots, cache, tokens[prompt - first], *numbers, self.keys[row])
        return bool(self._busy())

    def decode(self) -> None:
        """Draws tokens until the host has to look, and sees which completions are done."""
        if self.compact:
            self._compact()
        self._make_room()
        occupied = np.asarray([row is not None for row in self.occupants])
        self.slots, self.results, steps = device.decode(
            self.model[0],
            self.decoding,
            self.slots,
            self.results,
            self.eos,
            occupied,
            np.int32(STREAMED if self.on_tokens else CHUNK),
            np.int32(self._least_busy()),
            sampling=self.sampling,
        )
        steps, left, counts = jax.device_get((steps, self.slots.left, self.results.counts))
        self.slot_steps += int(steps) * len(self.occupants)
        tokens = np.asarray(self.results.tokens) if self.stop or self.on_tokens else None
        for slot, row in enumerate(self.occupants):
            if row is not None:
                before, self.counts[row] = self.counts[row], counts[row]
                if tokens is not None:
                    self._look_at(row, tokens[row, : counts[row]].tolist(), int(before))
                if left[slot] == 0 or self.stopped[row]:
                    self.occupants[slot] = None

    def completions(self) -> Completions:
        """The results, when all is done."""
        on_host = np.asarray(self.results.tokens)
        tokens = [on_host[row, :count].tolist() for row, count in enumerate(self.counts)]
        width = self.limits.max()
        drawn = np.arange(width)[None, :] < self.counts[:, None]
        return Completions(
            tokens=tokens,
            log_probs=jnp.where(drawn, self.results.log_probs[: len(tokens), :width], 0),
            finished=[bool(self.stopped[row]) or new[-1] in self.eos for row, new in enumerate(tokens)],
            utilisation=float(self.counts.sum() / self.slot_steps),
        )

    def _prefill(self, prompt: int) -> None:
        """Runs a prompt, and with it those after it whose bucket is the same: their completions come next.

        How many are run at once depends on the bucket and the number of prompts alone, so a prompt's own numbers do
        not depend on what the others are.
        """
        first, tokens, _ = self.prefilled
        if first <= prompt < first + len(tokens):
            return
        width = bucket(len(self.prompts[prompt]))
        rows = min(max(1, PREFILL // width), bucket(len(self.prompts), least=1))
        following = itertools.islice(self.prompts, prompt, prompt + rows)
        same = list(itertools.takewhile(lambda tokens: bucket(len(tokens)) == width, following))
        tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, ids in enumerate(same):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        self.prefilled = _Prefilled(prompt, tokens[: len(same)], device.prefill(*self.model, tokens, lengths))

    def _busy(self) -> dict[int, int]:
        """The slots with a completion: which."""
        return {slot: row for slot, row in enumerate(self.occupants) if row is not None}

    def _least_busy(self) -> int:
        """The host has to look when fewer slots are busy: one may be refilled, or half as many are enough, or none."""
        if self.waiting:
            return len(self.occupants)
        half = len(self.occupants) // 2
        return half + 1 if self.compact and len(self._busy()) > half else 1

    def _compact(self) -> None:
        """Goes on with half as many slots while they are enough, unless the end is near anyway."""
        busy, size = self._busy(), len(self.occupants)
        rows = list(busy.values())
        if self.waiting or np.max(self.limits[rows] - self.counts[rows]) <= CHUNK:
            return
        while len(busy) <= size // 2:
            size //= 2
        if size < len(self.occupants):
            idle = (slot for slot in range(len(self.occupants)) if slot not in busy)
            which = [*busy, *itertools.islice(idle, size - len(busy))]
            self.slots = device.compact(self.slots, np.asarray(which, np.int32))
            self.occupants = [self.occupants[slot] for slot in which]

    def _make_room(self) -> None:
        """Makes the cache hold what the busy slots may draw until the host looks again."""
        rows = list(self._busy().values())
        need = int(np.max(self.lengths[rows] + np.minimum(self.counts[rows] + CHUNK, self.limits[rows])))
        if need > self.slots.capacity:
            self.slots = device.grow(self.slots, min(bucket(need), self.room))

    def _look_at(self, row: int, tokens: list[int], before: int) -> None:
        """Ends a completion with a stop string, and passes on what is new in it."""
        end = self.stop(tokens, len(tokens) - before) if self.stop else None
        if end is not None:
            self.counts[row], self.stopped[row] = end, True
        if self.on_tokens:
            self.on_tokens(row, tokens[before:end])


def bucket(length: int, least: int = BUCKET) -> int:
    """The least power of two that is not below `length`, nor below `least`."""
    return max(least, 1 << (length - 1).bit_length())


def room(prompt: int, row: int) -> int:
    """Positions of a cache that grows no further, for prompts and whole rows of at most so many tokens.

    A multiple of an eighth of the row's bucket: few programs, and not twice the memory. A prompt's own bucket fits.
    """
    step = max(BUCKET, bucket(row) // 8)
    return max(bucket(prompt), -(-row // step) * step)


def _keys(seed: int | Sequence[int], total: int) -> jax.Array:
    """One PRNG key for each completion."""
    if isinstance(seed, int):
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(total))
    if len(seed) != total:
        raise JaxftError("seed", f"has {len(seed)} values for {total} completions")
    return jax.vmap(jax.random.key)(jnp.asarray(seed, jnp.uint32))


def _for_each(name: str, value: int | Sequence[int], total: int) -> list[int]:
    """A setting's value for each prompt."""
    values = [value] * total if isinstance(value, int) else list(value)
    if len(values) != total:
        raise JaxftError(name, f"has {len(values)} values for {total} prompts")
    return values


def _check_prompt(where: str, prompt: Sequence[int], max_new_tokens: int, config: DecoderConfig) -> None:
    limit = config.max_position_embeddings
    if not len(prompt):
        raise JaxftError(where, "is empty")
    if len(prompt) + max_new_tokens > limit:
        raise JaxftError(
            where, f"has {len(prompt)} tokens, and {max_new_tokens} more pass the model's limit of {limit}"
        )
    for rope in config.ropes.values():
        switch = rope.original_max_position_embeddings
        if rope.kind == "longrope" and len(prompt) <= switch < len(prompt) + max_new_tokens:
            raise JaxftError(
                where,
                f"has {len(prompt)} tokens, and {max_new_tokens} more pass {switch}, where LongRoPE changes every key",
                f"Ask for at most {switch - len(prompt)} new tokens" if len(prompt) < switch else "",
            )
    unknown = [token for token in prompt if not 0 <= token < config.vocab_size]
    if unknown:
        raise JaxftError(where, f"has the token id {unknown[0]}, and the model has only {config.vocab_size} embeddings")
