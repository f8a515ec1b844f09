"""`python -m pallas_kernels.bench [--peers FILE] [--out FILE] [--only TEXT]`: every op at the sizes of a real model.

Each benchmark runs with what `implementation=None` chooses and with every other implementation that takes it, on
device times (`pallas_kernels.timing`) with inputs that the cache does not hold. Rates count an operation's own least
work: each input read once, each output written once, each product computed once; a fraction is of this device's own
copy or matmul, measured in the same run. `--peers` adds other libraries' times, measured on the same machine: a file of
JSON lines such as {"kind": "micro", "op": "rmsnorm fwd", "impl": "liger", "ms": 0.05}. Results are written to `--out`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks import Benchmark, benchmarks
from pallas_kernels.op import OPS
from pallas_kernels.timing import device_milliseconds

# Larger than any device's cache: what rotates through this much memory is never found there.
CACHE_BYTES = 200 * 2**20
REPEATS = 20
# As jaxft's train step has it: a low-rank product is then added in the epilogue of the large one.
XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      benchmark: its name.
      implementation, chosen: which one, and whether `implementation=None` chooses it.
      milliseconds: of device time, the median.
      rate, unit: GB/s or TFLOP/s of the least work.
      fraction: of the device's own copy or matmul.
      temp_gib: memory that the program needs beside its inputs and outputs.
      peer, peer_milliseconds: the fastest of the peers, if there is one.
    """

    benchmark: str
    implementation: str
    chosen: bool
    milliseconds: float
    rate: float
    unit: str
    fraction: float
    temp_gib: float
    peer: str | None = None
    peer_milliseconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device reaches: GB/s of a copy (bytes read and written), TFLOP/s of a bfloat16 matmul."""

    copy: float
    matmul: float

    @classmethod
    def measured(cls, size: int = 2**29, rows: int = 8192) -> Ceilings:
        copy_sets = [(jnp.full((size,), value, jnp.int16),) for value in range(2)]
        copy = device_milliseconds(jax.jit(lambda x: x + jnp.int16(1)), copy_sets, repeats=REPEATS)
        factors = [jax.random.normal(key, (rows, rows), jnp.bfloat16) for key in jax.random.split(jax.random.key(0))]
        matmul = device_milliseconds(jax.jit(lambda x, y: x @ y), [tuple(factors)], repeats=REPEATS)
        return cls(4 * size / copy / 1e6, 2 * rows**3 / matmul / 1e9)


def measure(benchmark: Benchmark, implementation: str, ceilings: Ceilings, *, chosen: bool, repeats: int) -> Row:
    """Times one implementation."""
    program = _PROGRAMS[benchmark.direction]
    keys = jax.random.split(jax.random.key(0), 1 + CACHE_BYTES // _argument_bytes(benchmark))[:16]
    run, sets, donated = program(benchmark, implementation, keys)
    milliseconds = device_milliseconds(run, sets, repeats=repeats, donated=donated)
    memory = run.lower(*sets[0]).compile().memory_analysis()
    per_second, unit, ceiling = benchmark.gigabytes * 1e3, "GB/s", ceilings.copy
    if benchmark.teraflops:
        per_second, unit, ceiling = benchmark.teraflops * 1e3, "TFLOP/s", ceilings.matmul
    rate = per_second / milliseconds
    temp_gib = memory.temp_size_in_bytes / 2**30 if memory else math.nan
    return Row(benchmark.name, implementation, chosen, milliseconds, rate, unit, rate / ceiling, temp_gib)


def _argument_bytes(benchmark: Benchmark) -> int:
    shapes = jax.eval_shape(lambda key: _split(benchmark.make(key))[0], jax.random.key(0))
    return 1 + sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what holds arrays, the Python values)."""
    arrays = {n: a for n, a in arguments.items() if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(a))}
    return arrays, {name: value for name, value in arguments.items() if name not in arrays}


def _forward(benchmark: Benchmark, implementation: str, keys: jax.Array) -> tuple[Any, list[Any], tuple[int, ...]]:
    arrays, static = _split(benchmark.make(keys[0]))
    names = [*benchmark.in_place, *(name for name in arrays if name not in benchmark.in_place)]
    op = functools.partial(OPS[benchmark.op], implementation=implementation, **static)
    donated = _donated(benchmark, implementation, 0)
    run = jax.jit(lambda *values: op(**dict(zip(names, values, strict=True))), donate_argnums=donated)
    made = (_split(benchmark.make(key))[0] for key in keys)
    return run, [tuple(arguments[name] for name in names) for arguments in made], donated


def _donated(benchmark: Benchmark, implementation: str, first: int) -> tuple[int, ...]:
    """XLA's version makes new arrays: given the old ones to overwrite, it would copy."""
    return () if implementation == "xla" else tuple(range(first, first + len(benchmark.in_place)))


def _differentiable(benchmark: Benchmark, implementation: str, arguments: dict[str, Any]) -> tuple[Any, list[Any]]:
    rest = {name: value for name, value in arguments.items() if name not in benchmark.wrt}
    op = OPS[benchmark.op]

    def f(*values: Any) -> Any:
        return op(**dict(zip(benchmark.wrt, values, strict=True)), **rest, implementation=implementation)

    return f, [arguments[name] for name in benchmark.wrt]


