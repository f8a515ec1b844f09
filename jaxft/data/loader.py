"""Examples in, one Batch a training step out, in an order that the seed decides."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from jaxft.data.batch import Batch, Example, lay_out
from jaxft.data.iteration import BatchIterator, iterate
from jaxft.data.packing import pack
from jaxft.errors import JaxftError


@dataclasses.dataclass(frozen=True)
class LayoutReport:
    """How one epoch's documents fill their rows.

    Attributes:
      documents, tokens, trained_tokens: of one epoch; trained tokens are those that the loss counts.
      rows: rows that hold documents; empty ones that fill the last step are not counted.
      utilisation: the share of these rows that is not padding.
      full_rows: rows that stopped filling at max_segments, with room left.
    """

    documents: int
    tokens: int
    trained_tokens: int
    rows: int
    utilisation: float
    full_rows: int

    def __str__(self) -> str:
        text = (
            f"{self.documents:,} documents, {self.tokens:,} tokens ({self.trained_tokens:,} trained) "
            f"in {self.rows:,} rows, {self.utilisation:.1%} full"
        )
        return f"{text}, {self.full_rows:,} rows stopped at max_segments" if self.full_rows else text


class BatchLoader:
    """Batches by step number: ``loader[step]`` is a Batch of [A, B, T], and ``iter(loader)`` can be resumed.

    Each epoch uses every document exactly once, in an order that depends only on (seed, epoch), so a step's number is
    all the state there is. Packed rows are made anew each epoch from shuffled documents; how many there are depends on
    the lengths alone, so the number of steps is known up front. The last step of an epoch is filled up with rows of
    padding, whose loss_mask is 0.

    Args:
      examples: the documents.
      batch_size: rows per micro-batch, B.
      accumulation: micro-batches per step, A.
      max_seq_length: tokens per row, T.
      packing: several documents a row; otherwise one.
      seed: of the shuffling.
      epochs: how often the documents are gone through.
      shuffle: False keeps the order that packing gives, or without packing that of `examples`.
      max_segments: documents a packed row holds at most.
      pad_to_multiple_of: without packing, T is then each step's longest document rounded up to a multiple of this, at
        most max_seq_length. Saves padding, and compiles the step once per T.

    Raises:
      JaxftError: no examples, one longer than max_seq_length, none with a target, or a setting that is not positive.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_seq_length: int,
        accumulation: int = 1,
        packing: bool = True,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = True,
        max_segments: int = 64,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        settings = {
            "batch_size": batch_size, "accumulation": accumulation, "max_seq_length": max_seq_length,
            "epochs": epochs, "max_segments": max_segments, "pad_to_multiple_of": pad_to_multiple_of,
        }  # fmt: skip
        for name, value in settings.items():
            if value is not None and value < 1:
                raise JaxftError(name, f"must be at least 1, not {value}")
        _check(examples, max_seq_length)
        self.examples = examples
        self.shape = (accumulation, batch_size)
        self.max_seq_length = max_seq_length
        self.packing = packing
        self.seed = seed
        self.epochs = epochs
        self.shuffle = shuffle
        self.max_segments = max_segments
        self.pad_to_multiple_of = pad_to_multiple_of
        self._lengths = np.array([len(example.tokens) for example in examples])
        self._cached: tuple[int, list[list[int]]] | None = None
        self.report = self._report()
        self.steps_per_epoch = -(-self.report.rows // (accumulation * batch_size))

    def __len__(self) -> int:
        """Steps over all epochs."""
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, step: int) -> Batch:
        """The Batch of a step, counted from 0 over all epochs. Raises IndexError outside them."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch, step = divmod(step, self.steps_per_epoch)
        n_rows = self.shape[0] * self.shape[1]
        rows = self._epoch_rows(epoch)[step * n_rows : (step + 1) * n_rows]
        batch = lay_out(self.examples, rows + [[]] * (n_rows - len(rows)), self._row_length(rows))
        return Batch(*(array.reshape(*self.shape, -1) for array in batch))

    def __iter__(self) -> BatchIterator:
        return iterate(self)

    @property
    def order(self) -> dict[str, object]:
        """What decides which documents each step has; see `jaxft.data.iteration.RandomAccess`."""
        names = ("shape", "max_seq_length", "packing", "seed", "shuffle", "max_segments", "pad_to_multiple_of")
        settings = {name: getattr(self, name) for name in names}
        return {**settings, "documents": len(self.examples), "lengths": zlib.crc32(self._lengths.tobytes())}

    def _epoch_rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch as indices of documents; the latest epoch's are kept."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._make_rows(epoch))
        return self._cached[1]

    def _make_rows(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        order = np.arange(len(self.examples))
        if self.shuffle:
            rng.shuffle(order)
        if not self.packing:
            return order[:, None].tolist()
        # Packing sorts by length, stably: this shuffle decides which of the equally long documents come together, and
        # the rows, which come out with the longest documents first, need one of their own.
        rows = [order[row].tolist() for row in pack(self._lengths[order], self.max_seq_length, self.max_segments)]
        if self.shuffle:
            rng.shuffle(rows)
        return rows

    def _row_length(self, rows: list[list[int]]) -> int:
        if self.packing or self.pad_to_multiple_of is None:
            return self.max_seq_length
        longest = max(int(self._lengths[row].sum()) for row in rows)
        return min(-(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of, self.max_seq_length)

    def _report(self) -> LayoutReport:
        rows = self._epoch_rows(0)
        capacity = len(rows) * self.max_seq_length
        if not self.packing:
            n_rows = self.shape[0] * self.shape[1]
            steps = [rows[i : i + n_rows] for i in range(0, len(rows), n_rows)]
            capacity = sum(len(step) * self._row_length(step) for step in steps)
        tokens = int(self._lengths.sum())
        return LayoutReport(
            documents=len(self.examples),
            tokens=tokens,
            trained_tokens=sum(int(np.count_nonzero(example.loss_mask[1:])) for example in self.examples),
            rows=len(rows),
            utilisation=tokens / capacity,
            full_rows=sum(len(row) == self.max_segments for row in rows) if self.packing else 0,
        )


def _check(examples: Sequence[Example], max_seq_length: int) -> None:
    if not examples:
        raise JaxftError("data set", "has no examples")
    for example in examples:
        if len(example.tokens) > max_seq_length:
            raise JaxftError(
                example.where,
                f"has {len(example.tokens)} tokens; max_seq_length is {max_seq_length}",
                'Raise max_seq_length, or set on_overlong to "truncate" or "drop".',
            )
    if not any(example.loss_mask[1:].any() for example in examples):
        raise JaxftError("data set", "has every label masked: there is nothing to learn from")
