"""Conversions that do not end: killed at any moment, or on a disk that is full."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.checkpoint import Checkpoint, stream
from converters.cli import main
from converters.open import open_checkpoint
from jaxft.errors import EXIT_STATUS, JaxftError
from jaxft.files import new_file, new_folder

# Command -> name of its output.
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


def test_errors_of_the_disk_have_words(tmp_path: Path):
    for new in (new_file, new_folder):
        with (
            pytest.raises(JaxftError, match=r"x: could not be written \(No space left on device\)"),
            new(tmp_path / "x"),
        ):
            raise OSError(28, "No space left on device")
        assert list(tmp_path.iterdir()) == []
