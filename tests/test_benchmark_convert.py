"""benchmarks/convert.py runs end to end on a tiny model, and cleans up after itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import convert
from converters.gguf_header import read_header

TINY = dataclasses.replace(
    convert.MODELS["llama-3.2-1b"],
    vocab_size=64,
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_every_step_has_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def here(step: str, options: list[str]) -> dict[str, Any]:
        return convert.main([*options, "--step", step])[0]

    monkeypatch.setattr(convert, "in_process", here)
    monkeypatch.setattr(convert, "SAMPLE", 1 << 16)
    monkeypatch.setitem(convert.MODELS, "llama-3.2-1b", TINY)
    options = ["--model", "llama-3.2-1b", "--layers", "2", "--folder", str(tmp_path / "x"), "--type", "q4_k_m", "q8_0"]
    rows = convert.main([*options, "--keep"])
    assert [row["step"] for row in rows] == ["cp", "hf-to-jax", "jax-to-hf", "to-gguf q4_k_m", "to-gguf q8_0"]
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines() if '"step"' in line] == rows
    assert all(row["seconds"] > 0 and row["peak_rss_mb"] > 50 for row in rows)
    assert [row["of_cp"] is None for row in rows] == [False, False, False, True, True]
    original = (tmp_path / "x" / "llama-3.2-1b-2x64" / "model.safetensors").read_bytes()
    assert (tmp_path / "x" / "back" / "model.safetensors").read_bytes() == original
    types = {entry.type.name for entry in read_header(tmp_path / "x" / "q4_k_m.gguf").tensors.values()}
    assert types == {"F32", "Q4_K", "Q6_K"}
    monkeypatch.setattr(convert, "steps", lambda source, types: {"cp": ([], source.parent / "copy")})
    convert.main(options)
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"orbax", "back", "q4_k_m.gguf", "q8_0.gguf"}


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path):
    """1.2 GB in tensors of up to 131 MB; a process without any takes about 400 MB."""
    sizes = ["--model", "llama-3.2-1b", "--layers", "8", "--vocab-size", "32000", "--folder", str(tmp_path)]
    rows = {row["step"]: row for row in convert.main([*sizes, "--type", "q8_0"])}
    assert rows["cp"]["source_mb"] > 1000
    for step in ("hf-to-jax", "jax-to-hf", "to-gguf q8_0"):
        assert rows[step]["peak_rss_mb"] < 400 + 3 * 131, rows[step]
