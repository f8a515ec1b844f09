"""How the next token is drawn from its logits.

The order is the field's: repetition penalty, temperature, then what top_k, top_p and min_p leave. The log-probability
of a drawn token is the model's own at that temperature, before penalty and filters: what a training forward computes
with `pallas_kernels.selected_log_probs(..., logit_scale=1 / temperature)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import JaxftError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: keep only the k most likely; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability, of what top_k keeps, reaches it
        (arXiv:1904.09751); 1 keeps all.
      min_p: keep the tokens that are at least so many times as likely as the most likely one (arXiv:2407.01082); 0
        keeps all.
      repetition_penalty: of tokens in the prompt or the completion so far, positive logits are divided by it and
        negative ones multiplied (arXiv:1909.05858); 1 is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # Each condition is what must hold, so that NaN fails it.
        for name, holds, rule in (
            ("temperature", self.temperature >= 0, "not be negative"),
            ("top_k", self.top_k >= 0, "not be negative"),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "be in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "be a positive number"),
        ):
            if not holds:
                raise JaxftError(name, f"must {rule}, not {getattr(self, name)}")

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change what is drawn."""
        return self.repetition_penalty != 1


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Sampling):
    """How completions are made, spelt as transformers spells it; the others are `Sampling`'s.

    Attributes:
      max_new_tokens: at most so many for each.
      do_sample: draw with temperature, top_k, top_p and min_p; otherwise take the most likely token.
      temperature: of the drawing.
      stop_strings: texts that end a completion.
      seed: noise depends on it and on the row and position only; or one for each row.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    stop_strings: Sequence[str] = ()
    seed: int | Sequence[int] = 0

    def sampling(self) -> Sampling:
        """How the next token is drawn."""
        if not self.do_sample:
            return Sampling(repetition_penalty=self.repetition_penalty)
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})


def sample(
    logits_BV: jax.Array, keys: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token int32 [B] for each row of float32 logits [B, V], and its log-probability float32 [B].

    Args:
      keys: one PRNG key a row.
      seen_BV: bool, the tokens of each row so far; needed where `sampling.penalises`.
    """
    temperature = sampling.temperature or 1.0
    own_BV = logits_BV / temperature
    if sampling.penalises:
        assert seen_BV is not None
        logits_BV = penalised(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        token_B = jax.vmap(jax.random.categorical)(keys, filter_logits(logits_BV / temperature, sampling))
    chosen_B = jnp.take_along_axis(own_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(own_BV, axis=-1)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits with those of seen tokens made less likely."""
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, less_BV, logits_BV)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """-inf for what top_k, top_p and min_p leave out."""
    floor_B1 = jnp.full((logits_BV.shape[0], 1), -jnp.inf)
    if sampling.top_k or sampling.top_p < 1:
        floor_B1 = _last_kept(logits_BV, sampling)
    if sampling.min_p:
        floor_B1 = jnp.maximum(floor_B1, jnp.max(logits_BV, axis=-1, keepdims=True) + np.log(sampling.min_p))
    return jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)


def _last_kept(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """[B, 1], the least likely logit that top_k and then top_p keep."""
    if sampling.top_k:  # the k most likely are enough, and finding them is cheaper than sorting all
        order = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0]
    else:
        order = jnp.sort(logits_BV, axis=-1, descending=True)
    if sampling.top_p == 1:
        return order[:, -1:]
    probabilities = jax.nn.softmax(order, axis=-1)
    # A token stays while the mass before it is short of top_p, so the most likely one always does.
    kept = jnp.sum(jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p, axis=-1, keepdims=True)
    return jnp.take_along_axis(order, kept - 1, axis=-1)
