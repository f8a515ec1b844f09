"""Sources go on from any position; streams give every row, pack as well as a whole epoch, and can be killed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxft.data.examples import RowSettings
from jaxft.data.formats import read_rows
from jaxft.data.sources import Mixture, Source, open_source, read_raw
from jaxft.data.stream import StreamLoader
from jaxft.errors import JaxftError
from test_data_chat import make_tokenizer
from test_data_packing import documents, instruction_mix

TEXTS = [f"row {i} " + "x" * (i % 7) for i in range(23)]
ROWS = [{"text": text} for text in TEXTS]


class Anew:
    """An iterable that is no list."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(ROWS)


def make_sources(folder: Path) -> dict[str, Any]:
    """The same rows in every kind of source."""
    lines, whole, text, parquet = (folder / f"rows.{kind}" for kind in ("jsonl", "json", "txt", "parquet"))
    lines.write_text("\n\n".join(map(json.dumps, ROWS)))
    whole.write_text(json.dumps(ROWS))
    text.write_bytes(b"\r\n".join(row.encode() for row in TEXTS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet, row_group_size=5)
    halves = []
    for i, rows in enumerate((ROWS[:9], ROWS[9:])):
        halves.append(folder / f"half{i}.jsonl")
        halves[-1].write_text("\n".join(map(json.dumps, rows)))
    files = {"jsonl": lines, "json": whole, "txt": text, "parquet": parquet, "files": halves}
    return {**files, "list": ROWS, "iterable": Anew()}


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "parquet", "files", "list", "iterable"])
def test_a_source_goes_on_from_any_position(kind: str, tmp_path: Path):
    source = open_source(make_sources(tmp_path)[kind])
    whole = list(source.read())
    assert [row.value for row, _ in whole] == ROWS
    for i, (_, position) in enumerate(whole):
        rest = source.read(json.loads(json.dumps(position)))
        assert [row for row, _ in rest] == [row for row, _ in whole[i + 1 :]]
    json.dumps(source.facts)


def test_rows_of_files_have_their_numbers(tmp_path: Path):
    sources = make_sources(tmp_path)
    assert [row.number for row in read_raw(sources["jsonl"])] == list(range(1, 46, 2))
    assert [row.number for row in read_raw(sources["parquet"])] == list(range(1, 24))
    assert [row.where for row in read_raw(sources["files"])][9] == f"{tmp_path}/half1.jsonl row 1"


def test_an_iterator_can_be_looked_at_and_then_read_once():
    source = open_source(iter(ROWS * 10), "train")
    assert next(source.read())[0].value == ROWS[0]
    assert len(list(source.read())) == 230
    with pytest.raises(JaxftError, match=r"^train: can be gone through only once, and was"):
        next(source.read())


def test_bad_sources(tmp_path: Path):
    (tmp_path / "not.parquet").write_bytes(b"text")
    with pytest.raises(JaxftError, match=r"not\.parquet: is not a Parquet file"):
        next(open_source(tmp_path / "not.parquet").read())
    bad = pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad.parquet")
    with pytest.raises(JaxftError, match=r"bad\.parquet row 2: is not UTF-8"):
        list(read_rows(tmp_path / "bad.parquet"))
    with pytest.raises(JaxftError, match=r"mixture: has the weights \[1, 0\]\. Each must be a number above 0"):
        Mixture([ROWS, ROWS], [1, 0])
    with pytest.raises(JaxftError, match=r"mixture: has 1 sources and 2 weights"):
        Mixture([ROWS], [1, 2])
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}')
    with pytest.raises(JaxftError, match=r"Extra data at line 2 .*Files of JSON lines are called \.jsonl"):
        list(read_rows(tmp_path / "lines.json"))


def test_a_mixture_keeps_its_proportions_and_leaves_no_row_out(tmp_path: Path):
    for name, n in (("a", 30), ("b", 5)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(n)))
    source: Source = open_source({tmp_path / "a.jsonl": 0.75, tmp_path / "b.jsonl": 0.25})
    whole = list(source.read())
    counts = Counter(row.value["text"] for row, _ in whole)
    assert set(counts) == {f"a{i}" for i in range(30)} | {f"b{i}" for i in range(5)}
    assert max(counts[f"a{i}"] for i in range(30)) == 1
    assert sum(counts[f"b{i}"] for i in range(5)) == pytest.approx(10, abs=1)  # twice, to keep the proportion
    for i in (0, 7, 21, len(whole) - 1):
        rest = source.read(json.loads(json.dumps(whole[i][1])))
        assert [row for row, _ in rest] == [row for row, _ in whole[i + 1 :]]


def loader(rows: Any, **settings: Any) -> StreamLoader:
    usual = {"batch_size": 2, "accumulation": 2, "epochs": 1, "buffer_tokens": 200}
    return StreamLoader(rows, make_tokenizer(), RowSettings(64, on_bad_row="skip"), **usual | settings)


