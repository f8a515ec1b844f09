"""A few tokens times an NF4 weight, decoded on the way to the multiplication: y = x W^T, for decoding text.

With map and absmax of pallas_kernels/nf4.py, W[o, i] = map[codes[o, i]] * absmax[block of (o, i)]. Up to
`MATVEC_TOKENS` tokens run on ordinary cores (pallas_kernels/nf4_kernels.py), more on tensor cores, W rounded to x's
dtype as `nf4.dequantize(dtype=x.dtype)` does. Sums are float32, rounded to x's dtype once.

Decoded values go from where they were decoded into the product. Of each row a lane loads four words, so it has 32
columns that follow each other, while of every 16 columns of an operand lane t of a row's four holds 2t, 2t + 1, 2t + 8
and 2t + 9 (PTX ISA, mma.m16n8k16). But a sum has no order: W's columns are numbered so that each lane already holds its
own, and x's columns are put into the same order before. Through shared memory it would take 1.1 to 1.6 times as long.

Backward, for x only (the codes are frozen): dx = dy W, with W decoded again; nothing but the codes is kept.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend, nf4, nf4_kernels
from pallas_kernels.nf4_kernels import (
    MATVEC_TOKENS,
    PER_WORD,
    Format,
    Linear,
    Tile,
    fetch,
    linears,
    look_up,
    power_of_two,
    table,
    word_scales,
)
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_rounded

MAX_TOKENS = 128
LARGE_WEIGHT = 8192  # rows
LANES = 4  # that share a row of a product's operand


def nf4_matmul(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None = None,
    nested_offset: jax.Array | None = None,
    *,
    layer: jax.Array | int | None = None,
    quant_map: jax.Array | None = None,
    nested_quant_map: jax.Array | None = None,
    block_size: int = nf4.BLOCK_SIZE,
    nested_block_size: int = nf4.NESTED_BLOCK_SIZE,
    implementation: str | None = None,
) -> jax.Array:
    """Returns x W^T [..., out] in x's dtype, for an NF4 weight W [out, in]; differentiable in x.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import nf4, nf4_matmul
    >>> w = jax.random.normal(jax.random.key(0), (64, 128))
    >>> x = jnp.ones((1, 128))
    >>> arrays = nf4.quantize(w)
    >>> y = nf4_matmul(x, *arrays)
    >>> y.shape
    (1, 64)
    >>> bool(jnp.allclose(y, x @ nf4.dequantize(*arrays).T, atol=1e-4))
    True

    Args:
      x: [..., in], float32, bfloat16 or float16.
      codes, absmax, nested_absmax, nested_offset, layer, quant_map, nested_quant_map, block_size, nested_block_size:
        the weight, as in `nf4.dequantize`.
      implementation: "xla", "dequantize" (`nf4.dequantize` by its kernel, then a plain matmul), "pallas" or None.

    Raises:
      ValueError: x's last axis is not the weight's.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    if x.ndim < 1 or x.shape[-1] != 2 * codes.shape[-1]:
        shape = (codes.shape[-2], 2 * codes.shape[-1])
        raise ValueError(f"nf4_matmul: x {x.shape} and a weight {shape} do not fit")
    return NF4_MATMUL(
        x,
        codes,
        absmax,
        nested_absmax,
        nested_offset,
        layer=layer,
        quant_map=quant_map,
        nested_quant_map=nested_quant_map,
        block_size=block_size,
        nested_block_size=nested_block_size,
        implementation=implementation,
    )


