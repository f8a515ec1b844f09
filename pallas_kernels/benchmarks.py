"""What `pallas_kernels.bench` times: every op of a training or decoding step, at the sizes of a real model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels import adamw_8bit, nf4
from pallas_kernels.lora_linear import Packed
from pallas_kernels.lora_parts import LoraWeights, flatten


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
    yield from _dropout(s)
    yield from _losses(s)
    yield from _attentions(s)
    yield from _experts(s)
    yield from _packed_experts(s)
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


def _dropout(s: Sizes) -> Iterator[Benchmark]:
    """The adapters of q, k and v."""

    def make(key: jax.Array) -> dict[str, Any]:
        arrays = normals(key, x=(s.tokens, s.hidden), A=(3, s.rank, s.hidden))
        return {**arrays, "seeds": jax.random.bits(key, (3, 2), jnp.uint32), "rate": 0.05}

    # x is read for l and for dA, and dx is written.
    gigabytes, size = 3 * 2 * s.tokens * s.hidden / 1e9, f"3 x {s.tokens} x {s.hidden}, r={s.rank}"
    yield Benchmark("dropout_low_rank", size, "forward + backward", make, ("x", "A"), gigabytes=gigabytes)


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


def _packed_experts(s: Sizes) -> Iterator[Benchmark]:
    experts, d, f = 4 * s.kv_heads, s.hidden // 2, s.head_dim * 6

    def make(key: jax.Array) -> dict[str, Any]:
        codes = jax.random.bits(key, (experts, f, d // 2), jnp.uint8)
        return {"codes": codes, "scales": 100 + codes[..., :: pk.mxfp4.BLOCK_SIZE // 2] % 40, "dtype": jnp.bfloat16}

    gigabytes = experts * f * d * (2 + 17 / 32) / 1e9
    yield Benchmark("mxfp4_dequantize", f"{experts} x {f} x {d}", "forward", make, gigabytes=gigabytes)


def _optimizers(s: Sizes) -> Iterator[Benchmark]:
    n = s.hidden * s.hidden * 5 // 2

    def make(key: jax.Array) -> dict[str, Any]:
        parameter = jax.random.normal(key, (n,))
        arrays = {"parameter": parameter, "gradient": parameter[::-1], **adamw_8bit.init(parameter)._asdict()}
        schedule = {"step": jnp.int32(10), "learning_rate": jnp.float32(1e-3)}
        return {**arrays, **schedule, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

    gigabytes, in_place = n * (3 * 4 + 2 * 2) / 1e9, ("parameter", *adamw_8bit.State._fields)
    yield Benchmark("adamw_8bit", f"{n} parameters", "forward", make, gigabytes=gigabytes, in_place=in_place)
