"""Kernels of linears over NF4 weights that share a few tokens: y_i = x W_i^T + l_i B_i^T + bias_i.

A program makes a few rows of one W_i, and takes each block's absmax out of the sum over the block:

    y[m, o] = sum over blocks b of absmax[o, b] * (sum over i in b of map[codes[o, i]] * x[m, i])

A sum has no order, so an int32 word of eight codes is never unpacked: the kernel reads x as [8, M, in / 8], where x[j]
meets every word's j-th code. Sums are float32, rounded to x's dtype once. All linears of a call are one launch: small
ones would leave most of a GPU idle.

The low-rank products l_i = scale_i x A_i^T are a launch of their own, because every program needs all of them; a few
more programs of it bring x into that order. Adapters are read from the stack of all layers, as weights are: a slice
would be a copy for each of a layer's fourteen factors.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend, nf4

PER_WORD = 2 * nf4.BYTES_PER_WORD  # codes in an int32 word
LOW_RANK_CHUNK = 4096  # columns of a low-rank product that one program adds up


class Format(NamedTuple):
    """What is static about an NF4 weight."""

    block_size: int = nf4.BLOCK_SIZE
    nested_block_size: int = nf4.NESTED_BLOCK_SIZE


def refuses(
    x: jax.Array, codes: jax.Array, *arrays: Any, block_size: int = nf4.BLOCK_SIZE, **others: Any
) -> str | None:
    """Why the kernels cannot multiply x by a weight (arguments of `nf4.dequantize`), or None where they can."""
    if codes.shape[-1] % nf4.BYTES_PER_WORD:
        return f"{codes.shape[-1] * 2} columns are not whole words of {PER_WORD} codes"
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it multiplies float32, bfloat16 and float16, not {x.dtype}"
    most = matvec_tokens(x.dtype)
    if x.dtype == jnp.float32 and math.prod(x.shape[:-1]) > most:
        return f"more than {most} tokens are multiplied in 16 bits, on tensor cores, not in float32"
    return nf4.refuses_words(codes, block_size)


def matvec_tokens(dtype: Any) -> int:
    """How many tokens these kernels take at most. With more of 16 bits tensor cores are faster: of an 8B model, 4 rows
    take 6.1 ms here, where 8 rows take 4.6 there (H100)."""
    return 4 if dtype == jnp.float32 else 2


class Linear(NamedTuple):
    """What a kernel reads of one linear, as arrays or refs; its weight is [out, in].

    Attributes:
      stack: the weight.
      lora_A, lora_B: [L, r, in] and [L, out, r], or both None.
      lora_layer: int32 [1], which of them.
      bias: [out] or None.
    """

    stack: nf4.Stack
    lora_A: Any = None
    lora_B: Any = None
    lora_layer: Any = None
    bias: Any = None


class Tiling(NamedTuple):
    """How the work is divided: a program decodes [rows, words] at a time."""

    rows: int
    words: int
    num_warps: int


FASTEST = Tiling(2, 128, 1)  # of a dozen, on an H200: many small programs hide each other's latency


def linears(
    x: jax.Array,
    parts: Sequence[Linear],
    scales: Sequence[Any],
    format: Format,
    *,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, ...]:
    """x [M, in] -> y_i [M, out_i] of each linear, in x's dtype.

    Args:
      parts: arrays of each linear.
      scales: of each linear's low-rank product, numbers or scalars.
    """
    tokens, columns = x.shape
    tiling = tiling or FASTEST
    tiling = tiling._replace(words=power_of_two(columns // PER_WORD, 16, tiling.words))
    inputs = Inputs(*_prepared(x, parts, scales), tuple(part._replace(lora_A=None) for part in parts))
    plan, leaves = _plan(inputs, format, tiling)
    outs = [part.stack.codes.shape[1] for part in parts]
    return tuple(
        backend.call(
            _matvec_kernel,
            *leaves,
            out=tuple(jax.ShapeDtypeStruct((tokens, out), x.dtype) for out in outs),
            grid=(plan.first[-1] if tokens else 0,),
            num_warps=tiling.num_warps,
            plan=plan,
        )
    )


class _Plan(NamedTuple):
    """What is static about a launch."""

    first: tuple[int, ...]  # program of each linear, and of what would come after the last
    ranks: tuple[int, ...]
    tiling: Tiling
    format: Format
    tree: Any  # of the kernel's inputs


class Inputs(NamedTuple):
    """What a kernel reads: x in its order ([8, M, in / 8]), low [M, sum of ranks] or None, and the linears."""

    x: Any
    low: Any
    parts: tuple[Linear, ...]


def _plan(inputs: Inputs, format: Format, tiling: Tiling) -> tuple[_Plan, list[jax.Array]]:
    programs = (-(-part.stack.codes.shape[1] // tiling.rows) for part in inputs.parts)
    first = tuple(itertools.accumulate(programs, initial=0))
    ranks = tuple(0 if part.lora_B is None else part.lora_B.shape[2] for part in inputs.parts)
    leaves, tree = jax.tree.flatten(inputs)
    return _Plan(first, ranks, tiling, format, tree), leaves


# The low-rank products, and the order of x.


def by_code(x: jax.Array) -> jax.Array:
    """x [M, in] -> [8, M, in / 8]: element j of every word's eight columns."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // PER_WORD, PER_WORD), 2, 0)


