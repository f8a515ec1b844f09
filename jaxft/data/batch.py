"""What the loss sees: one tokenized document (`Example`), and documents laid out in rows of equal length (`Batch`).

Losses over whole completions have batches of their own around it. Letters: P pairs, S segments of a row, at most.
"""

# No `from __future__ import annotations` here: it turns a NamedTuple's annotations into strings that the run-time type
# checker of the tests cannot look up.

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy's here; jax's, or whatever else a tree holds, once it is in a step


class Example(NamedTuple):
    """A tokenized document.

    Attributes:
      where: the row it came from, for messages.
      tokens: int32 [n].
      loss_mask: bool [n]; True where the token is a target, that is, predicted from the one before it. The first is
        never one.
    """

    where: str
    tokens: np.ndarray
    loss_mask: np.ndarray


class Batch(NamedTuple):
    """Rows of documents, a pytree of arrays [..., T] (from the loader [A, B, T]: accumulation, rows, tokens).

    Attributes:
      tokens: int32; 0 in the padding.
      targets: int32; the next token of the same document, 0 where there is none.
      loss_mask: float32; 1 where `targets` is trained on. 0 at each document's last token, so no loss ever crosses
        from one document into the next.
      segment_ids: int32; 1, 2, ... for a row's documents, 0 in the padding. None: at most one document a row, from its
        start; no token sees the padding behind it, so attention needs no other mask than the causal one.
      positions: int32; from 0 in every document, -1 in the padding.
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array

    @property
    def present(self) -> Array:
        """bool: what is not padding."""
        return self.positions >= 0 if self.segment_ids is None else self.segment_ids > 0

    def one_document_a_row(self) -> "Batch":
        """The same rows, of which none has more than one document, without segment ids."""
        return self._replace(segment_ids=None)


class Pairs(NamedTuple):
    """Something of the chosen and of the rejected completions: float32 [..., P] each."""

    chosen: Array
    rejected: Array


class PairBatch(NamedTuple):
    """Pairs packed in rows, a pytree whose first leaf is the tokens.

    Attributes:
      text: segments 2 p - 1 and 2 p of a row are its pair p's chosen and rejected completion, each after its prompt.
      pair_mask: float32 [..., P], 1 where there is a pair.
      nll_weight: float32 [..., P], factor of the chosen completion's summed negative log-likelihood.
      reference: log-probabilities float32 under the reference; None computes them in the step, adapters off.
    """

    text: Batch
    pair_mask: Array
    nll_weight: Array
    reference: Pairs | None = None


class UnpairedBatch(NamedTuple):
    """Completions that were liked or not, a pytree whose first leaf is the tokens.

    Attributes:
      text: segment s of a row is its completion s, after its prompt.
      sequence_mask: float32 [..., S], 1 where there is a completion.
      desirable: float32 [..., S], 1 where it was liked.
      baseline: float32 [...], z: the mean log-ratio to the reference of prompts with other prompts' completions.
      reference: log-probabilities float32 [..., S]; None computes them in the step, adapters off.
    """

    text: Batch
    sequence_mask: Array
    desirable: Array
    baseline: Array
    reference: Array | None = None


class PolicyBatch(NamedTuple):
    """Sampled completions packed in rows, a pytree whose first leaf is the tokens.

    Attributes:
      text: segment s of a row is its completion s, after its prompt; loss_mask is 0 on truncated ones to be left out.
      sequence_mask: float32 [..., S], 1 where there is a completion, left out or not.
      advantages: float32 [..., S].
      old_log_probs: float32 [..., T], where the completions were sampled; None is this very step's policy.
      reference: float32 [..., T]; None computes them in the step, adapters off, where beta is not 0.
    """

    text: Batch
    sequence_mask: Array
    advantages: Array
    old_log_probs: Array | None = None
    reference: Array | None = None


def lay_out(examples: Sequence[Example], rows: Sequence[Sequence[int]], length: int) -> Batch:
    """Lays documents one after the other in rows.

    Args:
      examples: all documents.
      rows: for each row, the indices of its documents; none of them gives a row of padding.
      length: tokens per row, T; the caller sees to it that each row's documents fit.

    Returns:
      Batch of [len(rows), T].
    """
    shape = (len(rows), length)
    batch = Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    batch.positions[:] = -1
    for r, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, start=1):
            _, tokens, loss_mask = examples[index]
            stop = start + len(tokens)
            batch.tokens[r, start:stop] = tokens
            batch.targets[r, start : stop - 1] = tokens[1:]
            batch.loss_mask[r, start : stop - 1] = loss_mask[1:]
            batch.segment_ids[r, start:stop] = segment
            batch.positions[r, start:stop] = np.arange(stop - start)
            start = stop
    return batch
