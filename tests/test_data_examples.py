"""Every row of a data set ends up in an example or in the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from jaxft.data.examples import HOPELESS, RowSettings, split, tokenize_rows
from jaxft.data.sources import open_source
from jaxft.data.turns import Markers
from jaxft.errors import JaxftError
from test_data_chat import BOT, CHATML, USER, chat, make_tokenizer, marked

LONG = [{"text": "abc"}, {"text": "x" * 9}]
ENDS_LATE = [{"prompt": "p" * 9, "completion": "c"}, {"prompt": "p", "completion": "c" * 9}]


def tokenized(rows: Any, template: str | None = CHATML, **settings: Any) -> tuple[list[str], Any]:
    """(examples as marked text, report)."""
    tokenizer = make_tokenizer(template)
    result = tokenize_rows(rows, tokenizer, RowSettings(**{"max_seq_length": 8} | settings), "train")
    return [marked(example, tokenizer) for example in result.examples], result.report


def test_a_row_over_the_limit_is_an_error_by_default():
    with pytest.raises(JaxftError, match=r"train row 2: has 10 tokens; max_seq_length is 8\. .*truncate"):
        tokenized(LONG)
    assert tokenized(LONG, max_seq_length=10)[1].dropped == 0


def test_overlong_rows_are_truncated_or_dropped_and_counted():
    texts, report = tokenized(LONG, on_overlong="truncate")
    assert texts == ["a⟦bc<|im_end|>⟧", "x⟦xxxxxxx⟧"]
    assert (report.truncated, report.dropped, report.tokens, report.trained_tokens) == (1, 0, 3 + 8, 2 + 7)
    assert str(report) == "rows: 2 text; 11 tokens, 9 trained; too long: 1 truncated, 0 split, 0 dropped"
    texts, report = tokenized(ENDS_LATE, on_overlong="truncate")
    assert texts == ["p⟦ccccccc⟧"]
    assert (report.truncated, report.dropped) == (1, 1)  # nothing of the first row's completion is left
    texts, report = tokenized(LONG, on_overlong="drop")
    assert (len(texts), report.truncated, report.dropped) == (1, 0, 1)


def test_overlong_rows_are_split_without_losing_a_target():
    texts, report = tokenized(LONG, on_overlong="split", max_seq_length=4)
    # The last x of a piece is the first of the next: there it is no target.
    assert texts == ["a⟦bc<|im_end|>⟧", "x⟦xxx⟧", "x⟦xxx⟧", "x⟦xx<|im_end|>⟧"]
    assert (report.split, report.pieces_left_out, report.trained_tokens) == (1, 0, 2 + 9)
    texts, report = tokenized(ENDS_LATE, on_overlong="split", max_seq_length=4)
    assert texts == ["ppp⟦c⟧", "c⟦<|im_end|>⟧", "p⟦ccc⟧", "c⟦ccc⟧", "c⟦ccc⟧", "c⟦<|im_end|>⟧"]
    assert (report.split, report.pieces_left_out) == (2, 2)
    assert "2 pieces without a target left out" in str(report)


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_split_covers_every_pair_of_neighbours_once(length: int):
    tokenizer = make_tokenizer()
    (example,) = tokenize_rows([{"text": "abcdefghijk"}], tokenizer, RowSettings(50)).examples
    pieces = split(example, length)
    pairs = [pair for piece in pieces for pair in zip(piece.tokens[:-1], piece.tokens[1:], strict=True)]
    assert pairs == list(zip(example.tokens[:-1], example.tokens[1:], strict=True))
    assert max(len(piece.tokens) for piece in pieces) <= length
    assert sum(int(piece.loss_mask.sum()) for piece in pieces) == int(example.loss_mask.sum())


def test_a_data_set_of_which_nothing_is_left_is_an_error():
    with pytest.raises(JaxftError, match=r"train: nothing to train on: every row was dropped as too long\. Raise"):
        tokenized(LONG, max_seq_length=2, on_overlong="drop")
    with pytest.raises(JaxftError, match=r"train: has no rows"):
        tokenized([])
    with pytest.raises(JaxftError, match=r"train: nothing to train on: .*2 bad rows skipped: train row 1: .*row 2: "):
        tokenized([{"a": 1}, 3], on_bad_row="skip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_overlong": "cut"}, r"on_overlong: is 'cut'\. Known values: error, truncate, drop, split"),
        ({"on_bad_row": "ignore"}, r"on_bad_row: is 'ignore'\. Known values: error, skip"),
        ({"max_seq_length": 1}, r"max_seq_length: must be at least 2, not 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str):
    with pytest.raises(JaxftError, match=message):
        tokenized(LONG, **settings)


BAD_LINES = [
    b'{"text": ',
    b'{"text": "\xff"}',
    b'["a list"]',
    b'{"nothing": "known"}',
    b'{"text": 7}',
    b'{"text": ""}',
    b'{"prompt": "of another", "completion": "form"}',
    b'{"text": "\\ud800"}',
    b'{"text": ' + b"1" * 5000 + b"}",
    b'{"text": "a", "images": ["i.png"]}',
]
REASONS = [
    "is not valid JSON",
    "is not UTF-8",
    "is a list, not an object",
    "fit none of the known forms",
    "'text' is a number",
    "every label masked",
    "has the form prompt/completion, and row 2 the form text",
    "holds what is no character",
    "is JSON that cannot be read",
    "has 'images', and only text",
]


@pytest.mark.parametrize("case", range(len(BAD_LINES)))
def test_a_bad_row_is_named_or_skipped_and_told(case: int, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"text": "good"}\n' + BAD_LINES[case] + b'\n{"text": "more"}\n')
    with pytest.raises(JaxftError, match=rf"rows\.jsonl row 3\b.*{REASONS[case]}"):
        tokenized(path)
    texts, report = tokenized(path, on_bad_row="skip")
    assert texts == ["g⟦ood<|im_end|>⟧", "m⟦ore<|im_end|>⟧"]
    assert report.skipped == 1
    assert f"1 bad rows skipped: {path} row 3" in str(report)
    assert REASONS[case] in str(report)


def test_only_the_first_reasons_are_told_and_hopeless_data_is_given_up(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*BAD_LINES, b'{"text": "good"}']))
    _, report = tokenized(path, on_bad_row="skip")
    assert report.skipped == len(BAD_LINES)
    assert len(report.reasons) == 5
    assert str(report).endswith("; ...")
    rows = iter([{}] * HOPELESS + [{"text": "never read"}])
    with pytest.raises(JaxftError, match=rf"data set: its first {HOPELESS} rows are bad: train row 1: "):
        tokenized(rows, on_bad_row="skip")
    assert next(rows) == {"text": "never read"}


def test_forms_are_kept_apart_by_file_only(tmp_path: Path):
    for name, row in (("a", {"text": "abc"}), ("b", {"prompt": "a", "completion": "b"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    texts, report = tokenized([tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")])
    assert texts == ["a⟦bc<|im_end|>⟧", "a⟦b<|im_end|>⟧"]
    assert "1 text, 1 prompt/completion (1 of " in str(report)


def test_the_text_field_decides():
    row = {"messages": chat("u: hi", "a: yo"), "rendered": "abc"}
    assert tokenized([row], max_seq_length=99)[0] == [f"{USER}hi<|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n"]
    assert tokenized([row], dataset_text_field="rendered")[0] == ["a⟦bc<|im_end|>⟧"]
    with pytest.raises(JaxftError, match=r"train row 1: has no 'txt' \(dataset_text_field\), only"):
        tokenized([row], dataset_text_field="txt")


RENDERED = f"{USER}hi<|im_end|>\n{BOT}yo<|im_end|>\n{USER}go<|im_end|>\n{BOT} ok \n<|im_end|>\n"
MASKED = f"{USER}hi<|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n{USER}go<|im_end|>\n{BOT}⟦ ok \n<|im_end|>⟧\n"


def test_markers_find_responses_in_rendered_text_and_in_messages():
    rows: list[Any] = [{"text": RENDERED}, {"messages": chat("u: hi", "a: yo", "u: go", "a:  ok \n")}]
    for row in rows:
        assert tokenized([row], markers=Markers(USER, BOT), max_seq_length=99)[0] == [MASKED]
    with pytest.raises(JaxftError, match=r"train row 1: has every label masked.* no text after '<\|im_start\|>model"):
        tokenized(rows, markers=Markers(USER, "<|im_start|>model\n"), max_seq_length=99)
    # A prompt and its completion say themselves where the completion is.
    assert tokenized([{"prompt": "a", "completion": "b"}], markers=Markers(USER, BOT))[0] == ["a⟦b<|im_end|>⟧"]


@pytest.mark.slow
def test_data_sets_of_datasets(tmp_path: Path):
    """In memory, streamed and from a Parquet file; `datasets` fills keys that some rows lack with None."""
    import datasets

    rows: list[dict[str, Any]] = [{"messages": chat(f"u: {i}", "a: yo", "u: go", "a: ok")} for i in range(7)]
    rows[3]["messages"][0]["name"] = "ann"
    expected = tokenized(rows, max_seq_length=80)
    whole = datasets.Dataset.from_list(rows)
    assert whole[0]["messages"][0]["name"] is None
    whole.to_parquet(tmp_path / "rows.parquet")
    for found in (whole, whole.to_iterable_dataset(), tmp_path / "rows.parquet"):
        texts, report = tokenized(found, max_seq_length=80)
        assert (texts, report.forms) == (expected[0], expected[1].forms)
    with pytest.raises(JaxftError, match=r"train: has the splits train, test. Give one of them"):
        tokenized(whole.train_test_split(2))
    source = open_source(whole.to_iterable_dataset())
    position = next(itertools.islice(source.read(), 2, None))[1]
    assert [row.value for row, _ in source.read(position)] == whole.to_list()[3:]
