"""The benchmarks run end to end at sizes of a few dozen, and join other libraries' times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sft_loop
from pallas_kernels import OPS, bench, benchmarks

SIZES = benchmarks.Sizes(
    rows=2, length=16, hidden=64, intermediate=128, heads=2, kv_heads=1, head_dim=16, vocab=200, rank=2
)
CEILINGS = bench.Ceilings(copy=100.0, matmul=1.0)


@pytest.fixture(autouse=True)
def _two_sets_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CACHE_BYTES", 1)


def first_of(op: str) -> benchmarks.Benchmark:
    return next(benchmark for benchmark in benchmarks.benchmarks(SIZES) if benchmark.op == op)


def test_every_op_of_a_step_has_a_benchmark():
    without = {"cached_attention", "gated_activation_backward", "nf4_quantize"}
    assert {benchmark.op for benchmark in benchmarks.benchmarks(SIZES)} == set(OPS) - without


@pytest.mark.slow
@pytest.mark.parametrize("benchmark_", list(benchmarks.benchmarks(SIZES)), ids=lambda b: b.name)
def test_every_benchmark_runs(benchmark_):
    (first, *_) = bench.rows([benchmark_], {}, CEILINGS, repeats=1)
    assert first.chosen
    assert first.milliseconds > 0


def test_rows_have_rates_and_the_fastest_peer(tmp_path: Path):
    peers = tmp_path / "peers.jsonl"
    lines = [("a", 3.0, "micro"), ("b", 2.0, "micro"), ("c", 1.0, "train")]
    peers.write_text("\n".join(json.dumps({"kind": k, "op": "rmsnorm fwd", "impl": i, "ms": ms}) for i, ms, k in lines))
    best = bench.read_peers(peers)
    assert best == {"rmsnorm fwd": ("b", 2.0)}
    rows = list(bench.rows([first_of("rms_norm")], best, CEILINGS, repeats=2))
    assert [(row.implementation, row.chosen) for row in rows] == [("xla", True), ("pallas", False)]
    for row in rows:
        assert row.rate == pytest.approx(2 * 2 * 32 * 64 / 1e6 / row.milliseconds)
        assert row.fraction == pytest.approx(row.rate / 100)
        assert (row.peer, row.peer_milliseconds) == ("b", 2.0)


@pytest.mark.parametrize("direction", ["backward", "forward + backward"])
def test_backward_runs_with_its_residuals_at_hand(direction: str):
    benchmark = next(b for b in benchmarks.benchmarks(SIZES) if b.direction == direction)
    (row, *_) = bench.rows([benchmark], {}, CEILINGS, repeats=1)
    assert row.milliseconds > 0


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    rotation = first_of("rope")
    monkeypatch.setattr(bench, "benchmarks", lambda: [rotation])
    monkeypatch.setattr(bench.Ceilings, "measured", classmethod(lambda cls: CEILINGS))
    bench.main(["--out", str(tmp_path / "kernels.json"), "--only", "rope", "--repeats", "1"])
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["implementation"] for row in results["rows"]} == {"xla", "pallas"}
    assert "wrote" in capsys.readouterr().out


@pytest.mark.slow
def test_the_loop_beside_the_bare_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path):
    """benchmarks/sft_loop.py on the tiny model: rows are fuller packed, and every number is there."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    flags = {"model": "tiny", "rows": 1, "seq": 256, "documents": 24, "steps": 2, "save-steps": 1}
    flags |= {"remat": "none", "padded-multiple": 128}
    sft_loop.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record["utilisation"] > record["padded_utilisation"]
    assert record["loop_overhead"] == pytest.approx(record["loop_step_ms"] / record["bare_step_ms"] - 1)
    assert record["packed_over_padded"] == pytest.approx(record["packed_tok_s"] / record["padded_tok_s"])
