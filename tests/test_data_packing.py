"""Sequence packing and the loader: every token of every document once, nothing crosses, everything is repeatable."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from jaxft.data.batch import Batch, Example, lay_out
from jaxft.data.loader import BatchLoader
from jaxft.data.packing import pack
from jaxft.errors import JaxftError


def make_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Documents of random tokens (never 0) and random masks, of which at least the last token is a target."""
    rng = np.random.default_rng(seed)
    examples = []
    for i, length in enumerate(lengths):
        loss_mask = rng.random(length) < 0.5
        loss_mask[0], loss_mask[1:][-1:] = False, True
        examples.append(Example(f"row {i + 1}", rng.integers(1, 50_000, length, np.int32), loss_mask))
    return examples


def instruction_mix(n: int, seed: int = 0) -> list[int]:
    """Lengths of the usual instruction data: 60 % of rows under 256 tokens, 40 % up to 1,024."""
    rng = np.random.default_rng(seed)
    short = rng.random(n) < 0.6
    return np.where(short, rng.integers(16, 256, n), rng.integers(256, 1025, n)).tolist()


def documents(batch: Batch) -> list[tuple[bytes, bytes]]:
    """(tokens, targets' mask) of every document in a batch [..., T], by its segment ids; checks what a row promises."""
    found = []
    rows = (array.reshape(-1, array.shape[-1]) for array in batch)
    for tokens, targets, loss_mask, segment_ids, positions in zip(*rows, strict=True):
        n_segments = segment_ids.max(initial=0)
        used = np.count_nonzero(segment_ids)
        assert (np.diff(segment_ids[:used]) >= 0).all()  # with the next line: one run a document, padding at the end
        assert sorted(set(segment_ids[:used])) == list(range(1, n_segments + 1))
        for array in (tokens, targets, loss_mask, segment_ids, positions):
            assert not array[used:].any()
        for segment in range(1, n_segments + 1):
            at = np.flatnonzero(segment_ids == segment)
            assert positions[at].tolist() == list(range(len(at)))
            assert targets[at[:-1]].tolist() == tokens[at[1:]].tolist()
            assert (targets[at[-1]], loss_mask[at[-1]]) == (0, 0)
            found.append((tokens[at].tobytes(), loss_mask[at[:-1]].tobytes()))
    return found


def expected_documents(examples: list[Example]) -> list[tuple[bytes, bytes]]:
    return [(e.tokens.tobytes(), e.loss_mask[1:].astype(np.float32).tobytes()) for e in examples]


def test_one_row_by_hand():
    examples = [
        Example("a", np.array([7, 8, 9], np.int32), np.array([False, False, True])),
        Example("b", np.array([4, 5], np.int32), np.array([False, True])),
    ]
    batch = lay_out(examples, [[1, 0], []], 6)
    expected = {
        "tokens": [4, 5, 7, 8, 9, 0],
        "targets": [5, 0, 8, 9, 0, 0],
        "loss_mask": [1, 0, 0, 1, 0, 0],
        "segment_ids": [1, 1, 2, 2, 2, 0],
        "positions": [0, 1, 0, 1, 2, 0],
    }
    for name, array in batch._asdict().items():
        assert array.tolist() == [expected[name], [0] * 6], name
        assert array.dtype == (np.float32 if name == "loss_mask" else np.int32), name


