"""Rows of training data, in the forms people keep them in, checked and brought to two shapes: chat and text.

A new form is one entry of `FORMS`; everything after this file sees only `ChatRow` and `TextRow`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxft.data.sources import json_type, read_objects
from jaxft.errors import JaxftError

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of the same roles, and those that tool calls have there.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}

Message = dict[str, Any]


class ChatRow(NamedTuple):
    """A conversation.

    Attributes:
      where: the file or data set and the row's number, for messages.
      form: the name of the form it was given in.
      messages: {"role", "content"} in order; an assistant's may have "tool_calls" (arguments are objects, not JSON in
        strings), whose results are messages of the role "tool".
      n_prompt: so many messages at the start are prompt, never trained on whoever wrote them.
      tools: JSON schemas of the functions that may be called; None if there are none.
    """

    where: str
    form: str
    messages: list[Message]
    n_prompt: int = 0
    tools: list[Any] | None = None

    @property
    def calls_tools(self) -> bool:
        """Whether there is a tool, a call or a result in it."""
        return bool(self.tools) or any("tool_calls" in m or m["role"] == "tool" for m in self.messages)


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

    @property
    def calls_tools(self) -> bool:
        return False


Row = ChatRow | TextRow


class Form(NamedTuple):
    """A way to write a row: the keys that identify it and how it is read."""

    name: str
    keys: tuple[str, ...]
    example: str
    parse: Callable[[Mapping[str, Any], str], Row]


def read_rows(source: Any, name: str = "dataset", dataset_text_field: str | None = None) -> Iterator[Row]:
    """Reads and checks rows, one at a time.

    Args:
      source: see `jaxft.data.sources.open_source`.
      name: what to call an iterable in messages; a file is called by its path.
      dataset_text_field: see `parse_row`.

    Yields:
      One ChatRow or TextRow a row. Rows count from 1; in files of lines a row's number is its line.

    Raises:
      JaxftError: naming file and row, for a file that is missing, empty, of another kind, or not UTF-8; a line that is
        not JSON; a row that is no object, has none of the known forms, or values of the wrong type.
    """
    return (parse_row(value, where, dataset_text_field) for where, value in read_objects(source, name))


def parse_row(value: object, where: str, dataset_text_field: str | None = None) -> Row:
    """One row of any known form; the first of `FORMS` whose keys are all there decides.

    Args:
      value: the row as it is stored.
      where: its name for messages.
      dataset_text_field: the key of plain text. Given, it decides before any form; None: "text", if no other form fits.

    Raises:
      JaxftError: it has no known form, or values of the wrong type.
    """
    if not isinstance(value, Mapping):
        raise JaxftError(where, f"is a {json_type(value)}, not an object with keys", _expected())
    for media in ("images", "videos", "audios"):
        if value.get(media):
            raise JaxftError(where, f"has {media!r}, and only text can be trained on", "Leave such rows out.")
    if dataset_text_field is not None:
        if dataset_text_field not in value:
            found = sorted(map(str, value))
            raise JaxftError(where, f"has no {dataset_text_field!r} (dataset_text_field), only the keys {found}")
        return TextRow(where, "text", "", _string(value, dataset_text_field, where))
    for form in FORMS:
        if all(key in value for key in form.keys):
            return form.parse(value, where)
    raise JaxftError(where, f"has the keys {sorted(map(str, value))}, which fit none of the known forms", _expected())


def _parse_messages(value: Mapping[str, Any], where: str) -> Row:
    return _chat(value, "messages", _messages(value, "messages", where), where)


def _parse_sharegpt(value: Mapping[str, Any], where: str) -> Row:
    return _chat(value, "ShareGPT", _messages(value, "conversations", where), where)


def _parse_alpaca(value: Mapping[str, Any], where: str) -> Row:
    turns = [("user", _joined(value, "instruction", "input", where)), ("assistant", _string(value, "output", where))]
    past = value.get("history") or []
    if not isinstance(past, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in past):
        raise JaxftError(where, "'history' is not a list of [instruction, output]")
    said = [(role, text) for pair in past for role, text in zip(("user", "assistant"), pair, strict=True)]
    messages = [{"role": role, "content": text} for role, text in said + turns]
    return _chat(value, "Alpaca", [_message(m, f"{where}, turn {i}") for i, m in enumerate(messages)], where)


def _parse_question_answer(value: Mapping[str, Any], where: str) -> Row:
    question, answer = _string(value, "question", where), _string(value, "answer", where)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _chat(value, "question/answer", messages, where)


def _parse_prompt_completion(value: Mapping[str, Any], where: str) -> Row:
    form = "prompt/completion"
    if isinstance(value["prompt"], list) or isinstance(value["completion"], list):
        prompt, completion = (_messages(value, key, where) for key in ("prompt", "completion"))
        row = _chat(value, form, prompt + completion, where)
        return row._replace(n_prompt=len(row.messages) - len(completion))
    return TextRow(where, form, _string(value, "prompt", where), _string(value, "completion", where))


def _parse_text(value: Mapping[str, Any], where: str) -> Row:
    return TextRow(where, "text", "", _string(value, "text", where))


FORMS = (
    Form("messages", ("messages",), '{"messages": [{"role": ..., "content": ...}, ...]}', _parse_messages),
    Form("ShareGPT", ("conversations",), '{"conversations": [{"from": ..., "value": ...}, ...]}', _parse_sharegpt),
    Form("prompt/completion", ("prompt", "completion"),
         '{"prompt": ..., "completion": ...} (two strings or two lists of messages)', _parse_prompt_completion),
    Form("Alpaca", ("instruction", "output"), '{"instruction": ..., "input": ..., "output": ...}', _parse_alpaca),
    Form("question/answer", ("question", "answer"), '{"question": ..., "answer": ...}', _parse_question_answer),
    Form("text", ("text",), '{"text": ...}', _parse_text),
)  # fmt: skip


def _chat(value: Mapping[str, Any], form: str, messages: list[Message], where: str) -> ChatRow:
    """A conversation with what the row's keys "system" and "tools" add to it."""
    system = value.get("system")
    if system:
        messages = [{"role": "system", "content": _string(value, "system", where)}, *messages]
    return ChatRow(where, form, messages, tools=_tools(value.get("tools"), where))


