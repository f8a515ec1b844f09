"""Every known form is read; everything else is one error that names the file and the row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxft.data.formats import FORMS, ChatRow, TextRow, read_rows
from jaxft.errors import JaxftError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
CALLING = [
    MESSAGES[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00"},
]

GOOD = [
    ({"messages": MESSAGES}, ChatRow("{}", "messages", MESSAGES)),
    ({"prompt": "2+2=", "completion": " 4"}, TextRow("{}", "prompt/completion", "2+2=", " 4")),
    ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, ChatRow("{}", "prompt/completion", MESSAGES, n_prompt=1)),
    (
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "system": "be brief"},
        ChatRow("{}", "prompt/completion", [SYSTEM, *MESSAGES], n_prompt=2),
    ),
    ({"text": "once"}, TextRow("{}", "text", "", "once")),
    ({"id": 7, "text": "other keys do not matter"}, TextRow("{}", "text", "", "other keys do not matter")),
    ({"prompt": "of the first turn", "messages": MESSAGES}, ChatRow("{}", "messages", MESSAGES)),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
        ChatRow("{}", "messages", MESSAGES[:1]),
    ),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        ChatRow("{}", "ShareGPT", MESSAGES),
    ),
    ({"conversations": MESSAGES, "system": "be brief"}, ChatRow("{}", "ShareGPT", [SYSTEM, *MESSAGES])),
    (
        {"conversations": [{"from": "human", "value": "hi"},
                           {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "UTC"}}'},
                           {"from": "observation", "value": "12:00"}], "tools": json.dumps(TOOLS)},
        ChatRow("{}", "ShareGPT", CALLING, tools=TOOLS),
    ),
    (
        {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}], "content": None},
            {"role": "tool", "content": "12:00", "name": None}], "tools": TOOLS},
        ChatRow("{}", "messages", CALLING, tools=TOOLS),
    ),
    ({"messages": MESSAGES, "tools": ""}, ChatRow("{}", "messages", MESSAGES)),
    ({"instruction": "hi", "input": "", "output": "yo", "text": "rendered"}, ChatRow("{}", "Alpaca", MESSAGES)),
    (
        {"instruction": "hi", "input": "there", "output": "yo", "system": "be brief", "history": [["hi", "yo"]]},
        ChatRow("{}", "Alpaca", [SYSTEM, *MESSAGES, {"role": "user", "content": "hi\n\nthere"}, MESSAGES[1]]),
    ),
    ({"question": "hi", "answer": "yo"}, ChatRow("{}", "question/answer", MESSAGES)),
]  # fmt: skip

BAD_ROWS = {
    "not an object": (["a", "list"], r"is a list, not an object"),
    "null": (None, r"is a null, not an object"),
    "no known keys": ({"foo": 1, "bar": 2}, r"\['bar', 'foo'\], which fit none .* prompt/completion .* text"),
    "half a form": ({"prompt": "p"}, r"\['prompt'\], which fit none"),
    "text not a string": ({"text": 3}, r"'text' is a number where a string"),
    "prompt not a string": ({"prompt": None, "completion": "c"}, r"'prompt' is a null where a string"),
    "prompt text, completion messages": ({"prompt": "p", "completion": MESSAGES}, r"'prompt' is a string where a list"),
    "messages not a list": ({"messages": "hi"}, r"'messages' is a string where a list of messages"),
    "messages empty": ({"messages": []}, r"'messages' is empty"),
    "message not an object": ({"messages": ["hi"]}, r"messages\[0\]: is a string where a message"),
    "message without content": ({"messages": [*MESSAGES, {"role": "user"}]}, r"messages\[2\]: has no 'content', only"),
    "message without both": ({"messages": [{"from": "human"}]}, r"has no 'value', only \['from'\]"),
    "content of other parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"part 0 is of the type 'image', and only",
    ),
    "content a number": ({"messages": [{"role": "user", "content": 7}]}, r"'content' is a number where a string"),
    "unknown role": ({"messages": [{"role": "wizard", "content": ""}]}, r"unknown role 'wizard'.*system, developer"),
    "role of a wrong type": ({"messages": [{"role": ["user"], "content": ""}]}, r"unknown role \['user'\]"),
    "unknown ShareGPT role": ({"conversations": [{"from": "bard", "value": ""}]}, r"unknown role 'bard'"),
    "ShareGPT role of a wrong type": ({"conversations": [{"from": ["gpt"], "value": ""}]}, r"unknown role \['gpt'\]"),
    "ShareGPT call that is no JSON": (
        {"conversations": [{"from": "function_call", "value": "now("}]}, r"'value' is not valid JSON",
    ),
    "history": ({"instruction": "", "output": "", "history": ["hi"]}, r"'history' is not a list of \[instruction"),
    "input a number": ({"instruction": "", "input": 3, "output": ""}, r"'input' is a number where a string"),
    "answer null": ({"question": "", "answer": None}, r"'answer' is a null where a string"),
    "tools that are no schemas": ({"messages": MESSAGES, "tools": ["now"]}, r"'tools' is a list where a list of JSON"),
    "tools that are no JSON": ({"messages": MESSAGES, "tools": "now"}, r"'tools' is not valid JSON"),
    "a user's tool calls": (
        {"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, r"'tool_calls', and is .* role 'user'",
    ),
    "a call without a name": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, r"tool_calls\[0\] has no function",
    ),
    "arguments that are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, r"arguments is not",
    ),
}  # fmt: skip


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@pytest.mark.parametrize(("value", "row"), GOOD)
def test_each_form_reads_alike_from_memory_and_files(value: dict[str, Any], row: Any, tmp_path: Path):
    lines = write_lines(tmp_path / "rows.jsonl", json.dumps(value), "")
    whole = write_lines(tmp_path / "rows.json", json.dumps([value], indent=1))
    for source, where in ((iter([value]), "train row 1"), (lines, f"{lines} row 1"), (str(whole), f"{whole} row 1")):
        assert list(read_rows(source, "train")) == [row._replace(where=where)]


def test_every_form_is_covered():
    assert {row.form for _, row in GOOD} == {form.name for form in FORMS}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case: str, tmp_path: Path):
    value, message = BAD_ROWS[case]
    path = write_lines(tmp_path / "rows.jsonl", '{"text": "good"}', "", json.dumps(value))
    with pytest.raises(JaxftError, match=rf"^{re.escape(str(path))} row 3\b.*{message}"):
        list(read_rows(path))
    rows = read_rows([{"text": "good"}, value], "train")
    assert next(rows).form == "text"
    with pytest.raises(JaxftError, match=rf"^train row 2\b.*{message}"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', r"rows\.jsonl row 2: is not valid JSON: .* column"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"rows\.jsonl row 2: is not UTF-8 \(byte 10"),
        ("rows.jsonl", b"", r"rows\.jsonl: has no rows"),
        ("rows.jsonl", b"\n \n", r"rows\.jsonl: has no rows"),
        ("rows.json", b"", r"rows\.json: has no rows"),
        ("rows.json", b"[]", r"rows\.json: has no rows"),
        ("rows.json", b'[{"text": "a"},\n{"text"]', r"rows\.json: is not valid JSON: .* line 2 column 8"),
        ("rows.json", b'{"text": "a"}', r"rows\.json: holds a object, not a list of rows"),
        ("rows.csv", b"text\na", r"rows\.csv: is not a known kind of data file \(\.jsonl, \.json, \.parquet, \.txt\)"),
    ],
)
def test_a_bad_file_is_named(name: str, content: bytes, message: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(JaxftError, match=message):
        list(read_rows(path))


def test_sources_that_are_no_rows(tmp_path: Path):
    with pytest.raises(JaxftError, match=r"gone\.jsonl: does not exist"):
        list(read_rows(tmp_path / "gone.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(JaxftError, match=r"folder\.jsonl: is not a file"):
        list(read_rows(tmp_path / "folder.jsonl"))
    with pytest.raises(JaxftError, match=r"^train: is a dict, not rows"):
        list(read_rows({"text": "one row"}, "train"))
    with pytest.raises(JaxftError, match=r"^train: has no rows"):
        list(read_rows([], "train"))


def test_a_byte_order_mark_and_line_separators_inside_strings_do_no_harm(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + '{"text": "a\u2028b"}'.encode())
    assert next(read_rows(path)) == TextRow(f"{path} row 1", "text", "", "a\u2028b")


def test_rows_are_read_one_at_a_time():
    def source():
        yield {"text": "first"}
        raise AssertionError("read ahead")

    assert next(read_rows(source())) == TextRow("dataset row 1", "text", "", "first")
