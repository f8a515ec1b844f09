"""Conversions that do not end: killed at any moment, or on a disk that is full."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.checkpoint import Checkpoint, stream
from converters.cli import main
from converters.gguf_workers import n_workers
from converters.hf_load import HFCheckpoint
from converters.open import open_checkpoint
from converters.safetensors_io import n_values
from jaxft.errors import EXIT_STATUS, JaxftError
from jaxft.files import new_file, new_folder

# Command -> name of its output, and options.
COMMANDS = {
    "hf-to-jax": ("jax", []),
    "to-bnb": ("bnb", []),
    "to-gguf": ("model.gguf", ["--type", "q4_0"]),
}


@pytest.fixture(scope="module")
def folder(make_tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that writing it takes a while."""
    return make_tiny_hf(tmp_path_factory.mktemp("source") / "hf", hidden_size=256, num_hidden_layers=8)


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in stream(checkpoint)}


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path):
    """And those of living ones are not."""
    code = (
        "import os, sys, time; from pathlib import Path; from jaxft.files import new_file, new_folder\n"
        f"with new_folder({str(tmp_path / 'out')!r}) as a, new_file({str(tmp_path / 'file')!r}) as b:\n"
        "    (a / 'config.json').write_text('half'); b.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    living = {path.name for path in tmp_path.iterdir()}
    assert len(living) == 3  # the empty folder, and two hidden names

    def write() -> None:
        with new_folder(tmp_path / "out", overwrite=True) as new, new_file(tmp_path / "file", overwrite=True) as file:
            (new / "config.json").write_text("whole")
            file.write_text("whole")

    write()
    assert {path.name for path in tmp_path.iterdir()} == living | {"file"}
    process.kill()
    process.wait()
    process.stdout.close()
    write()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file"}
    assert (tmp_path / "out" / "config.json").read_text() == "whole"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(command: str, folder: Path, tmp_path: Path):
    """Files that cannot grow beyond 64 KiB stand for it: nothing is left, and one line says why."""
    name, options = COMMANDS[command]
    script = (
        "import resource, signal, sys; from converters.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({2**16}, {2**16})); sys.exit(main(sys.argv[1:]))"
    )
    arguments = [command, str(folder), str(tmp_path / "out" / name), *options]
    (tmp_path / "out").mkdir()
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_STATUS, result.stderr
    assert f"{name}: could not be written (" in result.stderr
    told = [line for line in result.stderr.splitlines() if not re.match(r"(reading|writing) ", line)]
    assert len(told) == 1, result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment(command: str, folder: Path, tmp_path: Path):
    """kill -9 after ever longer times: what has the final name is whole, and running again completes it."""
    name, options = COMMANDS[command]
    whole = tmp_path / "whole" / name
    started = time.monotonic()
    convert = [sys.executable, "-m", "converters.cli", command, str(folder)]
    subprocess.run([*convert, str(whole), *options], capture_output=True, check=True)
    seconds = time.monotonic() - started
    expected = contents(open_checkpoint(whole))
    finished = 0
    for step in range(12):
        out = tmp_path / f"killed{step}" / name
        process = subprocess.Popen([*convert, str(out), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * (0.4 + 0.06 * step))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            finished += 1
            assert contents(open_checkpoint(out)) == expected
            continue
        assert main([command, str(folder), str(out), *options]) == 0
        assert contents(open_checkpoint(out)) == expected
        assert [path.name for path in out.parent.iterdir()] == [name]
    assert finished < 12


def processes_of(parent: int) -> list[int]:
    """The processes that quantize for another one and live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if int(fields["PPid"]) == parent and not fields["State"].startswith("Z"):
                found.append(int(status.parent.name))
    return [pid for pid in found if b"converters.gguf_workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition gives as soon as that is true; fails when it does not become so."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def large(make_tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many values that processes quantize them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 5}
    folder = make_tiny_hf(tmp_path_factory.mktemp("large") / "hf", **sizes)
    assert n_workers(sum(n_values(info) for info in HFCheckpoint(folder).tensors.values())) > 1
    return folder


@pytest.fixture(scope="module")
def whole(large: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    assert main(["to-gguf", str(large), str(path), "--type", "q4_k_m"]) == 0
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.02, 0.2, 0.5, 0.8])  # of the file's size
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_while_processes_quantize(
    how: signal.Signals, after: float, large: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No file looks finished, the processes end by themselves, and running again goes on where it was."""
    out = tmp_path / "out"
    command = ["to-gguf", str(large), str(out / "model.gguf"), "--type", "q4_k_m"]

    def size() -> int:
        return sum(path.stat().st_size for path in out.rglob("*.unfinished"))

    code = (
        "import signal, sys; from converters.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    wait_until(lambda: len(processes_of(process.pid)) > 1, 60)
    workers = processes_of(process.pid)
    wait_until(lambda: size() > after * len(whole), 60)
    assert all(map(lives, workers))
    process.send_signal(how)
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in told
    wait_until(lambda: not any(map(lives, workers)), 20)
    assert not (out / "model.gguf").exists(), "it looks finished"
    assert (size() > 0) == (how != signal.SIGINT), "Ctrl-C leaves nothing, the others what is gone on with"

    read: list[str] = []
    plain = HFCheckpoint.read
    monkeypatch.setattr(HFCheckpoint, "read", lambda self, name: (read.append(name), plain(self, name))[1])
    assert main(command) == 0
    assert (out / "model.gguf").read_bytes() == whole
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    if how != signal.SIGINT and after >= 0.2:
        assert len(read) < len(HFCheckpoint(large).tensors), "it began again"


def test_errors_of_the_disk_have_words(tmp_path: Path):
    for new in (new_file, new_folder):
        with (
            pytest.raises(JaxftError, match=r"x: could not be written \(No space left on device\)"),
            new(tmp_path / "x"),
        ):
            raise OSError(28, "No space left on device")
        assert list(tmp_path.iterdir()) == []
