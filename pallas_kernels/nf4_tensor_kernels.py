"""Kernels of linears over NF4 weights that share up to 128 tokens, on tensor cores: y_i = x W_i^T + l_i B_i^T + bias_i.

W is decoded on the way, rounded to x's dtype as `nf4.dequantize(dtype=x.dtype)` does, and goes into the product from
where it was decoded. Of each row a lane loads four words, so it has 32 columns that follow each other, while of every
16 columns of an operand lane t of a row's four holds 2t, 2t + 1, 2t + 8 and 2t + 9 (PTX ISA, mma.m16n8k16). But a sum
has no order: W's columns are numbered so that each lane already holds its own, and x's columns are put into the same
order before. Rows are numbered likewise: a warp loads eight, the next warp the next eight, while of an operand a warp
has sixteen. Through shared memory it would take 1.1 to 1.6 times as long.

A first launch puts x in order and multiplies it by every A_i, each program a few columns of it; then one makes all y_i,
sums in float32. What shares the columns in either is added up after, where l_i = scale_i x A_i^T is rounded to x's
dtype, and y_i once. Adapters are read from the stack of all layers, as weights are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend, nf4
from pallas_kernels.nf4_kernels import (
    PER_WORD,
    Format,
    Inputs,
    Linear,
    Tile,
    fetch,
    look_up,
    power_of_two,
    table,
    word_scales,
)

MAX_TOKENS = 128
LANES = 4  # that share a row of an operand
WARP_ROWS = 32 // LANES
# Columns of B that are multiplied at once. Not as many as a tile has words: loads of one shape share a layout.
RANKS = 32


class Tiling(NamedTuple):
    """How the work is divided: a program decodes [rows, words] at a time; so many of them share the columns that there
    are at least `programs`, if that is possible."""

    rows: int
    words: int
    num_warps: int
    num_stages: int
    programs: int


TILINGS = {  # by the tokens of a block; of two dozen each, on an H100
    16: Tiling(32, 16, 1, 3, 1024),
    32: Tiling(64, 16, 4, 3, 264),
    64: Tiling(64, 16, 4, 2, 264),
    128: Tiling(64, 16, 4, 3, 264),
}


def linears(
    x: jax.Array,
    parts: Sequence[Linear],
    scales: Sequence[Any],
    format: Format,
    *,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> tuple[jax.Array, ...]:
    """x [M, in] -> y_i [M, out_i] of each linear, in x's dtype.

    Args:
      parts: arrays of each linear.
      scales: of each linear's low-rank product, numbers or scalars.
      splits: how many programs share the columns.
    """
    tokens, columns = x.shape
    block = power_of_two(tokens, min(TILINGS), max(TILINGS))
    tiling = tiling or TILINGS[block]
    words = power_of_two(columns // PER_WORD, LANES, tiling.words)
    outs = [part.stack.codes.shape[1] for part in parts]
    first = tuple(itertools.accumulate((-(-out // tiling.rows) for out in outs), initial=0))
    blocks, tiles = -(-tokens // block), -(-columns // (words * PER_WORD))
    if splits is None:
        splits = power_of_two(-(-tiling.programs // (blocks * first[-1])), 1, 16)
    steps = -(-tiles // splits)
    splits = -(-tiles // steps)
    ordered, low = _prepared(x, parts, scales, _Blocks(block, blocks, words, tiles))
    inputs = Inputs(ordered, low, tuple(part._replace(lora_A=None) for part in parts))
    leaves, tree = jax.tree.flatten(inputs)
    ranks = tuple(0 if part.lora_B is None else part.lora_B.shape[2] for part in parts)
    dtype = x.dtype if splits == 1 else jnp.float32
    sums = backend.call(
        _tensor_core_kernel,
        *leaves,
        out=tuple(jax.ShapeDtypeStruct((splits, tokens, out), dtype) for out in outs),
        grid=(first[-1], blocks, splits),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        plan=_Plan(first, ranks, tiling.rows, tiling.num_warps, words, block, steps, format, tree),
    )
    return tuple(one[0] if splits == 1 else jnp.sum(one, axis=0).astype(x.dtype) for one in sums)


class _Plan(NamedTuple):
    """What is static about a launch."""

    first: tuple[int, ...]  # program of each linear, and of what would come after the last
    ranks: tuple[int, ...]
    rows: int
    warps: int
    words: int
    block: int
    steps: int
    format: Format
    tree: Any  # of the kernel's inputs


# The order of columns. A tile's: lane (of the four of a row), its word, and which of the word's eight codes in bits j2,
# j1, j0. The product's: word, j2 | j1, lane, j0, where the bar stands before every 16 columns.


def _in_order(x: jax.Array) -> jax.Array:
    """x [M, columns of a tile] in the product's order."""
    by_bits = x.reshape(x.shape[0], LANES, x.shape[1] // (LANES * PER_WORD), 2, 2, 2)  # j2, j1, j0
    return by_bits.transpose(0, 2, 3, 4, 1, 5).reshape(x.shape)


def _operand(decoded: list[jax.Array], warps: int) -> jax.Array:
    """What was decoded of every word's j-th code, [rows, words] each -> [rows, 8 words] in the product's order."""
    rows, words = decoded[0].shape
    while len(decoded) > 1:  # what is joined first alternates fastest in j
        decoded = [jnp.stack(pair, axis=-1) for pair in zip(decoded[::2], decoded[1::2], strict=True)]
    by_bits = decoded[0].reshape(rows, LANES, words // LANES, 2, 2, 2)  # j0, j1, j2
    return _by_warp(by_bits.transpose(0, 2, 5, 4, 1, 3).reshape(rows, words * PER_WORD), warps)


def _by_warp(x: jax.Array, warps: int) -> jax.Array:
    """x [rows, ...] with its rows in the product's order: the eights of the first warp, then those of the next."""
    return x.reshape(-1, warps, WARP_ROWS, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _in_rows(sums: jax.Array, warps: int) -> jax.Array:
    """The product [rows, ...] with its rows in their own order."""
    return sums.reshape(warps, -1, WARP_ROWS, *sums.shape[1:]).swapaxes(0, 1).reshape(sums.shape)


# The low-rank products, and the order of x.


class _Blocks(NamedTuple):
    """x in blocks of tokens and tiles of words."""

    block: int
    blocks: int
    words: int
    tiles: int


def _prepared(
    x: jax.Array, parts: Sequence[Linear], scales: Sequence[Any], blocks: _Blocks
) -> tuple[jax.Array, jax.Array | None]:
    """x in order, in whole blocks and tiles, and every l_i, side by side [tokens, sum of ranks], in x's dtype; None
    where there is no adapter."""
    adapted = [(part, scale) for part, scale in zip(parts, scales, strict=True) if part.lora_A is not None]
    tokens = blocks.blocks * blocks.block
    ranks = [part.lora_A.shape[1] for part, _ in adapted]
    outs = [jax.ShapeDtypeStruct((tokens, blocks.tiles * blocks.words * PER_WORD), x.dtype)]
    if adapted:
        outs.append(jax.ShapeDtypeStruct((blocks.tiles, tokens, sum(ranks)), jnp.float32))
    ordered, *low = backend.call(
        _prepare_kernel,
        x,
        *(part.lora_layer for part, _ in adapted[:1]),
        *(part.lora_A for part, _ in adapted),
        out=tuple(outs),
        grid=(blocks.tiles, blocks.blocks),
        block=blocks.block,
        words=blocks.words,
    )
    if not adapted:
        return ordered, None
    each = zip(adapted, ranks, strict=True)
    scale = jnp.concatenate([jnp.full(rank, scale, jnp.float32) for (_, scale), rank in each])
    return ordered, (jnp.sum(low[0], axis=0) * scale[None]).astype(x.dtype)


def _prepare_kernel(x_ref: Any, *refs: Any, block: int, words: int) -> None:
    """A program puts one tile of x in order, and multiplies it by that part of every A."""
    (layer, *factors), ordered_ref, low_ref = _prepare_refs(refs)
    tokens, columns = x_ref.shape
    tile, token, depth = backend.program_id(0), backend.program_id(1) * block, words * PER_WORD
    column = tile * depth
    where = backend.ds(token, block), backend.ds(column, depth)
    mask = _inside((block, depth), (token, tokens), (column, columns))
    x = backend.load(x_ref.at[where], mask=mask, other=0)
    backend.store(ordered_ref.at[where], _in_order(x))
    start = 0
    for A_ref in factors:
        rank = A_ref.shape[1]
        width = power_of_two(rank, 16, max(16, 2 * rank))
        zero = jnp.int32(0)
        A_mask = _inside((width, depth), (zero, rank), (column, columns))
        A = backend.load(A_ref.at[layer[0], backend.ds(zero, width), where[1]], mask=A_mask, other=0)
        low_mask = _inside((block, width), (token, tokens), (zero, rank))
        low = backend.dot(x, A.astype(x.dtype), trans_y=True)
        backend.store(low_ref.at[tile, where[0], backend.ds(jnp.int32(start), width)], low, mask=low_mask)
        start += rank


def _prepare_refs(refs: Sequence[Any]) -> tuple[list[Any], Any, Any]:
    """(layer and factors, if any; x in order; the low-rank products, if any)."""
    if len(refs) == 1:
        return [None], refs[0], None
    return list(refs[:-2]), refs[-2], refs[-1]


def _inside(shape: tuple[int, int], *ends: tuple[jax.Array, int]) -> jax.Array:
    """Which elements of a tile are in the array, given its first index and the array's end along each axis."""
    first, second = (
        start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end for axis, (start, end) in enumerate(ends)
    )
    return first & second


# The products.


def _tensor_core_kernel(*refs: Any, plan: _Plan) -> None:
    count = plan.tree.num_leaves
    inputs, outs = jax.tree.unflatten(plan.tree, refs[:count]), refs[count:]
    program, token, split = backend.program_id(0), backend.program_id(1) * plan.block, backend.program_id(2)
    for i, (first, stop) in enumerate(itertools.pairwise(plan.first)):
        run = functools.partial(_rows, inputs, i, (program - first) * plan.rows, token, split, outs[i], plan)
        if len(outs) == 1:
            run()
        else:
            backend.when((program >= first) & (program < stop))(run)


def _rows(
    inputs: Inputs, i: int, row: jax.Array, token: jax.Array, split: jax.Array, out_ref: Any, plan: _Plan
) -> None:
    """Linear i's result in the rows from `row` on, for the block of tokens from `token` on, over the columns of one of
    the programs that share them."""
    _, tokens, out = out_ref.shape
    sums = _base_sums(inputs.parts[i].stack, inputs.x, row, token, split, plan)
    sums = _in_rows(sums + _low_rank_and_bias(inputs, i, row, token, split, plan), plan.warps)
    mask = _inside((plan.block, plan.rows), (token, tokens), (row, out))
    where = split, backend.ds(token, plan.block), backend.ds(row, plan.rows)
    backend.store(out_ref.at[where], sums.T.astype(out_ref.dtype), mask=mask)


def _base_sums(
    stack: nf4.Stack, x_ref: Any, row: jax.Array, token: jax.Array, split: jax.Array, plan: _Plan
) -> jax.Array:
    """float32 [rows, block], rows in the product's order."""
    rows, words, steps = plan.rows, plan.words, plan.steps
    layer, depth = stack.layer[0], words * PER_WORD
    values = table(stack, layer, (rows, words))
    tiles = x_ref.shape[1] // depth
    stop = steps if tiles % steps == 0 else jnp.minimum(steps, tiles - split * steps)

    def step(i: jax.Array, sums: jax.Array) -> jax.Array:
        word = (split * steps + i) * words
        fetched = fetch(stack, Tile(layer, row, word, rows, words), plan.format)
        scales = word_scales(stack, layer, fetched)
        decoded = [(look_up(values, fetched.codes, j) * scales).astype(x_ref.dtype) for j in range(PER_WORD)]
        x = backend.load(x_ref.at[backend.ds(token, plan.block), backend.ds(word * PER_WORD, depth)])
        return sums + backend.dot(_operand(decoded, plan.warps), x, trans_y=True)

    return jax.lax.fori_loop(0, stop, step, jnp.zeros((rows, plan.block), jnp.float32))


def _low_rank_and_bias(
    inputs: Inputs, i: int, row: jax.Array, token: jax.Array, split: jax.Array, plan: _Plan
) -> jax.Array:
    """float32 [rows, block] as `_base_sums`; of the programs that share the columns, the first adds them."""
    part, start, rank = inputs.parts[i], sum(plan.ranks[:i]), plan.ranks[i]
    out = part.stack.codes.shape[1]
    total = jnp.zeros((plan.rows, plan.block), jnp.float32)
    for column in range(0, rank, RANKS):
        of_rank = jnp.int32(column), rank
        B_mask = _inside((plan.rows, RANKS), (row, out), of_rank) & (split == 0)
        at = part.lora_layer[0], backend.ds(row, plan.rows), backend.ds(jnp.int32(column), RANKS)
        B = backend.load(part.lora_B.at[at], mask=B_mask, other=0)
        low_mask = _inside((plan.block, RANKS), (token, inputs.low.shape[0]), of_rank)
        at = backend.ds(token, plan.block), backend.ds(jnp.int32(start + column), RANKS)
        low = backend.load(inputs.low.at[at], mask=low_mask, other=0)
        total += backend.dot(_by_warp(B.astype(low.dtype), plan.warps), low, trans_y=True)
    if part.bias is not None:
        mask = (row + jax.lax.iota(jnp.int32, plan.rows) < out) & (split == 0)
        bias = backend.load(part.bias.at[backend.ds(row, plan.rows)], mask=mask, other=0).astype(jnp.float32)
        total += jnp.broadcast_to(_by_warp(bias, plan.warps)[:, None], total.shape)
    return total