def _cotangents(shapes: Any, key: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype), shapes)


def _backward(benchmark: Benchmark, implementation: str, keys: jax.Array) -> tuple[Any, list[Any], tuple[int, ...]]:
    sets = []
    for key in keys:
        f, values = _differentiable(benchmark, implementation, benchmark.make(key))
        out, pull_back = jax.jit(lambda *values, f=f: jax.vjp(f, *values))(*values)
        sets.append((pull_back, *jax.tree.leaves(_cotangents(out, key))))
        structure = jax.tree.structure(out)
        del out
    donated = _donated(benchmark, implementation, 1)
    run = jax.jit(lambda pull_back, *g: pull_back(jax.tree.unflatten(structure, g)), donate_argnums=donated)
    return run, sets, donated


def _both(benchmark: Benchmark, implementation: str, keys: jax.Array) -> tuple[Any, list[Any], tuple[int, ...]]:
    def run(arrays: dict[str, Any], g: Any) -> Any:
        f, values = _differentiable(benchmark, implementation, {**arrays, **static})
        out, pull_back = jax.vjp(f, *values)
        return out, pull_back(g)

    sets = []
    for key in keys:
        arrays, static = _split(benchmark.make(key))
        f, values = _differentiable(benchmark, implementation, {**arrays, **static})
        sets.append((arrays, _cotangents(jax.eval_shape(f, *values), key)))
    return jax.jit(run), sets, ()


_PROGRAMS = {"forward": _forward, "backward": _backward, "forward + backward": _both}


def rows(
    chosen: Sequence[Benchmark], peers: dict[str, tuple[str, float]], ceilings: Ceilings, repeats: int
) -> Iterator[Row]:
    """Measures each benchmark with what `implementation=None` chooses, then with the others that take it."""
    for benchmark in chosen:
        shapes = _shapes(benchmark)
        first = OPS[benchmark.op].choose(**shapes).implementation
        others = [name for name in OPS[benchmark.op].implementations if name != first]
        for name in [first, *(name for name in others if not OPS[benchmark.op].refuses(name, **shapes))]:
            try:
                row = measure(benchmark, name, ceilings, chosen=name == first, repeats=repeats)
            except jax.errors.JaxRuntimeError as error:  # a rival that needs more memory than there is
                if name == first:
                    raise
                print(f"{benchmark.name}: {name} did not run: {str(error).splitlines()[0][:100]}")
                continue
            peer, milliseconds = peers.get(benchmark.peer or "", (None, None))
            yield dataclasses.replace(row, peer=peer, peer_milliseconds=milliseconds)


def _shapes(benchmark: Benchmark) -> dict[str, Any]:
    """The op's arguments with ShapeDtypeStructs for arrays."""
    static: dict[str, Any] = {}

    def arrays(key: jax.Array) -> dict[str, Any]:
        made, values = _split(benchmark.make(key))
        static.update(values)
        return made

    return {**jax.eval_shape(arrays, jax.random.key(0)), **static}


def read_peers(file: Path) -> dict[str, tuple[str, float]]:
    """The fastest (implementation, milliseconds) of every operation in a file of JSON lines."""
    best: dict[str, tuple[str, float]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if row.get("kind") == "micro" and row["ms"] < best.get(row["op"], ("", math.inf))[1]:
            best[row["op"]] = row["impl"], row["ms"]
    return best


def main(arguments: list[str] | None = None) -> None:
    """Prints a row as soon as it is measured."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--peers", type=Path, help="JSON lines with other libraries' times")
    parser.add_argument("--out", type=Path, default=Path("kernels.json"), help="where the results go")
    parser.add_argument("--only", default="", help="benchmarks whose name contains this")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args(arguments)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"
    peers = read_peers(options.peers) if options.peers else {}
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{device}, median of {options.repeats} calls' device time")
    print(f"{'benchmark':68}{'':9}{'ms':>9}{'rate':>14}{'ceiling':>9}{'temp GiB':>9}  peer / ours")
    done = []
    for row in rows([b for b in benchmarks() if options.only in b.name], peers, Ceilings.measured(), options.repeats):
        done.append(dataclasses.asdict(row))
        _write(options.out, {"device": device, "rows": done})
        print(_line(row), flush=True)
    print(f"wrote {options.out}: {len(done)} rows")


def _write(file: Path, results: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(file)


def _line(row: Row) -> str:
    peer = "" if row.peer_milliseconds is None else f"{row.peer_milliseconds / row.milliseconds:.2f} ({row.peer})"
    mark = "*" if row.chosen else " "
    return (
        f"{row.benchmark:68.67}{mark}{row.implementation:8}{row.milliseconds:9.4f}{row.rate:8.0f} {row.unit:7}"
        f"{row.fraction:6.0%}{row.temp_gib:9.2f}  {peer}"
    )


if __name__ == "__main__":
    main()
