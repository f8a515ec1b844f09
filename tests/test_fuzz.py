"""Damaged checkpoints end in success or in a JaxftError: a few hundred here, any number by tests/fuzz.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fuzz

ROOT = Path(__file__).parent.parent


def run(*options: str) -> dict[str, int]:
    """The counts of outcomes; in a process of its own, where annotations are not checked and memory is its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests/fuzz.py"), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


def test_damaged_checkpoints():
    counts = run("--inputs", "100", "--seed", "1")
    # The damage is real, and not always the end.
    for action in ("inspect", "import", "verify"):
        assert counts[f"{action}: success"] > 0
    for action in ("inspect", "import"):
        assert counts[f"{action}: error in words"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_more_damaged_checkpoints():
    run("--inputs", "10000", "--seed", "2")


def test_what_goes_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, make_tiny_hf: Callable[..., Path], tmp_path: Path):
    """Negative controls: an exception of another kind, a hang, a large allocation, and a file outside."""
    seeds = {"hf": make_tiny_hf(tmp_path / "seed", with_tokenizer=False, **fuzz.CONFIG)}
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    def hang(_: Path) -> None:
        while True:
            pass

    for inspect, words in {
        lambda path: {}["gone"]: "KeyError",
        hang: "TooSlowError",
        lambda path: bytearray(2 * fuzz.BYTES): "MemoryError",
        lambda path: (path.parent / "escaped").write_text("x"): "wrote outside of its folder: ['escaped']",
    }.items():
        monkeypatch.setattr(fuzz, "inspect", inspect)
        problems = [problem for _, problem in fuzz.outcomes(seeds, 1, 0, work) if problem]
        (work / "escaped").unlink(missing_ok=True)
        assert words in problems[0]
