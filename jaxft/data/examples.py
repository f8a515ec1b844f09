"""A data set's rows to examples that fit a row of the batch, with an account of what became of each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from jaxft.data.batch import Example
from jaxft.data.chat import RowTokenizer
from jaxft.data.formats import parse_row
from jaxft.data.sources import RawRow, read_raw
from jaxft.data.turns import Markers
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks this name up; transformers is slow to import
    PreTrainedTokenizerBase = Any

OnOverlong = Literal["error", "truncate", "drop", "split"]
OnBadRow = Literal["error", "skip"]

SHOWN = 5  # skipped rows that a report gives the reasons of
HOPELESS = 1000  # rows skipped from the first on, after which a data set is given up


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """How rows become examples.

    Attributes:
      max_seq_length: tokens that an example has at most.
      assistant_only_loss: learn the assistant's turns only; see `jaxft.data.chat.RowTokenizer`.
      on_overlong: what becomes of a row with more tokens. "truncate" cuts its end off, and drops it if no target is
        left; "drop" leaves it out; "split" makes several examples of it, which overlap by one token, so that each
        target is in one of them; those without a target are left out.
      on_bad_row: what becomes of a row that cannot be read or has nothing to learn from: "skip" leaves it out and
        tells the reasons of the first few.
      dataset_text_field: the key of plain text; see `jaxft.data.formats.parse_row`.
      markers: what opens turns; see `jaxft.data.chat.RowTokenizer`.
      vocab_size: how many tokens the model knows; None does not check.

    Raises:
      JaxftError: a value that is not known.
    """

    max_seq_length: int
    assistant_only_loss: bool = True
    on_overlong: OnOverlong | str = "error"
    on_bad_row: OnBadRow | str = "error"
    dataset_text_field: str | None = None
    markers: Markers | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("on_overlong", get_args(OnOverlong)), ("on_bad_row", get_args(OnBadRow))):
            if getattr(self, name) not in known:
                raise JaxftError(name, f"is {getattr(self, name)!r}", f"Known values: {', '.join(known)}.")
        if self.max_seq_length < 2:
            raise JaxftError("max_seq_length", f"must be at least 2, not {self.max_seq_length}")


@dataclasses.dataclass
class RowReport:
    """What became of a data set's rows.

    Attributes:
      forms: rows read, by the name of their form.
      sources: the same, by file or data set.
      tool_calls: of these, rows with tools or calls.
      examples, tokens, trained_tokens: what they gave.
      truncated, split, dropped: rows over max_seq_length.
      pieces_left_out: pieces of split rows without a target.
      skipped: bad rows.
      reasons: why, of the first few.
    """

    forms: Counter[str] = dataclasses.field(default_factory=Counter)
    sources: Counter[str] = dataclasses.field(default_factory=Counter)
    tool_calls: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    pieces_left_out: int = 0
    skipped: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        forms = ", ".join(f"{count:,} {form}" for form, count in self.forms.items())
        text = f"rows: {forms or 'none'}"
        if self.tool_calls:
            text += f" ({self.tool_calls:,} with tools)"
        if len(self.sources) > 1:
            text += f" ({', '.join(f'{count:,} of {source}' for source, count in self.sources.items())})"
        text += f"; {self.tokens:,} tokens, {self.trained_tokens:,} trained"
        if self.truncated or self.split or self.dropped:
            text += f"; too long: {self.truncated:,} truncated, {self.split:,} split, {self.dropped:,} dropped"
        if self.pieces_left_out:
            text += f"; {self.pieces_left_out:,} pieces without a target left out"
        if self.skipped:
            text += f"; {self.skipped:,} bad rows skipped: {'; '.join(self.reasons)}"
            text += "; ..." if self.skipped > len(self.reasons) else ""
        return text

    def count(self, example: Example) -> None:
        """Adds what an example holds."""
        self.examples += 1
        self.tokens += len(example.tokens)
        self.trained_tokens += int(np.count_nonzero(example.loss_mask))

    def skip(self, error: JaxftError) -> None:
        """Adds a bad row. Raises JaxftError where a data set seems to have no others."""
        self.skipped += 1
        if len(self.reasons) < SHOWN:
            self.reasons.append(str(error))
        if not self.forms and self.skipped == HOPELESS:
            raise JaxftError("data set", f"its first {HOPELESS} rows are bad: {'; '.join(self.reasons)}") from error


class ExampleMaker:
    """Makes a stored row's examples, none or several, and counts.

    Attributes:
      report: what became of the rows so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RowSettings) -> None:
        self.settings = settings
        self.report = RowReport()
        self._tokenize = RowTokenizer(tokenizer, settings.assistant_only_loss, settings.markers)
        self._forms: dict[str, tuple[str, int]] = {}  # source -> form, and the row where it was seen first

    def __call__(self, raw: RawRow) -> list[Example]:
        """The examples of one row.

        Raises:
          JaxftError: naming the row; under on_bad_row="error" what cannot be read, has another form than the rows of
            its file before it, or has nothing to learn from; under on_overlong="error" one that is too long; a token
            that the model does not know.
        """
        try:
            example = self._example(raw)
        except JaxftError as error:
            if self.settings.on_bad_row == "error":
                raise
            self.report.skip(error)
            return []
        if self.settings.vocab_size is not None:
            check_vocabulary(example, self.settings.vocab_size)
        examples = self._fit(example)
        for each in examples:
            self.report.count(each)
        return examples

    def _example(self, raw: RawRow) -> Example:
        if isinstance(raw.value, JaxftError):
            raise raw.value
        row = parse_row(raw.value, raw.where, self.settings.dataset_text_field)
        form, first = self._forms.setdefault(raw.source, (row.form, raw.number))
        if row.form != form:
            what = f"has the form {row.form}, and row {first} the form {form}"
            raise JaxftError(raw.where, what, "Keep each form in a file of its own.")
        example = self._tokenize(row)
        self.report.forms[row.form] += 1
        self.report.sources[raw.source] += 1
        self.report.tool_calls += row.calls_tools
        return example

    def _fit(self, example: Example) -> list[Example]:
        length, report = self.settings.max_seq_length, self.report
        if len(example.tokens) <= length:
            return [example]
        if self.settings.on_overlong == "error":
            raise overlong(example, length)
        if self.settings.on_overlong == "split":
            pieces = split(example, length)
            report.split += 1
            report.pieces_left_out += sum(not piece.loss_mask.any() for piece in pieces)
            return [piece for piece in pieces if piece.loss_mask.any()]
        cut = Example(example.where, example.tokens[:length], example.loss_mask[:length])
        if self.settings.on_overlong == "drop" or not cut.loss_mask.any():
            report.dropped += 1
            return []
        report.truncated += 1
        return [cut]