def test_best_fit_by_hand():
    # 6 opens a row of 10, 5 another, 4 fills the first, 3 goes to the second, the 2s fill it and open a third.
    assert pack([2, 3, 5, 6, 4, 2], 10) == [[3, 4], [2, 1, 0], [5]]
    # A first fit would put the 2 after the 7; the best fit is after the 8.
    assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]
    assert pack([], 10) == []
    assert pack([10, 1, 10], 10) == [[0], [2], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_packing_invariants(seed: int):
    rng = np.random.default_rng(seed)
    length, max_segments = int(rng.integers(1, 200)), int(rng.integers(1, 9))
    lengths = rng.integers(1, length + 1, rng.integers(1, 300)) ** rng.choice([1, 1, 0])  # sometimes all of them 1
    rows = pack(lengths, length, max_segments)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= length
    assert max(map(len, rows)) <= max_segments
    # Two rows whose documents would fit in one are never both left, unless max_segments closed one of them.
    open_rows = sorted(f for f, row in zip(filled, rows, strict=True) if len(row) < max_segments)
    assert len(open_rows) < 2 or open_rows[0] + open_rows[1] > length
    assert rows == pack(lengths.tolist(), length, max_segments)
    shuffled = pack(rng.permutation(lengths), length, max_segments)
    assert [len(row) for row in shuffled] == [len(row) for row in rows]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("packing", [True, False])
def test_every_document_comes_exactly_once_an_epoch(seed: int, packing: bool):
    rng = np.random.default_rng(seed)
    examples = make_examples(rng.integers(2, 40, rng.integers(1, 60)).tolist(), seed)
    accumulation, batch_size = (int(n) for n in rng.integers(1, 5, 2))
    settings = {"batch_size": batch_size, "accumulation": accumulation, "max_seq_length": 40, "packing": packing}
    loader = BatchLoader(examples, **settings, epochs=2, seed=seed)
    batches = list(loader)
    assert len(batches) == len(loader) == 2 * loader.steps_per_epoch
    for epoch in (batches[: loader.steps_per_epoch], batches[loader.steps_per_epoch :]):
        assert {array.shape for batch in epoch for array in batch} == {(accumulation, batch_size, 40)}
        assert sorted(d for batch in epoch for d in documents(batch)) == sorted(expected_documents(examples))


def test_the_check_itself_sees_a_leak():
    """Negative control: `documents` refuses a target or a mask that crosses, and a split document."""
    examples = make_examples([3, 4])
    for name, at in (("targets", 2), ("loss_mask", 2), ("positions", 3), ("segment_ids", 1), ("tokens", 8)):
        batch = lay_out(examples, [[0, 1]], 9)
        getattr(batch, name)[0, at] += 3
        with pytest.raises(AssertionError):
            documents(batch)


def test_the_order_depends_on_seed_and_epoch_only():
    examples = make_examples(instruction_mix(60))
    settings = {"batch_size": 2, "max_seq_length": 1024, "epochs": 2}

    def tokens(seed: int = 0, **more: object) -> list[bytes]:
        return [batch.tokens.tobytes() for batch in BatchLoader(examples, seed=seed, **settings | more)]

    first = tokens()
    assert first == tokens()
    assert first != tokens(seed=1)
    assert sorted(first[: len(first) // 2]) != sorted(first[len(first) // 2 :])
    still = tokens(shuffle=False)
    assert still[: len(still) // 2] == still[len(still) // 2 :]


def test_unpacked_and_unshuffled_rows_keep_their_order():
    examples = make_examples([5, 3, 9, 2, 7])
    loader = BatchLoader(examples, batch_size=2, max_seq_length=16, packing=False, shuffle=False)
    assert [d for batch in loader for d in documents(batch)] == expected_documents(examples)


def test_a_run_goes_on_where_it_was():
    loader = BatchLoader(make_examples(instruction_mix(40)), batch_size=2, max_seq_length=1024, epochs=3)
    whole = [loader[step] for step in range(len(loader))]
    for start in (0, 1, loader.steps_per_epoch, len(loader) - 1, len(loader)):
        batches = iter(loader)
        assert len(list(itertools.islice(batches, start))) == start
        state = json.loads(json.dumps(batches.get_state()))
        resumed = iter(loader)
        next(resumed)  # also one that has begun, and has read ahead
        resumed.set_state(state)
        rest = list(resumed)
        assert len(rest) == len(loader) - start
        for batch, expected in zip(rest, whole[start:], strict=True):
            assert all((a == b).all() for a, b in zip(batch, expected, strict=True))
    for step in (-1, len(loader)):
        with pytest.raises(IndexError):
            loader[step]


@pytest.mark.parametrize(
    ("settings", "lengths", "message"),
    [
        ({"seed": 1}, [4, 4, 2], r"^data position: .*: seed 0 \(now 1\)\. Resume"),
        (
            {"batch_size": 2, "packing": False},
            [4, 4, 2],
            r": packing True \(now False\), shape \[1, 1\] \(now \[1, 2\]\)",
        ),
        ({}, [4, 2, 4], r": lengths \d+ \(now \d+\)\."),
    ],
)
def test_a_state_of_another_run_is_refused(settings: dict[str, object], lengths: list[int], message: str):
    usual = {"batch_size": 1, "max_seq_length": 8}
    state = iter(BatchLoader(make_examples([4, 4, 2]), **usual)).get_state()
    iter(BatchLoader(make_examples([4, 4, 2]), **usual, epochs=2)).set_state(state)  # more epochs are no other run
    with pytest.raises(JaxftError, match=message):
        iter(BatchLoader(make_examples(lengths), **usual | settings)).set_state(state)


def test_the_last_step_is_filled_with_padding():
    loader = BatchLoader(make_examples([8] * 5), batch_size=2, accumulation=2, max_seq_length=8)
    assert (len(loader), loader.report.rows) == (2, 5)
    last = loader[1]
    assert last.segment_ids.max(axis=-1).tolist() == [[1, 0], [0, 0]]
    assert last.loss_mask[0, 1].sum() == last.loss_mask[1].sum() == 0


def test_padding_to_a_multiple():
    examples = make_examples([3, 5, 9, 17, 30, 2])
    loader = BatchLoader(examples, batch_size=2, max_seq_length=30, packing=False, shuffle=False, pad_to_multiple_of=8)
    assert [batch.tokens.shape for batch in loader] == [(1, 2, 8), (1, 2, 24), (1, 2, 30)]
    assert sorted(d for batch in loader for d in documents(batch)) == sorted(expected_documents(examples))
    assert loader.report.utilisation == pytest.approx(66 / (2 * 8 + 2 * 24 + 2 * 30))


def test_the_report():
    loader = BatchLoader(make_examples([4, 4, 2, 2, 2]), batch_size=1, max_seq_length=8, max_segments=3)
    trained = int(sum(batch.loss_mask.sum() for batch in loader))
    report = loader.report
    assert (report.documents, report.tokens, report.rows) == (5, 14, 2)
    assert (report.trained_tokens, report.utilisation, report.full_rows) == (trained, 14 / 16, 1)
    assert str(report) == (
        f"5 documents, 14 tokens ({trained} trained) in 2 rows, 87.5% full, 1 rows stopped at max_segments"
    )  # fmt: skip


def test_the_usual_mix_packs_well():
    lengths = instruction_mix(10_000)
    rows = pack(lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) >= 0.98
    one_a_row = sum(lengths) / (len(lengths) * 2048)
    assert one_a_row < 0.25  # negative control: the mix does need packing


BAD = {
    "no examples": ([], {}, r"data set: has no examples"),
    "too long": (make_examples([4, 9]), {}, r"row 2: has 9 tokens; max_seq_length is 8\. .*on_overlong"),
    "nothing to learn": (
        [Example("row 1", np.ones(4, np.int32), np.array([True, False, False, False]))], {},
        r"data set: has every label masked",
    ),
    "batch_size": (make_examples([4]), {"batch_size": 0}, r"batch_size: must be at least 1, not 0"),
    "accumulation": (make_examples([4]), {"accumulation": -1}, r"accumulation: must be at least 1"),
    "max_segments": (make_examples([4]), {"max_segments": 0}, r"max_segments: must be at least 1"),
    "pad_to_multiple_of": (make_examples([4]), {"pad_to_multiple_of": 0}, r"pad_to_multiple_of: must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str):
    examples, settings, message = BAD[case]
    with pytest.raises(JaxftError, match=message):
        BatchLoader(examples, **{"batch_size": 2, "max_seq_length": 8} | settings)


def test_packing_a_document_that_does_not_fit():
    with pytest.raises(JaxftError, match=r"document 1: has 9 tokens; max_seq_length is 8"):
        pack([3, 9], 8)


def test_the_data_package_needs_neither_jax_nor_transformers_to_import():
    code = (
        "import sys, jaxft.data.chat, jaxft.data.formats, jaxft.data.loader\n"
        "sys.exit(str([name for name in ('jax', 'transformers', 'jinja2', 'rich') if name in sys.modules] or ''))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == ""


def test_jax_sees_a_batch_as_a_tree():
    import jax

    batch = BatchLoader(make_examples([4, 4]), batch_size=1, max_seq_length=8)[0]
    assert jax.tree.structure(batch).num_leaves == 5
    assert jax.jit(lambda b: b)(batch).targets.shape == (1, 1, 8)