def texts_of(batches: Any) -> list[str]:
    tokenizer, found = make_tokenizer(), []
    for batch in batches:
        found += [tokenizer.decode(np.frombuffer(tokens, np.int32)) for tokens, _ in documents(batch)]
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_row_of_a_stream_comes_once_an_epoch(packing: bool):
    stream = loader(ROWS, packing=packing, epochs=2)
    batches = list(stream)
    assert {array.shape for batch in batches for array in batch if array is not None} == {(2, 2, 64)}
    assert Counter(texts_of(batches)) == Counter(2 * [f"{text}<|im_end|>" for text in TEXTS])
    assert stream.report.rows.forms == {"text": 46}
    assert "46 text" in str(stream.report)
    assert texts_of(loader(ROWS, packing=packing, epochs=2)) == texts_of(batches)
    assert texts_of(loader(ROWS, packing=packing, epochs=2, seed=1)) != texts_of(batches)
    assert stream.example.where == "dataset row 1"


def test_a_killed_stream_goes_on(tmp_path: Path):
    sources = make_sources(tmp_path)
    for rows in (sources["jsonl"], dict.fromkeys(sources["files"], 1.0)):
        whole = list(itertools.islice(loader(rows, epochs=None), 12))
        for start in (0, 1, 5, 11):
            batches = iter(loader(rows, epochs=None))
            for _ in range(start):
                next(batches)
            state = json.loads(json.dumps(batches.get_state()))
            resumed = iter(loader(rows, epochs=None))
            resumed.set_state(state)
            for batch, expected in zip(resumed, whole[start:], strict=False):
                assert all((a == b).all() for a, b in zip(batch, expected, strict=True))
    with pytest.raises(JaxftError, match=r"^data position: .*: buffer_tokens 200 \(now 300\), data "):
        iter(loader(ROWS, buffer_tokens=300)).set_state(state)


def test_a_stream_without_examples_ends_in_an_error():
    for rows in ([], [{"text": ""}, {"nothing": 1}]):
        with pytest.raises(JaxftError, match=r"^dataset: nothing to train on"):
            next(iter(loader(rows, epochs=None)))
    with pytest.raises(JaxftError, match=r"^epochs: must be at least 1"):
        loader(ROWS, epochs=0)


def test_a_stream_packs_the_usual_mix_well():
    from jaxft.data.packing import arrange
    from jaxft.data.stream import BUFFER_ROWS

    lengths, rng = np.array(instruction_mix(10_000)), np.random.default_rng(0)
    buffers = np.split(lengths, np.flatnonzero(np.diff(np.cumsum(lengths) // (BUFFER_ROWS * 2048))) + 1)
    rows = sum(len(arrange(buffer, 2048, True, 64, rng)) for buffer in buffers)
    assert len(buffers) > 2
    assert lengths.sum() / (rows * 2048) >= 0.98


@pytest.mark.slow
def test_two_gigabytes_stream_in_bounded_memory(tmp_path: Path):
    """Every byte is read and tokenized, by long words, as the tokenizer's speed is not what is measured."""
    path = tmp_path / "large.jsonl"
    words = [f"{n:040d}" for n in np.random.default_rng(0).integers(1, 1000, 700_000)]
    block = [json.dumps({"text": " ".join(words[i : i + 700])}) + "\n" for i in range(0, len(words), 700)]
    text = "".join(block).encode()
    with path.open("wb") as file:
        while file.tell() < 2e9:
            file.write(text)
    code = (
        "import re, sys\n"
        "from tokenizers import Tokenizer, models, pre_tokenizers\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "from jaxft.data.examples import RowSettings\n"
        "from jaxft.data.stream import StreamLoader\n"
        "ids = {'</s>': 0, **{f'{i:040d}': i for i in range(1, 1000)}}\n"
        "words = Tokenizer(models.WordLevel(ids, unk_token='</s>'))\n"
        "words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()\n"
        "tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token='</s>')\n"
        "loader = StreamLoader(sys.argv[1], tokenizer, RowSettings(2048), batch_size=8, epochs=1)\n"
        "tokens = sum(int((batch.segment_ids > 0).sum()) for batch in loader)\n"
        # Of this program alone: ru_maxrss also has what the process that started it had, until then.
        "print(tokens, re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    size = path.stat().st_size
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    path.unlink()  # pytest keeps its folders
    assert run.returncode == 0, run.stderr
    tokens, kibibytes = map(int, run.stdout.split())
    print(f"{size:,} bytes, {tokens:,} tokens, {kibibytes / 2**20:.2f} GiB")
    assert tokens == size // len(text) * (len(words) + len(block))  # and an end token a row
    assert kibibytes * 1024 < 1.5e9
