"""`python -m benchmarks.convert --folder DIR --type q4_k_m --layers 2`: how fast checkpoints are converted, in how much
memory.

Writes a checkpoint of random bfloat16 weights into the folder (once; `--layers` of the model's), then converts it, each
conversion in a process of its own: to every GGUF type asked for, to Orbax and from there back, and beside them `cp -r`.
Prints one JSON line for each and a table. Times leave out Python's imports and come after the source was read once, so
that it is in the page cache if that is large enough; a virtual machine may have to fetch the memory of the page cache
itself first, so repeat (`--repeats`), and the quickest is shown. "seconds" end when the files are on the disk (fsync),
"unsynced_seconds" when the program ends, which leaves the rest to the system. Memory is that of the process and those
that it starts: the highest resident set, which counts what they share for each, and the highest anonymous one, which
leaves out the pages of mapped files. "libgguf_cores" is how often the conversion went in the time that libgguf (ggml's
own quantizers) takes for quantizing alone on one core, estimated from 2^24 values of each type; "of_cp" the same of
`cp -r`, on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from benchmarks.load import HostMemory, make, memory_of
from benchmarks.train import MODELS
from converters.cli import main as convert
from converters.gguf_header import read_header
from converters.gguf_quants import QUANTIZABLE
from jaxft.console import console, table, tree_bytes
from jaxft.models.config import DecoderConfig

SAMPLE = 1 << 24  # values that libgguf's rate is taken from
MB = 10**6


def steps(source: Path, types: list[str]) -> dict[str, tuple[list[str], Path]]:
    """What is done -> (arguments of jaxft-convert, what it writes)."""
    folder = source.parent
    orbax, back = folder / "orbax", folder / "back"
    ggufs = {f"to-gguf {name}": (["to-gguf", str(source), "--type", name], folder / f"{name}.gguf") for name in types}
    return {
        "cp": ([], folder / "copy"),
        "hf-to-jax": (["hf-to-jax", str(source)], orbax),
        "jax-to-hf": (["jax-to-hf", str(orbax)], back),
        **ggufs,
    }


def run(step: str, arguments: list[str], source: Path, out: Path) -> dict[str, Any]:
    """One conversion in this process: seconds, and the highest memory in bytes."""
    for file in source.rglob("*"):
        if file.is_file():
            subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    for module in ("converters.orbax_io", "converters.gguf_export", "converters.load", "transformers"):
        importlib.import_module(module)
    remove(out)
    start = time.perf_counter()
    with ProcessesMemory() as host:
        if step == "cp":
            subprocess.run(["cp", "-r", str(source), str(out)], check=True)
        elif convert([arguments[0], arguments[1], str(out), *arguments[2:]]):
            raise SystemExit(f"{step} failed")
        unsynced = time.perf_counter() - start
        written = [path for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file()]
        with ThreadPoolExecutor(8) as threads:  # beside each other, as a file system's own sync writes them
            list(threads.map(_sync, written))
        host.look()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "unsynced_seconds": unsynced,
        "peak_rss": host.resident,
        "peak_anonymous": host.highest,
    }


def remove(path: Path) -> None:
    """A folder or a file, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class ProcessesMemory(HostMemory):
    """Of this process and its children; `resident` follows all of what is resident."""

    resident = 0

    def look(self) -> None:
        found = []
        for pid in (os.getpid(), *children()):
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                memory = memory_of(pid)
                found.append((memory["VmRSS"], memory["RssAnon"]))
        resident, anonymous = map(sum, zip(*found, strict=True))
        self.resident, self.highest = max(self.resident, resident), max(self.highest, anonymous)


def children() -> list[int]:
    """The processes that this one started."""
    pids = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            pids += [int(pid) for pid in path.read_text().split()]
    return pids


def seconds_of_libgguf(path: Path) -> float | None:
    """What libgguf would take on one core for the tensors of a GGUF file; None where it is not installed."""
    if importlib.util.find_spec("libgguf") is None:
        return None
    import libgguf

    values: Counter[GGMLQuantizationType] = Counter()
    for entry in read_header(path).tensors.values():
        if entry.type in QUANTIZABLE:
            values[entry.type] += math.prod(entry.shape)
    x = np.random.default_rng(0).standard_normal((SAMPLE // 4096, 4096), np.float32) / 50
    total = 0.0
    for kind, n in values.items():
        start = time.process_time()  # of all its threads: it takes every core
        libgguf.quantize_rows(x, int(kind))
        total += (time.process_time() - start) * n / SAMPLE
    return total


def part_of(config: DecoderConfig, layers: int | None, vocab_size: int | None) -> DecoderConfig:
    """The first layers of a model, with another vocabulary; None leaves either as it is."""
    layers = layers or config.num_hidden_layers
    kinds = {name: getattr(config, name)[:layers] for name in ("layer_types", "mlp_layer_types")}
    return dataclasses.replace(config, num_hidden_layers=layers, vocab_size=vocab_size or config.vocab_size, **kinds)


def in_process(step: str, options: list[str]) -> dict[str, Any]:
    """`run` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.convert", *options, "--step", step]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def row(step: str, found: dict[str, Any], source: Path, out: Path, cp_seconds: float) -> dict[str, Any]:
    """The figures of a step as they are printed."""
    megabytes = tree_bytes(source) / MB
    libgguf = seconds_of_libgguf(out) if step.startswith("to-gguf") else None
    return {
        "step": step,
        "seconds": round(found["seconds"], 2),
        "unsynced_seconds": round(found["unsynced_seconds"], 2),
        "source_mb": round(megabytes),
        "mb_per_s": round(megabytes / found["seconds"]),
        "of_cp": None if step.startswith("to-gguf") else round(cp_seconds / found["seconds"], 2),
        "libgguf_cores": None if libgguf is None else round(libgguf / found["seconds"], 2),
        "peak_rss_mb": round(found["peak_rss"] / MB),
        "peak_anonymous_mb": round(found["peak_anonymous"] / MB),
        "cores": os.cpu_count(),
    }


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs everything, or one step of it; returns the rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="so many of the model's layers")
    parser.add_argument("--vocab-size", type=int, help="another vocabulary than the model's")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--type", nargs="*", default=["q4_k_m"])
    parser.add_argument("--repeats", type=int, default=1, help="do everything so often, and show the quickest of each")
    parser.add_argument("--step", help="this one only, in this process")
    parser.add_argument("--keep", action="store_true", help="keep what was written")
    options = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(options)
    config = part_of(MODELS[arguments.model], arguments.layers, arguments.vocab_size)
    source = arguments.folder / f"{arguments.model}-{config.num_hidden_layers}x{config.vocab_size}"
    all_steps = steps(source, arguments.type)
    if arguments.step:
        found = run(arguments.step, all_steps[arguments.step][0], source, all_steps[arguments.step][1])
        print(json.dumps(found))
        return [found]
    make(config, "bf16", source)
    rows: list[dict[str, Any]] = []
    tries = [{step: in_process(step, options) for step in all_steps} for _ in range(arguments.repeats)]
    for step, (_, out) in all_steps.items():
        found = min((of_step[step] for of_step in tries), key=lambda found: found["seconds"])
        cp_seconds = found["seconds"] if step == "cp" else rows[0]["seconds"]
        rows.append(row(step, found, source, out, cp_seconds))
        print(json.dumps(rows[-1]), flush=True)
    for path in () if arguments.keep else (source, *(out for _, out in all_steps.values())):
        remove(path)
    console.print(table("conversions", list(rows[0]), [list(row.values()) for row in rows]))
    return rows


if __name__ == "__main__":
    main()
