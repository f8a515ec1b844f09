"""Where rows come from: files, lists, iterables, data sets, and mixtures of them. A new kind is one class here.

Each row comes with its name for messages and with the position after it, from which reading goes on in another process.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxft.errors import JaxftError

Position = Any  # JSON-able; None is the start


class RawRow(NamedTuple):
    """A row as it is stored.

    Attributes:
      source: the file or data set.
      number: of the row in it, from 1; in files of lines, the line.
      value: what is there, or a JaxftError that says why it cannot be read.
    """

    source: str
    number: int
    value: Any

    @property
    def where(self) -> str:
        return f"{self.source} row {self.number}"


@runtime_checkable
class Source(Protocol):
    """Rows that can be gone through from any position.

    Attributes:
      facts: JSON-able; what tells these rows from others, for a run that goes on.
    """

    @property
    def facts(self) -> Any: ...

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        """The rows after `position`, each with the position after it."""
        ...


def open_source(source: Any, name: str = "dataset") -> Source:
    """The rows of what a user calls a data set.

    Args:
      source: a path to a .jsonl, .json (a list of objects), .parquet or .txt (each line a text) file; a list of paths;
        {path: weight} for a mixture; a list of dicts, a `datasets.Dataset` or any other iterable of dicts; a Source.
      name: what to call rows that have no file in messages.

    Raises:
      JaxftError: a file that is missing or of another kind; something that holds no rows.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _open_file(Path(source))
    if isinstance(source, Mapping):
        return _open_mapping(source, name)
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, os.PathLike)) for s in source):
        return Chain(tuple(_open_file(Path(path)) for path in source))
    if not isinstance(source, Iterable):
        raise JaxftError(name, f"is a {type(source).__name__}, not rows", "Give a list of dicts, or a path to a file.")
    return Rows(source, name)


def read_raw(source: Any, name: str = "dataset") -> Iterator[RawRow]:
    """The rows of a data set from the first; see `open_source`. Raises JaxftError if there are none."""
    empty = True
    for row, _ in open_source(source, name).read():
        empty = False
        yield row
    if empty:
        raise JaxftError(source if isinstance(source, (str, os.PathLike)) else name, "has no rows")


def read_objects(source: Any, name: str = "dataset") -> Iterator[tuple[str, object]]:
    """(where, value) of every row. Raises JaxftError for one that cannot be read."""
    for row in read_raw(source, name):
        if isinstance(row.value, JaxftError):
            raise row.value
        yield row.where, row.value


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A .jsonl file; blank lines are no rows. A position is (bytes, lines) read."""

    path: Path

    @property
    def facts(self) -> Any:
        return _file_facts(self.path)

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        for number, line, after in _lines(self.path, position):
            yield RawRow(str(self.path), number, _or_error(_json, line, f"{self.path} row {number}")), after


@dataclasses.dataclass(frozen=True)
class TextLines:
    """A .txt file, each line a row {"text": line}; blank lines are no rows. Positions as in JsonLines."""

    path: Path

    @property
    def facts(self) -> Any:
        return _file_facts(self.path)

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        for number, line, after in _lines(self.path, position):
            value = _or_error(_decode, line.rstrip(b"\r\n"), f"{self.path} row {number}")
            yield RawRow(str(self.path), number, {"text": value} if isinstance(value, str) else value), after


@dataclasses.dataclass(frozen=True)
class JsonList:
    """A .json file with one list of rows, read as a whole. A position is the number of rows read."""

    path: Path

    @property
    def facts(self) -> Any:
        return _file_facts(self.path)

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        content = self.path.read_bytes()
        rows = _json(content, str(self.path)) if content.strip() else []
        if not isinstance(rows, list):
            kind = json_type(rows)
            raise JaxftError(self.path, f"holds a {kind}, not a list of rows", "JSON lines go in .jsonl.")
        for number in range(1 + (position or 0), len(rows) + 1):
            yield RawRow(str(self.path), number, rows[number - 1]), number


@dataclasses.dataclass(frozen=True)
class Parquet:
    """A .parquet file, read a few rows at a time. A position is (row groups, rows of the next one) read."""

    path: Path

    @property
    def facts(self) -> Any:
        return _file_facts(self.path)

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise JaxftError(self.path, "needs pyarrow to be read", "pip install 'jaxft[data]'") from error
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise JaxftError(self.path, f"is not a Parquet file: {error}") from error
        group, done = position or (0, 0)
        with file:
            before = sum(file.metadata.row_group(i).num_rows for i in range(group))
            for g in range(group, file.num_row_groups):
                skip, n_rows = (done if g == group else 0), file.metadata.row_group(g).num_rows
                rows = self._group(file, g, before)
                for i, row in enumerate(itertools.islice(rows, skip, None), start=skip + 1):
                    yield row, (g, i) if i < n_rows else (g + 1, 0)
                before += n_rows

    def _group(self, file: Any, group: int, before: int) -> Iterator[RawRow]:
        numbers = itertools.count(before + 1)
        for table in file.iter_batches(batch_size=256, row_groups=[group]):
            for i in range(table.num_rows):
                number = next(numbers)
                try:
                    (value,) = table.slice(i, 1).to_pylist()
                except UnicodeDecodeError as error:
                    value = _not_utf8(f"{self.path} row {number}", error)
                yield RawRow(str(self.path), number, value)


class Rows:
    """Any iterable of rows. A position is the number of rows read; to go on from one, it must be iterable again.

    An iterator, which is not, can be read anew as long as only its first few rows were taken: to look at them.
    """

    _KEPT = 100

    def __init__(self, rows: Iterable[Any], name: str) -> None:
        self._rows, self._name = rows, name
        self._once = iter(rows) is rows
        self._head: list[Any] = []  # of an iterator
        self._taken = 0

    @property
    def facts(self) -> Any:
        return [self._name, len(self._rows) if hasattr(self._rows, "__len__") else None]  # pyright: ignore[reportArgumentType]

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        start = position or 0
        skip: Any = getattr(self._rows, "skip", None)  # data sets of `datasets` know a quick way
        if start and skip:
            rows = skip(start)
        else:
            rows = itertools.islice(self._replayed() if self._once else self._rows, start, None)
        for number, value in enumerate(rows, start=start + 1):
            yield RawRow(self._name, number, value), number

    def _replayed(self) -> Iterator[Any]:
        if self._taken > self._KEPT:
            what = "can be gone through only once, and was"
            raise JaxftError(self._name, what, "Give a list, or an object whose __iter__ starts anew.")
        yield from tuple(self._head)
        for row in self._rows:
            self._taken += 1
            if self._taken <= self._KEPT:
                self._head.append(row)
            yield row


@dataclasses.dataclass(frozen=True)
class Chain:
    """Sources one after the other. A position is (sources done, position in the next)."""

    sources: tuple[Source, ...]

    @property
    def facts(self) -> Any:
        return [source.facts for source in self.sources]

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        done, inner = position or (0, None)
        for i in range(done, len(self.sources)):
            for row, after in self.sources[i].read(inner if i == done else None):
                yield row, (i, after)


class Mixture:
    """Rows of several sources in turn, in proportion to their weights, until each row of each was there at least once.

    Sources that end earlier start again. Which source the n-th row comes from depends on the weights alone (grain).

    Raises:
      JaxftError: not as many weights as sources, or one that is not positive.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float]) -> None:
        if len(weights) != len(sources) or not sources:
            raise JaxftError("mixture", f"has {len(sources)} sources and {len(weights)} weights")
        if not all(isinstance(weight, (int, float)) and weight > 0 for weight in weights):
            raise JaxftError("mixture", f"has the weights {list(weights)}", "Each must be a number above 0.")
        self.sources = [open_source(source, f"source {i}") for i, source in enumerate(sources, start=1)]
        self.weights = list(weights)

    @property
    def facts(self) -> Any:
        return [[source.facts for source in self.sources], self.weights]

    def read(self, position: Position = None) -> Iterator[tuple[RawRow, Position]]:
        import grain

        from jaxft.data.stream import SourceDataset

        endless = [grain.experimental.RepeatIterDataset(SourceDataset(source)) for source in self.sources]
        rows = iter(grain.IterDataset.mix(endless, self.weights))
        if position is not None:
            rows.set_state(position)
        for row in rows:
            state = rows.get_state()
            if all(parent["epoch"] for parent in state["parents"]):
                return  # every source has begun again
            yield row, state


