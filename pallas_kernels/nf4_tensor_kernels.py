"""Kernels of linears over NF4 weights that share up to 128 tokens, on tensor cores: y_i = x W_i^T + l_i B_i^T + bias_i.

W goes into the product from where it was decoded. Of each row a lane loads four words, so it has 32 columns that follow
each other, while of every 16 columns of an operand lane t of a row's four holds 2t, 2t + 1, 2t + 8 and 2t + 9 (PTX ISA,
mma.m16n8k16). But a sum has no order: W's columns are numbered so that each lane already holds its own, and x's columns
are put into the same order before. Rows are numbered likewise: a warp loads eight, the next warp the next eight, while
of an operand a warp has sixteen. Through shared memory it would take 1.1 to 1.6 times as long.

Both factors are float16, with powers of two kept apart so that nothing overflows. A map's 16 values are then two bytes
each, which permutations of bytes look up four at a time (8 tokens, 4096 -> 2 x 14336 on an H100: 37 us instead of 47
with float32 values that lanes hand each other). A decoded weight has 11 bits where bfloat16 has 8: map value, absmax
and their product are rounded by 2^-11 of each at most, in all less than the 2^-8 of `nf4.dequantize(dtype=bfloat16)`.

    W' = W 2^k     2^k brings the mean of a weight's absmax near 2^-8. None is larger than the number of blocks times
                   the mean, so up to 2^24 blocks none overflows
    x' = x 2^-m    for each token and tile of columns, which brings the largest to 2^14; bfloat16 has 8 bits, so what
                   is 2^-31 of it or more stays exact

A first launch makes x' in order and multiplies x by every A_i, each program a few columns of it; then one makes all
y_i, sums in float32. What shares the columns in either is added up after, where l_i = scale_i x A_i^T is rounded to x's
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
    power_of_two,
    word_scales,
)

MAX_TOKENS = 128
LANES = 4  # that share a row of an operand
WARP_ROWS = 32 // LANES
# Columns of B that are multiplied at once. Not as many as a tile has words: loads of one shape share a layout.
RANKS = 32


class Tiling(NamedTuple):
    """How the work is divided: a program decodes [rows, words] at a time, and some of them share the columns.

    `resident` is how many run at a time, by which `_splits` decides how many share.
    """

    rows: int
    words: int
    num_warps: int
    num_stages: int
    resident: int


# By the tokens of a block, of a dozen each on an H100.
TILINGS: dict[int, Tiling] = {
    **dict.fromkeys((8, 16), Tiling(64, 16, 4, 3, 1056)),
    **dict.fromkeys((32, 64, 128), Tiling(64, 16, 4, 3, 396)),
}
START = 4  # what beginning and ending a program costs, in tiles decoded


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
        splits = _splits(blocks * first[-1], tiles, tiling.resident)
    steps = -(-tiles // splits)
    splits = -(-tiles // steps)
    ordered, low = _prepared(x, parts, scales, _Blocks(block, blocks, words, tiles))
    parts = tuple(part._replace(lora_A=None, stack=_with_mean(part.stack)) for part in parts)
    inputs = Inputs(ordered, low, parts)
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


def _splits(programs: int, tiles: int, resident: int) -> int:
    """How many share the columns, so that all rounds of programs take the least time."""

    def time(splits: int) -> int:
        return -(-programs * splits // resident) * (-(-tiles // splits) + START)

    return min((1, 2, 4, 8, 16), key=time)


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


# Decoding to float16.


def _with_mean(stack: nf4.Stack) -> nf4.Stack:
    """The weight with the mean of its absmax as offset, which that of nested absmax is already."""
    if stack.absmax.dtype == jnp.uint8:
        return stack
    mean = jnp.mean(jax.lax.dynamic_index_in_dim(stack.absmax, stack.layer[0], keepdims=False))
    return stack._replace(nested_offset=jnp.full(stack.nested_offset.shape, mean))


def _times_power(stack: nf4.Stack, layer: jax.Array) -> jax.Array:
    """2^k of a layer's weight, float32; an offset of 0, which only zeros have as their mean, gives 1."""
    exponent = _exponent(backend.load(stack.nested_offset.at[layer]), least=0)
    return _power_of_two(jnp.where(exponent == 0, 127, 246 - exponent))


def _exponent(x: jax.Array, least: int) -> jax.Array:
    """The exponent of float32 values, as they store it: 127 means 2^0."""
    return jnp.maximum(jax.lax.bitcast_convert_type(x, jnp.int32) >> 23 & 255, least)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """The inverse of `_exponent`, for 1 to 254."""
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


class _Planes(NamedTuple):
    """16 float16 values as bytes, four to an int32: all low bytes, and all high ones."""

    low: list[jax.Array]
    high: list[jax.Array]


def _planes(stack: nf4.Stack, layer: jax.Array, tile: tuple[int, int]) -> _Planes:
    """A layer's map from codes to values, for tiles of words."""
    values = [backend.load(stack.quant_map.at[layer, jnp.int32(i)]).astype(jnp.float16) for i in range(16)]
    bits = [jax.lax.bitcast_convert_type(value, jnp.int16).astype(jnp.int32) for value in values]

    def plane(shift: int) -> list[jax.Array]:
        found = [bits[i] >> shift & 255 | (bits[i + 1] >> shift & 255) << 8 for i in range(0, 16, 2)]
        return [jnp.full(tile, low | high << 16, jnp.int32) for low, high in zip(found[::2], found[1::2], strict=True)]

    return _Planes(plane(0), plane(8))


