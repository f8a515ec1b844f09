"""Damaged checkpoints of every format, in large numbers: each ends in success or in a JaxftError.

    PYTHONPATH=.:tests python tests/fuzz.py --inputs 100000 --seed 0

One input is a small sound checkpoint with one to three changes: bits and bytes, lengths and counts, JSON values,
entries of safetensors headers, files that are missing, links, pipes or folders. Each is inspected with hashes, and
imported (read, checked, and written as a Hugging Face folder); some are verified against the sound one. What goes wrong
beside that is printed to standard error with the number of the input, which --only repeats: another exception, more
than 5 seconds, more than 1 GB, or a file outside of the output folder. Standard output gets the counts of outcomes, as
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.bnb import write_bnb
from converters.gguf_export import write_gguf
from converters.hf_export import write_hf
from converters.hf_load import HFCheckpoint
from converters.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from converters.load import check
from converters.open import is_adapter, open_checkpoint
from converters.orbax_io import write_orbax
from converters.peft_io import lora_config_of, make_adapter, read_adapter, write_adapter
from converters.summary import summarize
from converters.verify import verify
from jaxft.console import console
from jaxft.errors import JaxftError
from jaxft.lora import LoraConfig
from tiny import make_tiny_hf

SECONDS, BYTES = 5, 10**9
# A forward pass of a config that no input had before is compiled first, which takes seconds on a busy machine.
COMPILING_SECONDS = 30
MEMORY = Path("/dev/shm")  # small files come and go faster there
# Every so many inputs the forward pass is run, too, and everything is done with Orbax, which are slow.
VERIFY_EVERY, ORBAX_EVERY = 25, 25
CONFIG: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "head_dim": 16,
}

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**63, 2**64 - 1, 10**30, -(10**30), 0.5, 1e308, math.nan, math.inf, "", "a",
    "../x", "/etc/passwd", "..\\x", "a/b", "\0", "x" * 10_000, [], {}, [0], [1, -1], [[1]], [2**62, 2**62], {"a": 1},
    "model.safetensors", "F32", "U8", "F8_E8M0", "default", "llama3", "llama", "nf4", "float32", "NaN", "é\u2028",
)  # fmt: skip
NESTED = "[" * 200_000


def make_seeds(folder: Path) -> dict[str, Path]:
    """A sound checkpoint of each format, in a folder of its own."""
    hf = make_tiny_hf(folder / "hf", "float32", with_tokenizer=False, **CONFIG)
    with_tokenizer = make_tiny_hf(folder / "with_tokenizer", "float32", **CONFIG)
    seeds = {"hf": hf, "sharded": folder / "sharded", "bnb": folder / "bnb", "orbax": folder / "orbax"}
    checkpoint = HFCheckpoint(hf)
    write_hf(checkpoint, seeds["sharded"], max_shard_size=30_000)
    write_bnb(checkpoint, seeds["bnb"])
    write_orbax(checkpoint, seeds["orbax"])
    for name, kind in (("gguf", "f32"), ("gguf_q8_0", "q8_0")):
        seeds[name] = folder / name
        write_gguf(HFCheckpoint(with_tokenizer), seeds[name] / "model.gguf", kind)
    shapes = {"A": (2, 64), "B": (64, 2)}
    ones = {f"model.layers.0.mlp.up_proj.lora_{part}.weight": np.ones(shape, "f4") for part, shape in shapes.items()}
    seeds["peft"] = write_adapter(make_adapter(LoraConfig(r=2), ones, base_model_name_or_path="x"), folder / "peft")
    sums = {"blk.0.ffn_up.weight": np.ones((1, 64), "f4")}
    matrix = ImportanceMatrix(sums, {"blk.0.ffn_up.weight": np.ones(1, "f4")}, "text", 8, 1)
    seeds["imatrix"] = write_imatrix(matrix, folder / "imatrix" / "imatrix.gguf").parent
    return seeds


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, repeated, overwritten: mostly near the start, where headers are."""
    new = bytearray(data or b"\0")
    near = len(new) if rng.random() < 0.2 else min(len(new), rng.choice((16, 64, 512, 4096)))
    at = rng.randrange(near)
    kind = rng.randrange(8)
    if kind == 0:
        new[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        new[at] = rng.randrange(256)
    elif kind == 2:
        del new[rng.randrange(len(new)) :]
    elif kind == 3:
        new += rng.randbytes(rng.choice((1, 7, 64)))
    elif kind == 4:
        new[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    elif kind == 5:
        value = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1, len(new)))
        new[at : at + 8] = struct.pack("<Q", value)[: rng.choice((4, 8))]
    elif kind == 6:
        size = rng.choice((4, 32, 256))
        new[at : at + size] = bytes([rng.choice((0, 0x7F, 0xFF))]) * size  # NaN scales among them
    else:
        start = rng.randrange(near)
        new[at:at] = new[start : start + rng.choice((8, 64))]
    return bytes(new)


