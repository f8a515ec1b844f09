"""Batches of data larger than memory: read, tokenized and packed a bounded buffer at a time, as grain's datasets.

Source -> repeat -> examples -> rows of documents -> batches -> read ahead. Everything but the first and the packing is
grain's; so are the states, of which only the place in the data is ever stored, never the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from jaxft.data.batch import Batch, Example, lay_out
from jaxft.data.examples import ExampleMaker, RowReport, RowSettings, nothing_left
from jaxft.data.iteration import READ_AHEAD, BatchIterator
from jaxft.data.packing import arrange
from jaxft.data.sources import RawRow, Source, open_source
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks this name up; transformers is slow to import
    PreTrainedTokenizerBase = Any

BUFFER_ROWS = 512


class StreamLoader:
    """Batches of rows that are read as they are needed; the same as `BatchLoader`'s in shape and meaning.

    A buffer of examples is filled, shuffled, packed by best fit and given out, then the next. What a position in the
    stream needs to go on is the place in the data where its buffer began, and how many of its rows were given out.

    Args:
      source: see `jaxft.data.sources.open_source`.
      tokenizer: of the model.
      settings: how rows become examples.
      batch_size: rows per micro-batch, B.
      accumulation: micro-batches per step, A.
      packing: several documents a row; otherwise one.
      seed: of the shuffling.
      epochs: how often the data is gone through; None: without end.
      shuffle: False keeps the order that packing gives, or without packing that of the data.
      max_segments: documents a packed row holds at most.
      buffer_tokens: tokens in a buffer, at least; None takes those of 512 packed rows. The last rows of a buffer stay
        emptier than the others, so a small one wastes room; rows are shuffled within a buffer only.
      name: what to call rows that have no file in messages.

    Attributes:
      report: what became of the rows so far, and how full the packed rows are.
      example: the first, for a look at it.

    Raises:
      JaxftError: as `open_source`; a setting that is not positive; from its iterators as `ExampleMaker`, or if nothing
        is left of the data.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: RowSettings,
        *,
        batch_size: int,
        accumulation: int = 1,
        packing: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        max_segments: int = 64,
        buffer_tokens: int | None = None,
        name: str = "dataset",
    ) -> None:
        numbers = {
            "batch_size": batch_size, "accumulation": accumulation, "epochs": epochs, "max_segments": max_segments,
            "buffer_tokens": buffer_tokens,
        }  # fmt: skip
        for setting, value in numbers.items():
            if value is not None and value < 1:
                raise JaxftError(setting, f"must be at least 1, not {value}")
        self.steps_per_epoch: int | None = None
        self.max_seq_length = settings.max_seq_length
        self.shape = (accumulation, batch_size)
        self.epochs = epochs
        self.report = StreamReport(RowReport())
        self._source, self._name = open_source(source, name), name
        self._tokenizer, self._settings = tokenizer, settings
        self._packing = Packing(
            length=settings.max_seq_length,
            packing=packing,
            shuffle=shuffle,
            seed=seed,
            max_segments=max_segments,
            buffer_tokens=buffer_tokens or BUFFER_ROWS * settings.max_seq_length,
        )

    def __iter__(self) -> BatchIterator:
        make = ExampleMaker(self._tokenizer, self._settings)
        self.report = StreamReport(make.report)
        raws = SourceDataset(self._source, at_end=lambda: _require_examples(make.report, self._name))
        examples = grain.experimental.RepeatIterDataset(raws, self.epochs).map(make)
        buffers = _BufferDataset(examples, self._packing, self.report)
        # Each of them at once, so that a buffer is ready when the one before is used up.
        ready = grain.experimental.ThreadPrefetchIterDataset(buffers, prefetch_buffer_size=1)
        rows = grain.experimental.FlatMapIterDataset(ready, _Rows())
        batches = rows.batch(self.shape[0] * self.shape[1], batch_fn=self._batch)
        return BatchIterator(
            grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=READ_AHEAD), self.order
        )

    @property
    def order(self) -> dict[str, object]:
        """What decides which batch comes when; see `jaxft.data.iteration.BatchIterator`."""
        return {"data": self._source.facts, "shape": self.shape, **dataclasses.asdict(self._packing)}

    @property
    def example(self) -> Example:
        make = ExampleMaker(self._tokenizer, self._settings)
        for raw, _ in self._source.read():
            for example in make(raw):
                return example
        raise nothing_left(make.report, self._name)

    def _batch(self, rows: Sequence[list[Example]]) -> Batch:
        """[A, B, T], with rows of padding where there are too few."""
        examples = [example for row in rows for example in row]
        numbers = iter(range(len(examples)))
        indices = [[next(numbers) for _ in row] for row in rows]
        missing = self.shape[0] * self.shape[1] - len(rows)
        batch = lay_out(examples, indices + [[]] * missing, self.max_seq_length)
        batch = Batch(*(array.reshape(*self.shape, -1) for array in batch))
        return batch if self._packing.packing else batch.one_document_a_row()