def json_type(value: object) -> str:
    """What JSON calls a value's type."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


_FILES = {".jsonl": JsonLines, ".json": JsonList, ".parquet": Parquet, ".txt": TextLines}


def _open_file(path: Path) -> Source:
    if path.suffix not in _FILES:
        raise JaxftError(path, f"is not a known kind of data file ({', '.join(_FILES)})", "Convert it to JSON lines.")
    if not path.is_file():
        raise JaxftError(path, "is not a file" if path.exists() else "does not exist")
    return _FILES[path.suffix](path)


def _open_mapping(source: Mapping[Any, Any], name: str) -> Source:
    if source and all(isinstance(weight, (int, float)) for weight in source.values()):
        return Mixture(list(source), list(source.values()))
    if source and all(hasattr(split, "column_names") for split in source.values()):
        raise JaxftError(name, f"has the splits {', '.join(map(str, source))}", "Give one of them.")
    kind = type(source).__name__
    raise JaxftError(name, f"is a {kind}, not rows", "Give a list of dicts, a path, or {path: weight} for a mixture.")


def _file_facts(path: Path) -> Any:
    return [path.name, path.stat().st_size]


def _lines(path: Path, position: Position) -> Iterator[tuple[int, bytes, Position]]:
    """(number, line, position after it) of every line that is not blank."""
    offset, number = position or (0, 0)
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            offset, number = offset + len(line), number + 1
            if line.strip():
                yield number, line, (offset, number)


def _or_error(read: Any, content: bytes, where: str) -> Any:
    """What `read(content, where)` gives, or the JaxftError that it raises."""
    try:
        return read(content, where)
    except JaxftError as error:
        return error


def _json(content: bytes, where: str) -> object:
    try:
        return json.loads(_decode(content, where))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        lines = error.msg == "Extra data" and error.lineno > 1
        how = "Files of JSON lines are called .jsonl." if lines else ""
        raise JaxftError(where, f"is not valid JSON: {error.msg} at {place}", how) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; brackets in brackets
        raise JaxftError(where, f"is JSON that cannot be read: {error}") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> JaxftError:
    return JaxftError(where, f"is not UTF-8 (byte {error.start}: {error.reason})", "Save it as UTF-8.")