def change_json(text: bytes, rng: random.Random) -> bytes:
    """Another value, key or type somewhere in an object; rarely text that is no object at all."""
    if rng.random() < 0.05:
        return rng.choice((b"", b"null", b"[]", b'"a"', NESTED.encode(), b'{"a":' * 100_000, b"\xff\xfe", b"{}"))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return change_bytes(text, rng)
    holder = value
    while isinstance(holder, dict | list) and holder:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.75:
            holder = holder[key]
            continue
        kind = rng.random()
        if kind < 0.7:
            holder[key] = rng.choice(NASTY)
        elif kind < 0.85:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(("extra", "", "../x", "weight", str(key) + "x"))] = rng.choice((holder[key], *NASTY))
        break
    changed = json.dumps(value).encode()
    # The same name twice.
    return changed.replace(b"{", b'{"dup": 1, "dup": 2, ', 1) if rng.random() < 0.05 else changed


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's entries, or the bytes of the file."""
    if len(data) < 8 or rng.random() < 0.3:
        return change_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if b"quant_state" in header and rng.random() < 0.3:
        at = rest.find(b'{"quant_type"')
        end = rest.find(b"}", at) + 1
        state = change_json(rest[at:end], rng)[: end - at]
        return data[: 8 + length] + rest[:at] + state.ljust(end - at) + rest[end:]
    header = change_json(header, rng)
    return len(header).to_bytes(8, "little") + header + rest


def change_file(path: Path, outside: Path, rng: random.Random) -> None:
    """Something else in a file's place."""
    kind = rng.randrange(7)
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)  # to itself
    elif kind == 3:
        path.symlink_to(outside / "canary")
    elif kind == 4:
        os.mkfifo(path)
    elif kind == 5:
        path.symlink_to(outside)
    elif kind == 6:
        path.touch()


def mutate(folder: Path, outside: Path, rng: random.Random) -> None:
    """One to three changes of the files of a folder."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            return
        path = rng.choice(files)
        if rng.random() < 0.03:
            change_file(path, outside, rng)
            continue
        change: Callable[[bytes, random.Random], bytes] = change_bytes
        if path.suffix == ".json" and rng.random() < 0.85:
            change = change_json
        elif path.suffix == ".safetensors":
            change = change_safetensors
        path.write_bytes(change(path.read_bytes(), rng))


class TooSlowError(Exception):
    """More than SECONDS."""


@contextlib.contextmanager
def limits(seconds: float) -> Iterator[None]:
    """Raises TooSlowError after `seconds` and MemoryError after BYTES; ends the process where nothing listens to that.

    The last is for code without Python: ten times the seconds of the processor.
    """

    def stop(*_: Any) -> None:
        raise TooSlowError

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, 10 * seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, handler)


def inspect(path: Path) -> None:
    summarize(path, hashes=True).as_json()


def convert(path: Path, out: Path) -> None:
    if is_adapter(path):
        adapter = read_adapter(path)
        lora_config_of(adapter)
        write_adapter(adapter, out)
        return
    checkpoint = open_checkpoint(path)
    check(checkpoint)
    write_hf(checkpoint, out)


def outcomes(seeds: dict[str, Path], number: int, seed: int, work: Path) -> Iterator[tuple[str, str | None]]:
    """(what was done, None or what went wrong) for one input."""
    rng = random.Random(f"{seed}/{number}")
    names = [name for name in seeds if name != "orbax" or number % ORBAX_EVERY == 0]
    name = rng.choice(names)
    folder, out, outside = work / "input", work / "out", work / "outside"
    for path in (folder, out, outside):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(seeds[name], folder)
    outside.mkdir()
    (outside / "canary").write_text("canary")
    mutate(folder, outside, rng)
    actions: dict[str, Callable[[], Any]] = {"inspect": lambda: inspect(folder), "import": lambda: convert(folder, out)}
    if name == "imatrix":
        actions = {"import": lambda: read_imatrix(folder / "imatrix.gguf").of("blk.0.ffn_up.weight", (64, 64), "x")}
    elif number % VERIFY_EVERY == 0 and name != "peft":
        actions["verify"] = lambda: verify(open_checkpoint(seeds["hf"]), open_checkpoint(folder), length=8)
    for action, run in actions.items():
        problem = None
        try:
            with limits(COMPILING_SECONDS if action == "verify" else SECONDS):
                run()
            kind = "success"
        except JaxftError:
            kind = "error in words"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            kind = "FAILED"
            problem = f"input {number} ({name}), {action}: {''.join(traceback.format_exception(error)[-3:])}"
        left = sorted(path.name for path in work.iterdir() if path not in (folder, out, outside))
        if left or (outside / "canary").read_text() != "canary" or len(list(outside.iterdir())) != 1:
            kind, problem = "FAILED", f"input {number} ({name}), {action}: wrote outside of its folder: {left}"
        yield f"{action}: {kind}", problem


def fuzz(inputs: range, seed: int, show: Callable[[str], None] = lambda _: None) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and every problem."""
    counts: Counter[str] = Counter()
    problems: list[str] = []
    quiet, console.quiet = console.quiet, True
    faulthandler.register(signal.SIGPROF, chain=True)
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else None) as name, warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            seeds = make_seeds(Path(name) / "seeds")
            work = Path(name) / "work"
            work.mkdir()
            warm_up(seeds)
            for number in inputs:
                for outcome, problem in outcomes(seeds, number, seed, work):
                    counts[outcome] += 1
                    if problem:
                        problems.append(problem)
                        show(problem)
    finally:
        console.quiet = quiet
        faulthandler.unregister(signal.SIGPROF)
    return counts, problems


def warm_up(seeds: dict[str, Path]) -> None:
    """What the first call of a process imports and compiles is not the input's to answer for."""
    for name, path in seeds.items():
        if name not in ("imatrix", "peft"):
            summarize(path)
    verify(open_checkpoint(seeds["hf"]), open_checkpoint(seeds["bnb"]), length=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input by its number")
    options = parser.parse_args()
    inputs = range(options.first, options.first + options.inputs)
    if options.only is not None:
        inputs = range(options.only, options.only + 1)
    counts, problems = fuzz(inputs, options.seed, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(dict(sorted(counts.items()))))
    return min(1, len(problems))


if __name__ == "__main__":
    sys.exit(main())
