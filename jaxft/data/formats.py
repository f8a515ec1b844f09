"""Rows of training data, in the forms people keep them in, checked and brought to two shapes: chat and text.

A new form is one entry of `FORMS`; everything after this file sees only `ChatRow` and `TextRow`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import JaxftError

ROLES = ("system", "user", "assistant")

Message = dict[str, Any]


class ChatRow(NamedTuple):
    """A conversation.

    Attributes:
      where: the file or data set and the row's number, for messages.
      form: the name of the form it was given in.
      messages: {"role", "content"} in order.
      n_prompt: so many messages at the start are prompt, never trained on whoever wrote them.
    """

    where: str
    form: str
    messages: list[Message]
    n_prompt: int = 0


class TextRow(NamedTuple):
    """A text, or a prompt and its completion.

    Attributes:
      where, form: as in ChatRow.
      prompt: not trained on; "" for plain text.
      completion: what is trained on; the end-of-sequence token is added when it is tokenized.
    """

    where: str
    form: str
    prompt: str
    completion: str


Row = ChatRow | TextRow


class Form(NamedTuple):
    """A way to write a row: the keys that identify it and how it is read."""

    name: str
    keys: tuple[str, ...]
    example: str
    parse: Callable[[Mapping[str, Any], str], Row]


def read_rows(source: str | os.PathLike[str] | Iterable[Any], name: str = "dataset") -> Iterator[Row]:
    """Reads and checks rows, one at a time.

    Args:
      source: a path to a .jsonl or .json file (a list of objects), or any iterable of dicts.
      name: what to call an iterable in messages; a file is called by its path.

    Yields:
      One ChatRow or TextRow a row. Rows count from 1; in .jsonl a row's number is its line.

    Raises:
      JaxftError: naming file and row, for a file that is missing, empty, of another kind, or not UTF-8; a line that is
        not JSON; a row that is no object, has none of the known forms, or values of the wrong type.
    """
    return (parse_row(value, where) for where, value in read_objects(source, name))


def read_objects(source: str | os.PathLike[str] | Iterable[Any], name: str = "dataset") -> Iterator[tuple[str, object]]:
    """The rows of a source as they are, each with its name for messages; see `read_rows`."""
    if isinstance(source, (str, os.PathLike)):
        name, objects = str(os.fspath(source)), _read_file(Path(source))
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise JaxftError(name, f"is a {type(source).__name__}, not rows", "Give a list of dicts, or a path to a file.")
    else:
        objects = enumerate(source, start=1)
    empty = True
    for number, value in objects:
        empty = False
        yield f"{name} row {number}", value
    if empty:
        raise JaxftError(name, "has no rows")


def parse_row(value: object, where: str) -> Row:
    """One row of any known form; the first of `FORMS` whose keys are all there decides. Raises JaxftError."""
    if not isinstance(value, Mapping):
        raise JaxftError(where, f"is a {_json_type(value)}, not an object with keys", _expected())
    for form in FORMS:
        if all(key in value for key in form.keys):
            return form.parse(value, where)
    raise JaxftError(where, f"has the keys {sorted(map(str, value))}, which fit none of the known forms", _expected())


def _read_file(path: Path) -> Iterator[tuple[int, object]]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json}
    if path.suffix not in readers:
        raise JaxftError(path, f"is not a known kind of data file ({', '.join(readers)})", "Convert it to JSON lines.")
    if not path.is_file():
        raise JaxftError(path, "is not a file" if path.exists() else "does not exist")
    return readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _loads(line, f"{path} row {number}")


def _read_json(path: Path) -> Iterator[tuple[int, object]]:
    content = path.read_bytes()
    if not content.strip():
        return
    rows = _loads(content, str(path))
    if not isinstance(rows, list):
        raise JaxftError(path, f"holds a {_json_type(rows)}, not a list of rows", "JSON lines go in .jsonl.")
    yield from enumerate(rows, start=1)


def _loads(content: bytes, where: str) -> object:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise JaxftError(where, f"is not UTF-8 (byte {error.start}: {error.reason})", "Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise JaxftError(where, f"is not valid JSON: {error.msg} at {place}") from error


def _parse_messages(value: Mapping[str, Any], where: str) -> Row:
    return ChatRow(where, "messages", _messages(value, "messages", where))


def _parse_prompt_completion(value: Mapping[str, Any], where: str) -> Row:
    form = "prompt/completion"
    if isinstance(value["prompt"], list) or isinstance(value["completion"], list):
        prompt = _messages(value, "prompt", where)
        return ChatRow(where, form, prompt + _messages(value, "completion", where), n_prompt=len(prompt))
    return TextRow(where, form, _string(value, "prompt", where), _string(value, "completion", where))


def _parse_text(value: Mapping[str, Any], where: str) -> Row:
    return TextRow(where, "text", "", _string(value, "text", where))


FORMS = (
    Form("messages", ("messages",), '{"messages": [{"role": ..., "content": ...}, ...]}', _parse_messages),
    Form("prompt/completion", ("prompt", "completion"),
         '{"prompt": ..., "completion": ...} (two strings or two lists of messages)', _parse_prompt_completion),
    Form("text", ("text",), '{"text": ...}', _parse_text),
)  # fmt: skip


def _messages(row: Mapping[str, Any], key: str, where: str) -> list[Message]:
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        what = "is empty" if messages == [] else f"is a {_json_type(messages)}"
        raise JaxftError(where, f"{key!r} {what} where a list of messages is expected")
    if row.get("tools"):
        raise JaxftError(where, "has 'tools'; tool calls are not supported yet", "Leave such rows out.")
    return [_message(message, f"{where}, {key}[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise JaxftError(where, f"is a {_json_type(message)} where a message with role and content is expected")
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise JaxftError(where, f"has no {' and no '.join(map(repr, missing))}, only {sorted(map(str, message))}")
    if message["role"] not in ROLES:
        raise JaxftError(where, f"has the unknown role {message['role']!r}", f"Known roles: {', '.join(ROLES)}.")
    if message.get("tool_calls"):
        raise JaxftError(where, "has 'tool_calls'; tool calls are not supported yet", "Leave such rows out.")
    _string(message, "content", where)
    return {key: part for key, part in message.items() if part is not None}


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise JaxftError(where, f"{key!r} is a {_json_type(row[key])} where a string is expected")
    return row[key]


def _expected() -> str:
    return "Expected one of: " + "; ".join(f"{form.name} {form.example}" for form in FORMS) + "."


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)