@dataclasses.dataclass
class StreamReport:
    """What became of the rows so far, and how full the rows of the batch are that were made of them."""

    rows: RowReport
    packed_rows: int = 0
    packed_tokens: int = 0
    capacity: int = 0

    def count(self, rows: int, tokens: int, capacity: int) -> None:
        """Adds a packed buffer."""
        self.packed_rows += rows
        self.packed_tokens += tokens
        self.capacity += capacity

    def __str__(self) -> str:
        if not self.packed_rows:
            return "a stream, not read yet"
        return f"{self.rows}; {self.packed_rows:,} packed rows, {self.packed_tokens / self.capacity:.1%} full"


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a buffer of examples becomes rows; see `StreamLoader`."""

    length: int
    packing: bool
    shuffle: bool
    seed: int
    max_segments: int
    buffer_tokens: int


class SourceDataset(grain.IterDataset):
    """A source's raw rows as one of grain's datasets.

    Args:
      at_end: called when all rows were read, from the first to the last.
    """

    def __init__(self, source: Source, at_end: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.source = source
        self.at_end = at_end

    def __iter__(self) -> grain.DatasetIterator:
        return _SourceIterator(self.source, self.at_end)


class _SourceIterator(grain.DatasetIterator):
    def __init__(self, source: Source, at_end: Callable[[], None]) -> None:
        super().__init__()
        self._source, self._at_end = source, at_end
        self._go_to(None)

    def _go_to(self, position: Any) -> None:
        self._position, self._from_the_first = position, position is None
        self._rows: Iterator[tuple[RawRow, Any]] | None = None  # opened when it is needed, not to read in vain

    def __next__(self) -> RawRow:
        if self._rows is None:
            self._rows = self._source.read(self._position)
        try:
            row, self._position = next(self._rows)
        except StopIteration:
            if self._from_the_first:
                self._at_end()
            raise
        return row

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._go_to(state["position"])


class _BufferDataset(grain.IterDataset):
    """Lists of examples to buffers of them, each packed: a list of rows, which are lists of examples."""

    def __init__(self, parent: grain.IterDataset, packing: Packing, report: StreamReport) -> None:
        super().__init__(parent)
        self._packing, self._report = packing, report

    def __iter__(self) -> grain.DatasetIterator:
        return _BufferIterator(iter(self._parent), self._packing, self._report)


class _BufferIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, packing: Packing, report: StreamReport) -> None:
        super().__init__(parent)
        self._packing, self._report = packing, report
        self._buffers = 0  # so far; the seed of the next

    def __next__(self) -> list[list[Example]]:
        examples, tokens = [], 0
        for some in self._parent:
            examples += some
            tokens += sum(len(example.tokens) for example in some)
            if tokens >= self._packing.buffer_tokens:
                break
        if not examples:
            raise StopIteration
        packing, lengths = self._packing, np.array([len(example.tokens) for example in examples])
        rng = np.random.default_rng((packing.seed, self._buffers)) if packing.shuffle else None
        rows = arrange(lengths, packing.length, packing.packing, packing.max_segments, rng)
        self._buffers += 1
        self._report.count(rows=len(rows), tokens=tokens, capacity=len(rows) * packing.length)
        return [[examples[i] for i in row] for row in rows]

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "buffers": self._buffers}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._buffers = state["buffers"]


class _Rows(grain.experimental.FlatMapTransform):
    """A buffer's rows, one after the other."""

    def flat_map(self, element: list[list[Example]]) -> list[list[Example]]:
        return element


def _require_examples(report: RowReport, name: str) -> None:
    if not report.examples:
        raise nothing_left(report, name)
