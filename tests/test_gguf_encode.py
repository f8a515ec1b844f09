"""The data of GGUF files: the same bytes whatever the blocks and processes, and processes that end."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters import gguf_encode, gguf_workers
from converters.gguf_encode import Data, Matrix, encode, write_data
from converters.gguf_quants import quantize
from converters.gguf_workers import n_workers
from gguf_quant_inputs import COLUMNS, importance, matrix
from jaxft.errors import JaxftError

Q4_K, Q8_0 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q8_0


def written(data: list[Data]) -> bytes:
    file = io.BytesIO()
    write_data(((file, item) for item in data), 0)
    return file.getvalue()


def test_importance_of_each_expert() -> None:
    x, weights = matrix("bell")[:6].reshape(2, 3, COLUMNS), np.stack([importance(), importance()[::-1]])
    found = np.frombuffer(written([Matrix(x, Q4_K, weights, "x")]), np.uint8).reshape(2, 3, -1)
    for expert in range(2):
        np.testing.assert_array_equal(found[expert], quantize(x[expert], Q4_K, weights[expert]))
    assert (found != quantize(x, Q4_K)).any()


def test_small_conversions_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_workers.os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert [n_workers(n) for n in (0, 10_000_000, 135_000_000, 8_000_000_000)] == [1, 1, 16, 16]


def test_the_processes_import_little() -> None:
    code = "import converters.gguf_workers, sys; print(*{'jax', 'transformers', 'flax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "\n"


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two processes, and blocks of a row or two."""
    monkeypatch.setattr(gguf_encode, "n_workers", lambda _: 2)
    monkeypatch.setattr(gguf_encode, "_BLOCK", 2 * COLUMNS)
    yield
    assert children() == []


def children() -> list[int]:
    """Processes of ours that quantize."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                facts, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if int(facts.rsplit(")", 1)[1].split()[1]) == os.getpid() and b"converters.gguf_workers" in command:
                found.append(int(folder.name))
    return found


@pytest.mark.usefixtures("in_processes")
def test_processes_write_the_same_bytes_in_order() -> None:
    """And what goes wrong in one names its tensor."""
    x = matrix("bell")
    bad = np.array(x)
    bad[4, 300] = np.nan
    data: list[Data] = [
        Matrix(x.astype(ml_dtypes.bfloat16), Q4_K, None, "a"),
        b"padding",
        Matrix(x[0], GGMLQuantizationType.F32, None, "b"),
        Matrix(x, GGMLQuantizationType.Q6_K, importance(), "c"),
        np.arange(12, dtype=np.uint8).reshape(3, 4),
        Matrix(x, Q8_0, None, "d"),
    ]
    expected = [encode(*part).tobytes() if isinstance(part, Matrix) else bytes(part) for part in data]
    assert written(data) == b"".join(expected)
    with pytest.raises(JaxftError, match="tensor d: has values that Q8_0 cannot hold"):
        written([*data[:-1], Matrix(bad, Q8_0, None, "tensor d")])


@pytest.mark.usefixtures("in_processes")
def test_a_process_that_was_killed() -> None:
    def data() -> Iterator[Data]:
        yield Matrix(matrix("bell"), Q4_K, None, "a")
        os.kill(children()[0], signal.SIGKILL)
        for _ in range(5):
            yield Matrix(matrix("bell"), Q4_K, None, "b")

    with pytest.raises(JaxftError, match="a process for it ended with status -9"):
        write_data(((io.BytesIO(), item) for item in data()), 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_asked(number: signal.Signals) -> None:
    """In whatever way it ends."""
    code = (
        # A shell's background jobs ignore the signal.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import numpy as np\nfrom gguf import GGMLQuantizationType\nfrom converters.gguf_workers import Workers\n"
        "x = np.random.default_rng(0).standard_normal((64, 4096)).astype('f4')\n"
        "with Workers(2) as workers:\n"
        "    for done in workers.map(lambda _: workers.quantize(x, GGMLQuantizationType.Q4_K), range(10000)):\n"
        "        print(*(process._process.pid for process in workers._processes), flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert process.stdout.readline() == f"{pids[0]} {pids[1]}\n"
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    assert process.returncode == -number
    assert told.count("Traceback") == (number == signal.SIGINT), told
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
