"""benchmarks/compare.py: our rows meet the peer's of the same job and shape, in a table and in charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compare import CASES, draw, pair, table


def record(seq: int, speed: float, **fields: Any) -> dict[str, Any]:
    return {"kind": "train", "batch": 1, "seq": seq, "tok_s": speed, "peak_alloc_gib": seq / 8192, **fields}


def test_rows_meet_the_peer_of_their_job_and_shape(tmp_path: Path):
    ours = [record(seq, 3000.0, model="llama-3.1-8b", remat="offload", peer="u8") for seq in (8192, 16384)]
    peers = [record(8192, 1000.0, job="u8"), record(8192, 2000.0, job="u8"), record(16384, 1.0, job="u1")]
    rows = pair(ours, [*peers, {"kind": "load", "job": "u8"}])
    assert [row.ratio for row in rows] == [1.5, None], "the newest of the same job counts; another job does not"
    lines = table(rows).splitlines()
    assert lines[2] == "| llama-3.1-8b | 1 x 8192 | `offload` | 3,000 | 1.00 | 2,000 | 1.00 | 1.50 |"
    assert lines[3].endswith("|  |  |  |")
    draw(rows, tmp_path / "step.svg")
    assert "<svg" in (tmp_path / "step.svg").read_text()[:500]


def test_every_case_is_a_command_that_train_understands():
    from benchmarks.train import parse_arguments

    for case in CASES:
        arguments = parse_arguments(
            ["--model", case.model, "--quant", case.quant, "--shape", case.shape, *case.settings]
        )
        assert f"{case.batch_and_seq[0]}x{case.batch_and_seq[1]}" == arguments.shape