def _tools(tools: object, where: str) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, where, "'tools'")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise JaxftError(where, f"'tools' is a {json_type(tools)} where a list of JSON schemas is expected")
    return tools


def _messages(row: Mapping[str, Any], key: str, where: str) -> list[Message]:
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        what = "is empty" if messages == [] else f"is a {json_type(messages)}"
        raise JaxftError(where, f"{key!r} {what} where a list of messages is expected")
    return [_message(message, f"{where}, {key}[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> Message:
    """A message in the one shape that templates know, from that shape or ShareGPT's."""
    if not isinstance(message, Mapping):
        raise JaxftError(where, f"is a {json_type(message)} where a message with role and content is expected")
    message = {key: part for key, part in message.items() if part is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    message.setdefault("content", "" if message.get("tool_calls") else None)
    missing = [key for key in ("role", "content") if message.get(key) is None]
    if missing:
        found = sorted(str(key) for key, part in message.items() if part is not None)
        raise JaxftError(where, f"has no {' and no '.join(map(repr, missing))}, only {found}")
    if message["role"] not in ROLES:
        raise JaxftError(where, f"has the unknown role {message['role']!r}", f"Known roles: {', '.join(ROLES)}.")
    calls = message.pop("tool_calls", None)
    if calls:
        if message["role"] != "assistant":
            raise JaxftError(where, f"has 'tool_calls', and is a message of the role {message['role']!r}")
        message["tool_calls"] = _tool_calls(calls, where)
    message["content"] = _text(message["content"], where)
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    role, rest = message["from"], {key: part for key, part in message.items() if key not in ("from", "value")}
    if not isinstance(role, str):
        raise JaxftError(where, f"has the unknown role {role!r}")
    if "value" not in message:
        raise JaxftError(where, f"has no 'value', only {sorted(map(str, message))}")
    if role == "function_call":
        calls = _parsed(_string(message, "value", where), where, "'value'")
        rest["tool_calls"] = calls if isinstance(calls, list) else [calls]
        return {**rest, "role": "assistant", "content": ""}
    return {**rest, "role": SHAREGPT_ROLES.get(role, role), "content": message["value"]}


def _tool_calls(calls: object, where: str) -> list[Any]:
    """[{"type": "function", "function": {"name", "arguments"}}], with arguments as an object."""
    if not isinstance(calls, list):
        raise JaxftError(where, f"'tool_calls' is a {json_type(calls)} where a list is expected")
    normal = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise JaxftError(where, f"tool_calls[{i}] has no function with a name and arguments")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, where, f"tool_calls[{i}] arguments")
        outer = {**call} if "function" in call else {"type": "function"}
        normal.append({**outer, "function": {**function, "arguments": arguments}})
    return normal


def _text(content: object, where: str) -> str:
    """A message's text, also from a list of parts {"type": "text", "text": ...}."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise JaxftError(where, f"'content' is a {json_type(content)} where a string is expected")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text", part.get("value")) if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
            raise JaxftError(where, f"'content' part {i} is of the type {kind!r}, and only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _joined(row: Mapping[str, Any], key: str, optional: str, where: str) -> str:
    """The text of `key`, and after an empty line that of `optional` if there is any."""
    text = _string(row, key, where)
    more = _string(row, optional, where) if row.get(optional) is not None else ""
    return f"{text}\n\n{more}" if more else text


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise JaxftError(where, f"{key!r} is a {json_type(row[key])} where a string is expected")
    return row[key]


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JaxftError(where, f"{what} is not valid JSON: {error}") from error


def _expected() -> str:
    return "Expected one of: " + "; ".join(f"{form.name} {form.example}" for form in FORMS) + "."
