"""What the loss sees: one tokenized document (`Example`), and documents laid out in rows of equal length (`Batch`)."""

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
    """Rows of documents, a pytree of five arrays [..., T] (from the loader [A, B, T]: accumulation, rows, tokens).

    Attributes:
      tokens: int32; 0 in the padding.
      targets: int32; the next token of the same document, 0 where there is none.
      loss_mask: float32; 1 where `targets` is trained on. 0 at each document's last token, so no loss ever crosses
        from one document into the next.
      segment_ids: int32; 1, 2, ... for a row's documents, 0 in the padding. None: one document a row, no padding.
      positions: int32; from 0 in every document, 0 in the padding.
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array


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
