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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels import adamw_8bit, nf4
from pallas_kernels.lora_linear import Packed
from pallas_kernels.lora_parts import LoraWeights, flatten
from pallas_kernels.op import OPS
from pallas_kernels.timing import device_milliseconds

# Larger than any device's cache: what rotates through this much memory is never found there.
CACHE_BYTES = 200 * 2**20
REPEATS = 20
# As jaxft's train step has it: a low-rank product is then added in the epilogue of the large one.
XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One op at one size.

    Attributes:
      op: a name of `OPS`.
      size: in words.
      direction: "forward", "backward" (residuals at hand) or "forward + backward".
      make: key -> the op's keyword arguments.
      wrt: the arguments to differentiate.
      gigabytes, teraflops: the least work; one of them sets the ceiling.
      peer: the peers' name of the same work.
      in_place: the op overwrites these arguments, and their cotangents in the backward pass.
    """

    op: str
    size: str
    direction: str
    make: Callable[[jax.Array], dict[str, Any]]
    wrt: tuple[str, ...] = ()
    gigabytes: float = 0.0
    teraflops: float = 0.0
    peer: str | None = None
    in_place: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}, {self.size}, {self.direction}"


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


def normals(key: jax.Array, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """bfloat16 arrays by name, normally distributed."""
    keys = jax.random.split(key, len(shapes))
    pairs = zip(shapes.items(), keys, strict=True)
    return {name: jax.random.normal(k, shape, jnp.bfloat16) for (name, shape), k in pairs}


def random_nf4(key: jax.Array, rows: int, columns: int) -> pk.nf4.QuantizedArrays:
    """Random codes with double quantization, as large as a weight [rows, columns] has."""
    blocks = rows * columns // pk.nf4.BLOCK_SIZE
    nested = -(-blocks // pk.nf4.NESTED_BLOCK_SIZE)
    codes, absmax, scales = jax.random.split(key, 3)
    return pk.nf4.QuantizedArrays(
        jax.random.randint(codes, (rows, columns // 2), 0, 256, jnp.uint8),
        jax.random.randint(absmax, (blocks,), 0, 256, jnp.uint8),
        jax.random.uniform(scales, (nested,), jnp.float32, 0.01, 0.02),
        jnp.float32(0.05),
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one layer: Llama-3.1-8B's by default, and 8,192 tokens."""

    rows: int = 4
    length: int = 2048
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256
    rank: int = 16
    nested: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def benchmarks(sizes: Sizes | None = None) -> Iterator[Benchmark]:
    """Every op that a training or decoding step spends time in, at one model's sizes."""
    s = sizes or Sizes()
    yield from _norms(s)
    yield from _rotations(s)
    yield from _activations(s)
    yield from _decoding(s)
    yield from _gate_and_up(s)
    yield from _linears(s)
    yield from _losses(s)
    yield from _attentions(s)
    yield from _experts(s)
    yield from _optimizers(s)


def _norms(s: Sizes) -> Iterator[Benchmark]:
    t, d = s.tokens, s.hidden
    pass_gb, size = 2 * t * d / 1e9, f"{t} x {d}"

    def norm(key: jax.Array) -> dict[str, Any]:
        return {**normals(key, x=(t, d)), "weight": jnp.ones(d, jnp.bfloat16), "eps": 1e-5}

    def add_norm(key: jax.Array) -> dict[str, Any]:
        return {**normals(key, x=(t, d), residual=(t, d)), "weight": jnp.ones(d, jnp.bfloat16), "eps": 1e-5}

    yield Benchmark("rms_norm", size, "forward", norm, gigabytes=2 * pass_gb, peer="rmsnorm fwd")
    yield Benchmark("rms_norm", size, "backward", norm, ("x",), gigabytes=3 * pass_gb, peer="rmsnorm bwd")
    yield Benchmark("add_rms_norm", size, "forward", add_norm, gigabytes=4 * pass_gb)
    yield Benchmark("add_rms_norm", size, "backward", add_norm, ("x",), gigabytes=4 * pass_gb)