def _prepared(x: jax.Array, parts: Sequence[Linear], scales: Sequence[Any]) -> tuple[jax.Array, jax.Array | None]:
    """x by code, and every l_i, side by side [M, sum of ranks], in x's dtype; None where there is no adapter."""
    adapted = [(part, scale) for part, scale in zip(parts, scales, strict=True) if part.lora_A is not None]
    if not adapted:
        return by_code(x), None
    tokens, columns = x.shape
    rank = sum(part.lora_A.shape[1] for part, _ in adapted)
    return backend.call(
        _prepare_kernel,
        x,
        adapted[0][0].lora_layer,
        *(part.lora_A for part, _ in adapted),
        *(jnp.asarray(scale, jnp.float32).reshape(1) for _, scale in adapted),
        out=(
            jax.ShapeDtypeStruct((PER_WORD, tokens, columns // PER_WORD), x.dtype),
            jax.ShapeDtypeStruct((tokens, rank), x.dtype),
        ),
        grid=(rank + PER_WORD if tokens else 0,),
        num_warps=8 if columns > LOW_RANK_CHUNK else 4,
        chunk=power_of_two(columns, 32, LOW_RANK_CHUNK),
    )


def _prepare_kernel(x_ref: Any, layer_ref: Any, *refs: Any, chunk: int) -> None:
    """A program makes one column of the low-rank products, every token times one row of one factor; or, of the last
    eight, what meets every word's j-th code."""
    *inputs, by_code_ref, out_ref = refs
    factors, scales = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
    row, layer = backend.program_id(0), layer_ref[0]
    tokens, columns = x_ref.shape

    def run(A_ref: Any, start: int, scale_ref: Any) -> None:
        sums = [jnp.zeros((chunk,), jnp.float32)] * tokens
        for column in range(0, columns, chunk):
            where = backend.ds(jnp.int32(column), chunk)
            mask = None if column + chunk <= columns else column + jnp.arange(chunk, dtype=jnp.int32) < columns
            other = None if mask is None else 0
            A = backend.load(A_ref.at[layer, row - start, where], mask=mask, other=other).astype(x_ref.dtype)
            for m in range(tokens):
                x = backend.load(x_ref.at[jnp.int32(m), where], mask=mask, other=other).astype(jnp.float32)
                sums[m] += A.astype(jnp.float32) * x
        for m in range(tokens):
            product = jnp.sum(sums[m]) * scale_ref[0]
            backend.store(out_ref.at[jnp.int32(m), row], product.astype(out_ref.dtype))

    start = 0
    for A_ref, scale_ref in zip(factors, scales, strict=True):
        stop = start + A_ref.shape[1]
        backend.when((row >= start) & (row < stop))(functools.partial(run, A_ref, start, scale_ref))
        start = stop
    backend.when(row >= start)(lambda: _reorder(x_ref, by_code_ref, row - start))


def _reorder(x_ref: Any, by_code_ref: Any, j: jax.Array) -> None:
    """Copies every eighth value of x, from the j-th on."""
    _, tokens, per_row = by_code_ref.shape
    chunk = power_of_two(per_row, 16, 1024)
    for m, first in itertools.product(range(tokens), range(0, per_row, chunk)):
        word = first + jax.lax.iota(jnp.int32, chunk)
        mask = None if first + chunk <= per_row else word < per_row
        x = backend.load(x_ref.at[jnp.int32(m), word * PER_WORD + j], mask=mask, other=None if mask is None else 0)
        backend.store(by_code_ref.at[j, jnp.int32(m), backend.ds(jnp.int32(first), chunk)], x, mask=mask)


# Reading a weight.


class Tile(NamedTuple):
    """Which part of a weight a kernel decodes: [rows, words] from `row` and `word` on."""

    layer: jax.Array
    row: jax.Array
    word: jax.Array
    rows: int
    words: int

    def mask(self, out: int, per_row: int) -> jax.Array | None:
        """bool [rows, words], False beyond the weight's end; None where a weight is whole tiles."""
        if out % self.rows == 0 and per_row % self.words == 0:
            return None
        row, word = self.indices(self.words, 1)
        return (row < out) & (word < per_row)

    def indices(self, columns: int, words_a_column: int) -> tuple[jax.Array, jax.Array]:
        """(row, word // words_a_column), both int32 [rows, columns]."""
        shape = self.rows, columns
        row = self.row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return row, self.word // words_a_column + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


class Fetched(NamedTuple):
    """What a kernel has loaded of a tile: codes int32 [rows, words], and absmax as stored, one a block or a word."""

    codes: jax.Array
    absmax: nf4.FetchedAbsmax


def fetch(stack: nf4.Stack, tile: Tile, format: Format) -> Fetched:
    """Begins to load a tile; absmax are one a block where rows and tiles are whole blocks, else one a word."""
    out, per_row = stack.codes.shape[1:]
    mask = tile.mask(out, per_row)
    where = tile.layer, backend.ds(tile.row, tile.rows), backend.ds(tile.word, tile.words)
    codes = backend.load(stack.codes.at[where], mask=mask, other=None if mask is None else 0)
    block_words = format.block_size // PER_WORD
    if mask is not None or tile.words % block_words or per_row % block_words:
        row, word = tile.indices(tile.words, 1)
        block = (row * per_row + word) // block_words
    else:
        row, block = tile.indices(tile.words // block_words, block_words)
        block, mask = row * (per_row // block_words) + block, None
    return Fetched(codes, nf4.fetch_absmax(stack, tile.layer, block, format.nested_block_size, mask))


def word_scales(stack: nf4.Stack, layer: jax.Array, fetched: Fetched) -> jax.Array:
    """float32 [rows, words]: each word's absmax."""
    rows, words = fetched.codes.shape
    scales = nf4.decode_absmax(stack, layer, fetched.absmax)
    blocks = scales.shape[1]
    if blocks == words:
        return scales
    return jnp.broadcast_to(scales[:, :, None], (rows, blocks, words // blocks)).reshape(rows, words)


def table(stack: nf4.Stack, layer: jax.Array, tile: tuple[int, int]) -> Any:
    """A layer's map from codes to values, for `look_up` in tiles [rows, words]."""
    return backend.table_of_16(lambda i: backend.load(stack.quant_map.at[layer, i]), tile)


def look_up(table: Any, codes: jax.Array, j: int) -> jax.Array:
    """float32 of codes' shape: the values of the j-th code of every word."""
    # Bytes ascend in a word, and the first of a byte's two codes is in its high nibble.
    shift = jnp.full(codes.shape, 4 * (j ^ 1), jnp.int32)
    return backend.look_up(table, jax.lax.shift_right_logical(codes, shift))


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within bounds."""
    return min(most, max(least, 1 << max(0, size - 1).bit_length()))


# The products.


def _matvec_kernel(*refs: Any, plan: _Plan) -> None:
    count = plan.tree.num_leaves
    inputs, outs = jax.tree.unflatten(plan.tree, refs[:count]), refs[count:]
    program = backend.program_id(0)
    for i, (first, stop) in enumerate(itertools.pairwise(plan.first)):
        run = functools.partial(_matvec_rows, inputs, i, (program - first) * plan.tiling.rows, outs[i], plan)
        if len(outs) == 1:
            run()
        else:
            backend.when((program >= first) & (program < stop))(run)


def _matvec_rows(inputs: Inputs, i: int, row: jax.Array, out_ref: Any, plan: _Plan) -> None:
    """Linear i's result in the rows from `row` on."""
    rows, (tokens, out) = plan.tiling.rows, out_ref.shape
    mask = None if out % rows == 0 else row + jax.lax.iota(jnp.int32, rows) < out
    for m, total in enumerate(_matvec_sums(inputs.parts[i].stack, inputs.x, row, tokens, plan)):
        y = _matvec_row(jnp.sum(total, axis=1), inputs, i, m, row, plan).astype(out_ref.dtype)
        backend.store(out_ref.at[jnp.int32(m), backend.ds(row, rows)], y, mask=mask)


def _matvec_row(y: jax.Array, inputs: Inputs, i: int, m: int, row: jax.Array, plan: _Plan) -> jax.Array:
    """float32 [rows]: linear i's base product of token m, with low-rank part and bias."""
    part, rank, rows = inputs.parts[i], plan.ranks[i], plan.tiling.rows
    out = part.stack.codes.shape[1]
    if part.lora_B is not None:
        width = power_of_two(rank, 1, rank * 2)
        at_row = row + jax.lax.broadcasted_iota(jnp.int32, (rows, width), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
        mask = (at_row < out) & (column < rank)
        where = part.lora_layer[0], backend.ds(row, rows), backend.ds(0, width)
        B = backend.load(part.lora_B.at[where], mask=mask, other=0)
        start = jnp.int32(sum(plan.ranks[:i]))
        in_rank = jax.lax.iota(jnp.int32, width) < rank
        low = backend.load(inputs.low.at[jnp.int32(m), backend.ds(start, width)], mask=in_rank, other=0)
        low = jnp.broadcast_to(low.astype(jnp.float32)[None, :], (rows, width))
        y += jnp.sum(B.astype(inputs.low.dtype).astype(jnp.float32) * low, axis=1)
    if part.bias is not None:
        mask = row + jax.lax.iota(jnp.int32, rows) < out
        y += backend.load(part.bias.at[backend.ds(row, rows)], mask=mask, other=0).astype(jnp.float32)
    return y


def _matvec_sums(stack: nf4.Stack, x_ref: Any, row: jax.Array, tokens: int, plan: _Plan) -> list[jax.Array]:
    """For each token float32 [rows, words], to be added up over the words."""
    rows, words = plan.tiling.rows, plan.tiling.words
    per_row = stack.codes.shape[2]
    steps = -(-per_row // words)
    layer = stack.layer[0]
    values_of = table(stack, layer, (rows, words))

    def step(word: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        x = [_load_by_code(x_ref, m, word, words, rows) for m in range(tokens)]
        tile = fetch(stack, Tile(layer, row, word, rows, words), plan.format)
        inner = [jnp.zeros((rows, words), jnp.float32)] * tokens
        for j in range(PER_WORD):
            values = look_up(values_of, tile.codes, j)
            inner = [backend.fma(values, x[m][j], inner[m]) for m in range(tokens)]
        scales = word_scales(stack, layer, tile)
        return [backend.fma(scales, one, total) for one, total in zip(inner, sums, strict=True)]

    sums = [jnp.zeros((rows, words), jnp.float32)] * tokens
    if steps == 1:
        return step(jnp.int32(0), sums)
    return jax.lax.fori_loop(0, steps, lambda i, sums: step(i * words, sums), sums)


def _load_by_code(x_ref: Any, m: int, word: jax.Array, words: int, rows: int) -> list[jax.Array]:
    """float32 [rows, words] eight times: what meets every word's j-th code, of token m."""
    per_row = x_ref.shape[2]
    mask = None if per_row % words == 0 else word + jax.lax.iota(jnp.int32, words) < per_row
    where = jnp.int32(m), backend.ds(word, words)
    x = (
        backend.load(x_ref.at[(jnp.int32(j), *where)], mask=mask, other=None if mask is None else 0)
        for j in range(PER_WORD)
    )
    return [jnp.broadcast_to(one.astype(jnp.float32)[None, :], (rows, words)) for one in x]