def _decoded(planes: _Planes, words: jax.Array, scales: jax.Array) -> list[jax.Array]:
    """float16 of words' shape for each of their eight codes: its value times the word's float16 scale."""
    pair_of_scales = backend.packed(scales, scales)
    # Three bits of a code select among eight bytes, the fourth which eight: as a byte's sign it becomes a mask.
    index, above = words & 0x77777777, words << 4
    found = []
    for half, fourth_bits in enumerate((0x9D8C, 0xBFAE)):
        selectors = jax.lax.shift_right_logical(index, jnp.full_like(index, 16 * half))
        upper = backend.permute_bytes(words, above, jnp.full_like(words, fourth_bits))
        low, high = (_chosen(plane, selectors, upper) for plane in planes)
        for order in (0x4051, 0x6273):  # a byte's codes, its high one first, each of a low and a high byte
            pair = backend.permute_bytes(low, high, jnp.full_like(words, order))
            found += backend.unpacked(backend.multiply_pairs(pair, pair_of_scales))
    return found


def _chosen(plane: list[jax.Array], selectors: jax.Array, upper: jax.Array) -> jax.Array:
    """The bytes of four codes."""
    first, second = (backend.permute_bytes(plane[i], plane[i + 1], selectors) for i in (0, 2))
    return first ^ ((first ^ second) & upper)


# The low-rank products, and the order of x.


class _Blocks(NamedTuple):
    """x in blocks of tokens and tiles of words."""

    block: int
    blocks: int
    words: int
    tiles: int


class _Ordered(NamedTuple):
    """x' in order [tokens, columns], in whole blocks and tiles, and each tile's 2^m [tiles, tokens]."""

    values: Any
    powers: Any


def _prepared(
    x: jax.Array, parts: Sequence[Linear], scales: Sequence[Any], blocks: _Blocks
) -> tuple[_Ordered, jax.Array | None]:
    """x' and every l_i, side by side [tokens, sum of ranks], in x's dtype; None where there is no adapter."""
    adapted = [(part, scale) for part, scale in zip(parts, scales, strict=True) if part.lora_A is not None]
    tokens = blocks.blocks * blocks.block
    ranks = [part.lora_A.shape[1] for part, _ in adapted]
    outs = [
        jax.ShapeDtypeStruct((tokens, blocks.tiles * blocks.words * PER_WORD), jnp.float16),
        jax.ShapeDtypeStruct((blocks.tiles, tokens), jnp.float32),
    ]
    if adapted:
        outs.append(jax.ShapeDtypeStruct((blocks.tiles, tokens, sum(ranks)), jnp.float32))
    values, powers, *low = backend.call(
        _prepare_kernel,
        x,
        *(part.lora_layer for part, _ in adapted[:1]),
        *(part.lora_A for part, _ in adapted),
        out=tuple(outs),
        grid=(blocks.tiles, blocks.blocks),
        block=blocks.block,
        words=blocks.words,
    )
    ordered = _Ordered(values, powers)
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
    _store_ordered(ordered_ref, tile, where, x.astype(jnp.float32))
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


def _store_ordered(ref: _Ordered, tile: jax.Array, where: tuple[Any, Any], x: jax.Array) -> None:
    exponent = _exponent(jnp.max(jnp.abs(x), axis=1), least=15)
    shrink = jnp.broadcast_to(_power_of_two(268 - exponent)[:, None], x.shape)
    backend.store(ref.values.at[where], _in_order((x * shrink).astype(jnp.float16)))
    backend.store(ref.powers.at[tile, where[0]], _power_of_two(exponent - 14))


def _prepare_refs(refs: Sequence[Any]) -> tuple[list[Any], _Ordered, Any]:
    """(layer and factors, if any; x in order; the low-rank products, if any)."""
    if len(refs) == len(_Ordered._fields):
        return [None], _Ordered(*refs), None
    return list(refs[:-3]), _Ordered(*refs[-3:-1]), refs[-1]


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
    stack: nf4.Stack, x: _Ordered, row: jax.Array, token: jax.Array, split: jax.Array, plan: _Plan
) -> jax.Array:
    """float32 [rows, block], rows in the product's order."""
    rows, words, steps = plan.rows, plan.words, plan.steps
    layer, depth, tokens = stack.layer[0], words * PER_WORD, backend.ds(token, plan.block)
    planes, times_power = _planes(stack, layer, (rows, words)), _times_power(stack, layer)
    tiles = x.values.shape[1] // depth
    stop = steps if tiles % steps == 0 else jnp.minimum(steps, tiles - split * steps)

    def step(i: jax.Array, sums: jax.Array) -> jax.Array:
        tile = split * steps + i
        fetched = fetch(stack, Tile(layer, row, tile * words, rows, words), plan.format)
        scales = (word_scales(stack, layer, fetched) * times_power).astype(jnp.float16)
        weight = _operand(_decoded(planes, fetched.codes, scales), plan.warps)
        product = backend.dot(weight, backend.load(x.values.at[tokens, backend.ds(tile * depth, depth)]), trans_y=True)
        powers = backend.load(x.powers.at[tile, tokens])
        return backend.fma(product, jnp.broadcast_to(powers[None], product.shape), sums)

    return jax.lax.fori_loop(0, stop, step, jnp.zeros((rows, plan.block), jnp.float32)) / times_power


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