def _rotations(s: Sizes) -> Iterator[Benchmark]:
    b, t, h = s.rows, s.length, s.head_dim
    gigabytes = 2 * 2 * s.tokens * (s.heads + s.kv_heads) * h / 1e9

    def make(key: jax.Array) -> dict[str, Any]:
        angles = jax.random.uniform(key, (b, t, h // 2), jnp.float32, 0, 6.28)
        return {
            **normals(key, q=(b, t, s.heads, h), k=(b, t, s.kv_heads, h)),
            "cos": jnp.cos(angles),
            "sin": jnp.sin(angles),
        }

    size = f"{b} x {t}, {s.heads}/{s.kv_heads} heads of {h}"
    for direction, peer in (("forward", "rope fwd"), ("backward", "rope bwd")):
        yield Benchmark("rope", size, direction, make, ("q", "k"), gigabytes, peer=peer, in_place=("q", "k"))


def _activations(s: Sizes) -> Iterator[Benchmark]:
    shape = (s.tokens, s.intermediate)
    pass_gb, size = 2 * math.prod(shape) / 1e9, f"{s.tokens} x {s.intermediate}"

    def make(key: jax.Array) -> dict[str, Any]:
        return normals(key, gate=shape, up=shape)

    wrt = ("gate", "up")
    yield Benchmark("gated_activation", size, "forward", make, wrt, gigabytes=3 * pass_gb, peer="swiglu fwd")
    yield Benchmark("gated_activation", size, "backward", make, wrt, gigabytes=5 * pass_gb, peer="swiglu bwd")


def _decoding(s: Sizes) -> Iterator[Benchmark]:
    for shape in ((s.intermediate, s.hidden), (s.hidden, s.hidden)):
        size = f"{shape[0]} x {shape[1]}"
        stored = math.prod(shape) * (0.5 + 1 / 64) / 1e9

        def dequantize(key: jax.Array, shape: tuple[int, int] = shape) -> dict[str, Any]:
            return {**random_nf4(key, *shape)._asdict(), "dtype": jnp.bfloat16}

        gigabytes = stored + 2 * math.prod(shape) / 1e9
        yield Benchmark(
            "nf4_dequantize",
            size,
            "forward",
            dequantize,
            gigabytes=gigabytes,
            peer=f"nf4 dequant {shape[0]}x{shape[1]}",
        )
        for tokens in (1, 16, 128):

            def matmul(key: jax.Array, shape: tuple[int, int] = shape, tokens: int = tokens) -> dict[str, Any]:
                return {**normals(key, x=(tokens, shape[1])), **random_nf4(key, *shape)._asdict()}

            yield Benchmark("nf4_matmul", f"{tokens} x {shape[1]} -> {shape[0]}", "forward", matmul, gigabytes=stored)


def _gate_and_up(s: Sizes) -> Iterator[Benchmark]:
    """The two largest linears of a decoding step, with adapters."""

    def make(key: jax.Array) -> dict[str, Any]:
        def linear(key: jax.Array) -> LoraWeights:
            keys = jax.random.split(key, 3)
            factors = normals(keys[0], lora_A=(s.rank, s.hidden), lora_B=(s.intermediate, s.rank))
            return LoraWeights(nf4.Weight(*random_nf4(keys[1], s.intermediate, s.hidden)), None, **factors)

        keys = jax.random.split(key, 3)
        return {**normals(keys[0], x=(1, s.hidden)), "linears": (linear(keys[1]), linear(keys[2]))}

    stored = 2 * s.hidden * s.intermediate * (0.5 + 1 / 64) / 1e9
    yield Benchmark("nf4_linears", f"1 x {s.hidden} -> 2 x {s.intermediate}", "forward", make, gigabytes=stored)


def adapted(key: jax.Array, sizes: Sizes, **shapes: tuple[int, int]) -> dict[str, Any]:
    """Arguments of linears over NF4 with float32 adapters: {"q_weight": ..., "q_lora_A": ..., ...}."""
    linears = {}
    for (name, (out, size_in)), one in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        keys = jax.random.split(one, 3)
        linears[name] = LoraWeights(
            Packed(*random_nf4(keys[0], out, size_in)),
            None,
            jax.random.normal(keys[1], (sizes.rank, size_in)) * size_in**-0.5,
            jax.random.normal(keys[2], (out, sizes.rank)) * 0.01,
        )
    return {name: value for name, value in flatten(linears).items() if value is not None}


def _linears(s: Sizes) -> Iterator[Benchmark]:
    d, f, kv = s.hidden, s.intermediate, s.kv_heads * s.head_dim
    linears = {
        "lora_linear": ({"": (f, d)}, f"{d} -> {f}", f"up {d}->{f}"),
        "lora_qkv": ({"q": (d, d), "k": (kv, d), "v": (kv, d)}, f"{d} -> {d}, {kv}, {kv}", "qkv"),
        "lora_mlp": ({"gate": (f, d), "up": (f, d), "down": (d, f)}, f"{d} -> {f} -> {d}", "mlp"),
    }
    for op, (shapes, size, peer) in linears.items():

        def make(key: jax.Array, shapes: dict[str, tuple[int, int]] = shapes) -> dict[str, Any]:
            arguments = adapted(key, s, **shapes)
            return {**normals(key, x=(s.rows, s.length, d)), **{name.lstrip("_"): a for name, a in arguments.items()}}

        names = [f"{name}_lora_{factor}".lstrip("_") for name in shapes for factor in "AB"]
        teraflops = 2 * 2 * s.tokens * sum(map(math.prod, shapes.values())) / 1e12
        size, peer = f"{s.tokens} tokens, {size}, NF4, r={s.rank}", f"lora-nf4 {peer} fwd+bwd"
        yield Benchmark(op, size, "forward + backward", make, ("x", *names), teraflops=teraflops, peer=peer)


def _losses(s: Sizes) -> Iterator[Benchmark]:
    def arguments(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key)
        arrays = normals(keys[0], hidden=(s.tokens, s.hidden), head=(s.vocab, s.hidden))
        targets = jax.random.randint(keys[1], (s.tokens,), 0, s.vocab)
        return {"hidden": arrays["hidden"], "head": 0.02 * arrays["head"], "targets": targets}

    def weighted(key: jax.Array) -> dict[str, Any]:
        return {**arguments(key), "weights": jnp.ones(s.tokens)}

    size, work = f"{s.tokens} x {s.hidden} x {s.vocab}", 2 * s.tokens * s.hidden * s.vocab / 1e12
    both = "forward + backward"
    yield Benchmark(
        "linear_cross_entropy", size, both, weighted, ("hidden",), teraflops=2 * work, peer="lm_head+CE fwd+bwd"
    )
    yield Benchmark("selected_log_probs", size, both, arguments, ("hidden",), teraflops=3 * work)


def _attentions(s: Sizes) -> Iterator[Benchmark]:
    documents = 8
    for b, t in ((max(1, s.rows // 2), s.length), (1, s.tokens)):
        size = f"{b} x {t}, {s.heads}/{s.kv_heads} heads of {s.head_dim}"
        teraflops = 2 * b * s.heads * t * t * s.head_dim / 1e12

        def causal(key: jax.Array, b: int = b, t: int = t) -> dict[str, Any]:
            kv = (b, t, s.kv_heads, s.head_dim)
            arrays = normals(key, q=(b, t, s.heads, s.head_dim), k=kv, v=kv)
            return {**arrays, "scale": s.head_dim**-0.5}

        def packed(key: jax.Array, b: int = b, t: int = t) -> dict[str, Any]:
            ids = jnp.broadcast_to(1 + jnp.arange(t, dtype=jnp.int32) * documents // t, (b, t))
            return {**causal(key, b, t), "segment_ids": ids}

        peer = f"attention {b}x{t}"
        wrt = ("q", "k", "v")
        yield Benchmark("attention", size, "forward", causal, wrt, teraflops=teraflops, peer=f"{peer} fwd")
        both = "forward + backward"
        yield Benchmark("attention", size, both, causal, wrt, teraflops=3.5 * teraflops, peer=f"{peer} fwd+bwd")
        size = f"{size}, {documents} documents a row"
        yield Benchmark("attention", size, both, packed, wrt, teraflops=3.5 * teraflops / documents)


def _experts(s: Sizes) -> Iterator[Benchmark]:
    experts, d, f, rows = 16 * s.kv_heads, s.hidden // 2, s.head_dim * 6, 8 * s.tokens

    def make(key: jax.Array) -> dict[str, Any]:
        arrays = normals(
            key, x=(rows, d), weight=(experts, f, d), lora_A=(experts, s.rank, d), lora_B=(experts, f, s.rank)
        )
        return {**arrays, "group_sizes": jnp.full(experts, rows // experts, jnp.int32)}

    size = f"{rows} x {d} -> {f}, {experts} experts, r={s.rank}"
    wrt, teraflops = ("x", "lora_A", "lora_B"), 2 * 2 * rows * d * f / 1e12
    yield Benchmark("grouped_matmul", size, "forward + backward", make, wrt, teraflops=teraflops)


def _optimizers(s: Sizes) -> Iterator[Benchmark]:
    n = s.hidden * s.hidden * 5 // 2

    def make(key: jax.Array) -> dict[str, Any]:
        parameter = jax.random.normal(key, (n,))
        arrays = {"parameter": parameter, "gradient": parameter[::-1], **adamw_8bit.init(parameter)._asdict()}
        schedule = {"step": jnp.int32(10), "learning_rate": jnp.float32(1e-3)}
        return {**arrays, **schedule, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

    gigabytes, in_place = n * (3 * 4 + 2 * 2) / 1e9, ("parameter", *adamw_8bit.State._fields)
    yield Benchmark("adamw_8bit", f"{n} parameters", "forward", make, gigabytes=gigabytes, in_place=in_place)


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
