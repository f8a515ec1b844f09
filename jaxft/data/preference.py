"""Preference rows (prompt, chosen, rejected) to pairs of tokenized documents, and those to batches of packed rows."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxft.data.batch import Batch, Example, PairBatch, Pairs, lay_out
from jaxft.data.chat import RowTokenizer
from jaxft.data.formats import parse_row, read_objects
from jaxft.data.iteration import BatchIterator, iterate
from jaxft.data.packing import pack
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks this name up; transformers is slow to import
    PreTrainedTokenizerBase = Any

KEYS = ("prompt", "chosen", "rejected")
MAX_PAIRS = 32  # of a packed row: 64 segments, as in `data.loader`

OnOverlongPair = Literal["error", "drop"]


class Pair(NamedTuple):
    """A prompt with the better and the worse completion, each a document of its own."""

    chosen: Example
    rejected: Example

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.chosen.tokens) + len(self.rejected.tokens)


@dataclasses.dataclass
class PairReport:
    """What happened to a data set's rows, and how an epoch's pairs fill theirs."""

    pairs: int = 0
    tokens: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        text = f"{self.pairs:,} pairs, {self.tokens:,} tokens"
        return f"{text}; {self.dropped:,} too long and dropped" if self.dropped else text


def read_pairs(
    source: str | Path | Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    on_overlong: OnOverlongPair | str = "error",
    name: str = "dataset",
) -> tuple[list[Pair], PairReport]:
    """Reads and tokenizes preference rows: prompt, chosen and rejected are three strings or three lists of messages.

    Args:
      source: a path to a .jsonl or .json file, or dicts.
      tokenizer: see `jaxft.data.chat.RowTokenizer` for what it makes of a prompt and a completion.
      max_seq_length: tokens that a row holds, and so at most the two documents of a pair.
      on_overlong: what becomes of a pair with more: "error" or "drop".
      name: what to call an iterable in messages.

    Raises:
      JaxftError: naming file and row; a key is missing, a value has the wrong type, both completions are the same, a
        pair is too long, or no pair is left.
    """
    if on_overlong not in ("error", "drop"):
        raise JaxftError("on_overlong", f"is {on_overlong!r}", "Choose error or drop: a cut pair compares other texts")
    tokenize, pairs, report = RowTokenizer(tokenizer), [], PairReport()
    for where, value in read_objects(source, name):
        pair = _pair(value, where, tokenize)
        if pair.length > max_seq_length:
            if on_overlong == "error":
                what = f"its two texts have {pair.length} tokens; max_seq_length is {max_seq_length}"
                raise JaxftError(where, what, 'Raise max_seq_length, or set on_overlong to "drop"')
            report.dropped += 1
            continue
        pairs.append(pair)
        report.pairs += 1
        report.tokens += pair.length
    if not pairs:
        raise JaxftError(name, f"has no pairs left: {report.dropped} were too long", "Raise max_seq_length")
    return pairs, report


def _pair(value: object, where: str, tokenize: RowTokenizer) -> Pair:
    missing = [key for key in KEYS if key not in value] if isinstance(value, Mapping) else KEYS
    if missing or not isinstance(value, Mapping):
        expected = 'Expected {"prompt": ..., "chosen": ..., "rejected": ...}, strings or lists of messages'
        raise JaxftError(where, f"has no {' and no '.join(map(repr, missing))}", expected)
    if value["chosen"] == value["rejected"]:
        raise JaxftError(where, "'chosen' and 'rejected' are the same", "Leave such rows out")
    documents = []
    for key in ("chosen", "rejected"):
        row = {"prompt": value["prompt"], "completion": value[key]}
        documents.append(tokenize(parse_row(row, f"{where}, {key}")))
    return Pair(*documents)


class PairLoader:
    """Batches of pairs by step number, as `jaxft.data.loader.BatchLoader` makes them of documents.

    Args:
      pairs: at least one, none longer than max_seq_length.
      batch_size: rows per micro-batch, B.
      accumulation: micro-batches per step, A.
      max_seq_length: tokens per row, T.
      packing: up to `MAX_PAIRS` pairs a row; otherwise one.
      seed: of the order.
      epochs: how often the pairs are gone through.
      reference: float32 [pairs] each, the log-probabilities under the reference; None leaves them to the step.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        max_seq_length: int,
        accumulation: int = 1,
        packing: bool = True,
        seed: int = 0,
        epochs: int = 1,
        reference: Pairs | None = None,
    ) -> None:
        settings = {"batch_size": batch_size, "accumulation": accumulation, "epochs": epochs}
        for name, value in settings.items():
            if value < 1:
                raise JaxftError(name, f"must be at least 1, not {value}")
        self.pairs = pairs
        self.shape = (accumulation, batch_size)
        self.max_seq_length = max_seq_length
        self.seed = seed
        self.epochs = epochs
        self.reference = reference
        self.pairs_per_row = MAX_PAIRS if packing else 1
        self._documents = [document for pair in pairs for document in pair]
        self._lengths = np.array([pair.length for pair in pairs])
        rows = len(self._epoch_rows(0))
        self.steps_per_epoch = -(-rows // (accumulation * batch_size))
        filled = self._lengths.sum() / (rows * max_seq_length)
        self.report = f"{len(pairs):,} pairs in {rows:,} rows, {filled:.1%} full"

    def __len__(self) -> int:
        """Steps over all epochs."""
        return self.steps_per_epoch * self.epochs

    def __iter__(self) -> BatchIterator:
        return iterate(self)

    @property
    def order(self) -> dict[str, object]:
        """What decides which pairs each step has; see `jaxft.data.iteration.RandomAccess`."""
        names = ("shape", "max_seq_length", "pairs_per_row", "seed")
        settings = {name: getattr(self, name) for name in names}
        return {**settings, "pairs": len(self.pairs), "lengths": zlib.crc32(self._lengths.tobytes())}

    def indices(self, step: int) -> np.ndarray:
        """int [A, B, P]: which pair is in each place of a step, -1 where none is."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch, step = divmod(step, self.steps_per_epoch)
        n_rows = self.shape[0] * self.shape[1]
        found = np.full((n_rows, self.pairs_per_row), -1)
        for r, row in enumerate(self._epoch_rows(epoch)[step * n_rows : (step + 1) * n_rows]):
            found[r, : len(row)] = row
        return found.reshape(*self.shape, -1)

    def __getitem__(self, step: int) -> PairBatch:
        """The batch of a step, counted from 0 over all epochs. Raises IndexError outside them."""
        places = self.indices(step)
        rows = [
            [2 * i + side for i in row if i >= 0 for side in (0, 1)]
            for row in places.reshape(-1, places.shape[2]).tolist()
        ]
        text = Batch(*(x.reshape(*self.shape, -1) for x in lay_out(self._documents, rows, self.max_seq_length)))
        present = places >= 0
        chosen_tokens = text.loss_mask[text.segment_ids % 2 == 1].sum()
        mask = present.astype(np.float32)
        reference = self.reference
        if reference is not None:
            reference = Pairs(*(np.where(present, values[places], np.float32(0)) for values in reference))
        return PairBatch(text, mask, mask * np.float32(present.sum() / chosen_tokens), reference)

    def _epoch_rows(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.pairs))
        if self.pairs_per_row == 1:
            return order[:, None].tolist()
        # As in BatchLoader: one shuffle decides which equally long pairs come together, one the order of the rows.
        rows = [order[row].tolist() for row in pack(self._lengths[order], self.max_seq_length, MAX_PAIRS)]
        rng.shuffle(rows)
        return rows