def _implementation(forward: Any, decode: str | None = None) -> Any:
    """The op's function for a `(x [M, in], nf4.Weight, Format) -> y [M, out]`, with the gradient of x.

    `decode` is the implementation of `nf4.dequantize` that the backward runs; None means the fastest.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def product(x: jax.Array, weight: nf4.Weight, format: Format) -> jax.Array:
        return forward(x, weight, format)

    product.defvjp(lambda x, weight, format: (forward(x, weight, format), weight), functools.partial(_backward, decode))

    def function(
        x: jax.Array,
        codes: jax.Array,
        absmax: jax.Array,
        nested_absmax: jax.Array | None = None,
        nested_offset: jax.Array | None = None,
        *,
        layer: jax.Array | int | None = None,
        quant_map: jax.Array | None = None,
        nested_quant_map: jax.Array | None = None,
        block_size: int = nf4.BLOCK_SIZE,
        nested_block_size: int = nf4.NESTED_BLOCK_SIZE,
    ) -> jax.Array:
        weight = nf4.Weight(codes, absmax, nested_absmax, nested_offset, layer, quant_map, nested_quant_map)
        tokens = math.prod(x.shape[:-1])
        y: Any = product(x.reshape(tokens, x.shape[-1]), weight, Format(block_size, nested_block_size))
        return y.reshape(*x.shape[:-1], codes.shape[-2])

    return function


def _decoded(decode: str | None, weight: nf4.Weight, format: Format, dtype: Any) -> jax.Array:
    return nf4.dequantize(**weight._asdict(), **format._asdict(), dtype=dtype, implementation=decode)


def _decode_and_multiply(x: jax.Array, weight: nf4.Weight, format: Format, *, decode: str | None = None) -> jax.Array:
    return einsum_rounded("mi,oi->mo", x, _decoded(decode, weight, format, x.dtype), x.dtype)


_reference = functools.partial(_decode_and_multiply, decode="xla")


def _backward(decode: str | None, format: Format, weight: nf4.Weight, dy: jax.Array) -> tuple[jax.Array, None]:
    return einsum_rounded("mo,oi->mi", dy, _decoded(decode, weight, format, dy.dtype), dy.dtype), None


def _pallas(x: jax.Array, weight: nf4.Weight, format: Format) -> jax.Array:
    if x.shape[0] > MATVEC_TOKENS:
        return tensor_core_call(x, weight, format)
    (y,) = linears(x, (Linear(nf4.as_stack(*weight)),), (1.0,), format)
    return y


class Tiling(NamedTuple):
    """How the work is divided: a program decodes [rows, words] at a time; enough of them share the columns that there
    are at least `programs`, if that is possible."""

    rows: int
    words: int
    num_warps: int
    num_stages: int
    programs: int


TILINGS = {  # by the tokens of a block; of two dozen each, on an H100
    16: Tiling(32, 16, 1, 3, 1024),
    32: Tiling(32, 16, 1, 3, 1024),
    64: Tiling(32, 16, 1, 2, 896),
    128: Tiling(64, 8, 4, 3, 512),
}


def tensor_core_call(
    x: jax.Array, weight: nf4.Weight, format: Format, *, tiling: Tiling | None = None, splits: int | None = None
) -> jax.Array:
    """x [M, in] -> [M, out]; a program makes [rows, block of tokens] of it.

    `splits` programs share the columns, and their float32 sums are added up after.
    """
    tokens, columns = x.shape
    out, per_row = weight.codes.shape[-2], columns // PER_WORD
    block = power_of_two(tokens, min(TILINGS), max(TILINGS))
    tiling = tiling or TILINGS[block]
    words = power_of_two(per_row, LANES, tiling.words)
    blocks, programs = -(-tokens // block), -(-out // tiling.rows)
    tiles = -(-per_row // words)
    if splits is None:
        splits = power_of_two(-(-tiling.programs // (blocks * programs)), 1, 16)
    steps = -(-tiles // splits)
    splits = -(-tiles // steps)
    sums = backend.call(
        _tensor_core_kernel,
        *nf4.as_stack(*weight),
        _reordered(_padded(x, (blocks * block, tiles * words * PER_WORD)), words),
        out=jax.ShapeDtypeStruct((splits, tokens, out), x.dtype if splits == 1 else jnp.float32),
        grid=(programs, blocks, splits),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        rows=tiling.rows,
        words=words,
        block=block,
        steps=steps,
        format=format,
    )
    return sums[0] if splits == 1 else jnp.sum(sums, axis=0).astype(x.dtype)


def _padded(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """With zeros up to `shape`."""
    return jnp.pad(x, [(0, size - have) for size, have in zip(shape, x.shape, strict=True)])


def _tensor_core_kernel(*refs: Any, rows: int, words: int, block: int, steps: int, format: Format) -> None:
    stack, x_ref, out_ref = nf4.Stack(*refs[:-2]), refs[-2], refs[-1]
    layer, row, split = stack.layer[0], backend.program_id(0) * rows, backend.program_id(2)
    token = backend.program_id(1) * block
    _, tokens, out = out_ref.shape
    tiles = x_ref.shape[1] // (words * PER_WORD)
    stop = steps if tiles % steps == 0 else jnp.minimum(steps, tiles - split * steps)
    values = table(stack, layer, (rows, words))

    def step(i: jax.Array, sums: jax.Array) -> jax.Array:
        word = (split * steps + i) * words
        fetched = fetch(stack, Tile(layer, row, word, rows, words), format)
        scales = word_scales(stack, layer, fetched)
        decoded = [(look_up(values, fetched.codes, j) * scales).astype(x_ref.dtype) for j in range(PER_WORD)]
        x = backend.load(x_ref.at[backend.ds(token, block), backend.ds(word * PER_WORD, words * PER_WORD)])
        return sums + backend.dot(_operand(decoded), x, trans_y=True)

    sums = jax.lax.fori_loop(0, stop, step, jnp.zeros((rows, block), jnp.float32))
    mask = _inside((block, rows), (token, tokens), (row, out))
    where = split, backend.ds(token, block), backend.ds(row, rows)
    backend.store(out_ref.at[where], sums.T.astype(out_ref.dtype), mask=mask)


# The order of columns. Of a tile's: lane (of the four of a row), its word, and which of the word's eight codes in bits
# j2, j1, j0. Of the product's: word, j2 | j1, lane, j0, where the bar stands before every 16 columns.


def _operand(decoded: list[jax.Array]) -> jax.Array:
    """What was decoded of every word's j-th code, [rows, words] each -> [rows, 8 words] in the product's order."""
    rows, words = decoded[0].shape
    while len(decoded) > 1:  # what is joined first alternates fastest in j
        decoded = [jnp.stack(pair, axis=-1) for pair in zip(decoded[::2], decoded[1::2], strict=True)]
    by_bits = decoded[0].reshape(rows, LANES, words // LANES, 2, 2, 2)  # j0, j1, j2
    return by_bits.transpose(0, 2, 5, 4, 1, 3).reshape(rows, words * PER_WORD)


def _reordered(x: jax.Array, words: int) -> jax.Array:
    """x [M, in], in a multiple of 8 words, in the product's order."""
    by_bits = x.reshape(x.shape[0], -1, LANES, words // LANES, 2, 2, 2)  # j2, j1, j0
    return by_bits.transpose(0, 1, 3, 4, 5, 2, 6).reshape(x.shape)


def _inside(shape: tuple[int, int], *ends: tuple[jax.Array, int]) -> jax.Array:
    """Which elements of a tile are in the array, given its first index and the array's end along each axis."""
    first, second = (
        start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end for axis, (start, end) in enumerate(ends)
    )
    return first & second


def _dequantize_refuses(platform: str, *args: Any, **kwargs: Any) -> str | None:
    return backend.refuses_platform(platform)


def _pallas_refuses(platform: str, x: jax.Array, codes: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    return backend.refuses_platform(platform) or nf4_kernels.refuses(x, codes, *args, **kwargs)


def _rank(platform: str, x: jax.Array, codes: jax.Array, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    tokens = math.prod(x.shape[:-1])
    if platform != "gpu":
        return (Choice("xla", "the kernel is for GPUs"),)
    few = tokens <= MATVEC_TOKENS or (tokens <= MAX_TOKENS and x.dtype != jnp.float32)
    # With 64 to 128 tokens a small weight leaves the tensor-core kernel too few programs.
    if few and (tokens <= MAX_TOKENS // 2 or codes.shape[-2] >= LARGE_WEIGHT):
        why = "it reads each code once: on an H100 4.6 times as fast as decoding first at 1 token, 1.1 at 128"
        return (Choice("pallas", why),)
    return (Choice("dequantize", f"{tokens} tokens of {x.dtype} are worth a decoded weight and a plain matmul"),)


def _case(name: str, tokens: int, shape: tuple[int, int], *, layers: int | None = None) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        w = normal(rng, shape if layers is None else (layers, *shape), jnp.float32, shape[1] ** -0.5)
        arrays = jax.jit(nf4.quantize if layers is None else jax.vmap(nf4.quantize))(w)._asdict()
        arrays["layer"] = None if layers is None else jnp.int32(layers - 1)
        return {"x": normal(rng, (tokens, shape[1]), dtype)} | arrays

    return Case(name, make, reduction=max(shape), differentiable=("x",))


NF4_MATMUL = register(
    Op(
        name="nf4_matmul",
        replaces="decoding a weight to multiply few tokens",
        saves="writing and reading the decoded weight",
        implementations={
            "xla": Implementation(_implementation(_reference, decode="xla")),
            "dequantize": Implementation(_implementation(_decode_and_multiply), refuses=_dequantize_refuses),
            "pallas": Implementation(_implementation(_pallas), refuses=_pallas_refuses),
        },
        rank=_rank,
        cases=(
            _case("one token, layer of a stack", 1, (16, 128), layers=2),
            _case("tensor cores, ragged everywhere", 17, (70, 328)),
            _case("tensor cores, a last program with less to do", 5, (24, 2688)),
            _case("blocks across rows, tokens of a matvec", 3, (10, 200)),
        ),
    )
)