def check_vocabulary(example: Example, vocab_size: int) -> None:
    """Raises JaxftError for a token without an embedding, which would make every loss NaN."""
    if example.tokens.max() >= vocab_size:
        raise JaxftError(
            example.where,
            f"has the token id {example.tokens.max()}, and the model has only {vocab_size} embeddings",
            "Use the tokenizer that belongs to the model",
        )


@dataclasses.dataclass
class TokenizedRows:
    """The examples of a data set, and what became of its rows."""

    examples: list[Example]
    report: RowReport

    def __str__(self) -> str:
        return str(self.report)


def tokenize_rows(
    source: Any, tokenizer: PreTrainedTokenizerBase, settings: RowSettings, name: str = "dataset"
) -> TokenizedRows:
    """Reads a whole data set.

    Args:
      source: see `jaxft.data.sources.open_source`.
      name: what to call rows that have no file in messages.

    Raises:
      JaxftError: as `open_source` and `ExampleMaker`; no example is left.
    """
    make = ExampleMaker(tokenizer, settings)
    examples = [example for raw in read_raw(source, name) for example in make(raw)]
    if not examples:
        raise nothing_left(make.report, name)
    return TokenizedRows(examples, make.report)


def split(example: Example, length: int) -> list[Example]:
    """Pieces of at most `length` tokens, each beginning with the last token of the one before, not as a target."""
    pieces = []
    for start in range(0, len(example.tokens) - 1, length - 1):
        loss_mask = example.loss_mask[start : start + length].copy()
        loss_mask[0] = False
        pieces.append(Example(example.where, example.tokens[start : start + length], loss_mask))
    return pieces


def overlong(example: Example, max_seq_length: int) -> JaxftError:
    """The error about an example that does not fit."""
    return JaxftError(
        example.where,
        f"has {len(example.tokens)} tokens; max_seq_length is {max_seq_length}",
        'Raise max_seq_length, or set on_overlong to "truncate", "split" or "drop".',
    )


def nothing_left(report: RowReport, name: str) -> JaxftError:
    """The error about a data set without an example."""
    if report.skipped:
        return JaxftError(name, f"nothing to train on: {report}")
    return JaxftError(name, "nothing to train on: every row was dropped as too long", "Raise max_seq_length.")
