"""Low-rank products of an input of which some values are dropped (LoRA's dropout), without a copy of that input.

    l_i = x_i A_i^T        x_i = x * kept_i / (1 - p)        x [T, K], A_i [r, K], kept_i [T, K] of zeros and ones

for several adapters of one x, each with a mask of its own. With d_i the cotangent of l_i:

    dA_i = d_i^T x_i       dx = sum over i of kept_i * (d_i A_i) / (1 - p)

A mask is never stored: it is a function of a seed and of where a value stands, and each of the three products makes
it again as it reads or writes x. The function is Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3") with 13 rounds, the fewest of which no statistical flaw is known. x's columns are four quarters of
Q = ceil(K / 4); the 64 bits of the counter (t, k) give 16 to each of the columns k, Q + k, 2 Q + k and 3 Q + k of row
t, and a value is dropped where its bits, as a number, are below round(2^16 p). The scale is that of this probability,
so that means are exact. JAX's own generator takes 20 rounds for each value, and XLA writes x_i to memory before it is
multiplied.

Products are of two arrays in x's dtype, summed in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32

QUARTERS = 4  # values that share a counter
ROUNDS = 13
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_PROGRAMS = 528  # four for each of an H100's multiprocessors: sums are split into as many parts as that takes


def dropout_low_rank(
    x: jax.Array, A: jax.Array, seeds: jax.Array, *, rate: float, implementation: str | None = None
) -> jax.Array:
    """Returns the products of x with each A_i, float32 [n, T, r], x's values dropped for each by itself.

    Args:
      x: [T, K].
      A: [n, r, K].
      seeds: uint32 [n, 2], as `seed` gives them.
      rate: probability p of dropping a value, in [0, 1); rounded to a multiple of 2^-16.
      implementation: "xla", "pallas" or None.

    Raises:
      ValueError: shapes do not fit, or the rate is out of range.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels import dropout
      >>> seeds = dropout.seed(jax.random.key(0))[None]
      >>> dropout.dropout_low_rank(jnp.ones((2, 8)), jnp.ones((1, 1, 8)), seeds, rate=0.5).tolist()
      [[[10.0], [12.0]]]
      >>> dropout.keep_mask(seeds[0], (2, 8), 0.5).sum(axis=1).tolist()
      [5, 6]
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_low_rank: rate must be in [0, 1), not {rate}")
    if x.ndim != 2 or A.ndim != 3 or A.shape[2] != x.shape[1] or seeds.shape != (A.shape[0], 2):
        shapes = f"x {x.shape}, A {A.shape} and seeds {seeds.shape}"
        raise ValueError(f"dropout_low_rank: {shapes} are not [T, K], [n, r, K] and [n, 2]")
    return DROPOUT_LOW_RANK(x, A, seeds, rate=rate, implementation=implementation)


def seed(key: jax.Array) -> jax.Array:
    """uint32 [2] of a PRNG key: its own words, which are a hash already where a key was split or folded."""
    return jax.random.key_data(key).reshape(-1)[-2:]


def keep_mask(seed: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """bool [T, K]: which values of an input of this shape are kept; `seed` uint32 [2]."""
    rows, columns = shape
    quarter = _cdiv(columns, QUARTERS)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, quarter), axis) for axis in (0, 1))
    return jnp.concatenate(_kept(_as_int32(seed), row, column, rate), axis=1)[:, :columns]


def kept_share(rate: float) -> float:
    """1 - p, of the probability that `rate` is rounded to."""
    return 1 - _threshold(rate) / 2**16


class Products(NamedTuple):
    """One implementation's three products, for rules that are written by hand; A and d have x's dtype.

    Attributes:
      low_rank: (x [T, K], A [n, r, K], seeds, rate) -> l, float32 [n, T, r].
      d_A: (x [T, K], d [n, T, r], seeds, rate) -> float32 [n, r, K].
      d_x: (d [n, T, r], A [n, r, K], seeds, rate) -> [T, K] in d's dtype.
    """

    low_rank: Callable[..., jax.Array]
    d_A: Callable[..., jax.Array]
    d_x: Callable[..., jax.Array]


def dropout_products(x: Any, A: Any, seeds: Any, *, rate: float) -> Products:
    """Those that `implementation=None` runs for these arguments, arrays or their shapes."""
    return _PRODUCTS[DROPOUT_LOW_RANK.choose(x, A, seeds, rate=rate).implementation]


# --- the mask, in kernels and outside of them ---------------------------------------------------------------------


def threefry_2x32(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array], rounds: int = ROUNDS
) -> tuple[jax.Array, jax.Array]:
    """Two random words of each counter; all words int32, scalars or arrays of one shape."""
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(rounds):
        x = x + y
        y = x ^ _rotated(y, _ROTATIONS[i // 4 % 2][i % 4])
        if i % 4 == 3:
            group = i // 4 + 1
            x, y = x + keys[group % 3], y + keys[(group + 1) % 3] + group
    return x, y


def _rotated(word: jax.Array, places: int) -> jax.Array:
    return word << places | _shifted(word, 32 - places)


def _shifted(word: jax.Array, places: int) -> jax.Array:
    return jax.lax.shift_right_logical(word, jnp.full_like(word, places))


def _kept(seed: Any, row: jax.Array, column: jax.Array, rate: float) -> list[jax.Array]:
    """bool arrays of the counters' shape: whether the value of each quarter is kept; `seed` has two int32."""
    words = threefry_2x32((seed[0], seed[1]), (row, column))
    halves = (half for word in words for half in (word & 0xFFFF, _shifted(word, 16)))
    return [half >= _threshold(rate) for half in halves]


def _threshold(rate: float) -> int:
    return round(rate * 2**16)


def _as_int32(seeds: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(seeds, jnp.int32)


def _cdiv(n: int, block: int) -> int:
    return -(-n // block)


# --- the rule, for every implementation of the three products -----------------------------------------------------


def _run(products: Products, x: jax.Array, A: jax.Array, seeds: jax.Array, *, rate: float) -> jax.Array:
    return _dropped(products, rate, x, A, seeds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dropped(products, rate, x, A, seeds):
    return products.low_rank(x, A.astype(x.dtype), seeds, rate)


def _dropped_fwd(products, rate, x, A, seeds):
    return _dropped(products, rate, x, A, seeds), (x, A, seeds)


def _dropped_bwd(products, rate, residuals, g):
    x, A, seeds = residuals
    d = g.astype(x.dtype)
    d_A = products.d_A(x, d, seeds, rate).astype(A.dtype)
    return products.d_x(d, A.astype(x.dtype), seeds, rate), d_A, None


_dropped.defvjp(_dropped_fwd, _dropped_bwd)


# --- XLA ----------------------------------------------------------------------------------------------------------


def _each(x: jax.Array, seeds: jax.Array, rate: float) -> list[jax.Array]:
    """x without what each adapter drops, not yet scaled."""
    return [jnp.where(keep_mask(one, x.shape, rate), x, 0) for one in seeds]


def _xla_low_rank(x: jax.Array, A: jax.Array, seeds: jax.Array, rate: float) -> jax.Array:
    products = [einsum_float32("tk,rk->tr", *pair) for pair in zip(_each(x, seeds, rate), A, strict=True)]
    return jnp.stack(products) / kept_share(rate)


def _xla_d_A(x: jax.Array, d: jax.Array, seeds: jax.Array, rate: float) -> jax.Array:
    products = [einsum_float32("tk,tr->rk", *pair) for pair in zip(_each(x, seeds, rate), d, strict=True)]
    return jnp.stack(products) / kept_share(rate)


def _xla_d_x(d: jax.Array, A: jax.Array, seeds: jax.Array, rate: float) -> jax.Array:
    shape = (d.shape[1], A.shape[2])
    products = [einsum_float32("tr,rk->tk", *pair) for pair in zip(d, A, strict=True)]
    kept = [jnp.where(keep_mask(one, shape, rate), p, 0) for one, p in zip(seeds, products, strict=True)]
    return (functools.reduce(jnp.add, kept) / kept_share(rate)).astype(d.dtype)


# --- Pallas -------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """What a program computes at a time: rows, columns of each quarter, ranks."""

    rows: int
    columns: int
    ranks: int


def _tile(tile: tuple[int, int] | None, rank: int) -> _Tile:
    rows, columns = tile or (64, 32)
    return _Tile(rows, columns, min(max(16, 1 << (rank - 1).bit_length()), 64))


def _filled(x: jax.Array, axis: int, block: int) -> jax.Array:
    """x with zeros behind its ranks, for whole tiles of them."""
    more = -x.shape[axis] % block
    return jnp.pad(x, [(0, more * (i == axis)) for i in range(x.ndim)]) if more else x


def _parts(grid: tuple[int, int], steps: int) -> tuple[int, int]:
    """(parts that a sum over `steps` is cut into, steps of each but maybe the last); none where there is nothing."""
    if 0 in (*grid, steps):
        return 0, 0
    each = _cdiv(steps, min(steps, _cdiv(_PROGRAMS, grid[0] * grid[1])))
    return _cdiv(steps, each), each


def _pallas_low_rank(
    x: jax.Array, A: jax.Array, seeds: jax.Array, rate: float, *, tile: tuple[int, int] | None = None, **launch: int
) -> jax.Array:
    """Private arguments are for tuning: `tile`, rows and columns; `launch`, warps and stages."""
    (rows, columns), rank = x.shape, A.shape[1]
    sizes = _tile(tile, rank)
    A = _filled(A, 1, sizes.ranks)
    grid = (A.shape[0] * A.shape[1] // sizes.ranks, _cdiv(rows, sizes.rows))
    parts, steps = _parts(grid, _cdiv(_cdiv(columns, QUARTERS), sizes.columns))
    out = jax.ShapeDtypeStruct((parts, A.shape[0], rows, A.shape[1]), jnp.float32)
    arguments = (_as_int32(seeds), x, A)
    settings: dict[str, Any] = {"grid": (*grid, parts), "tile": sizes, "rate": rate, "steps": steps, **launch}
    sums = backend.call(_dropout_low_rank_kernel, *arguments, out=out, **settings)
    return jnp.sum(sums, axis=0)[:, :, :rank] / kept_share(rate)


def _pallas_d_A(
    x: jax.Array, d: jax.Array, seeds: jax.Array, rate: float, *, tile: tuple[int, int] | None = None, **launch: int
) -> jax.Array:
    (rows, columns), rank = x.shape, d.shape[2]
    sizes = _tile(tile, rank)
    d = _filled(d, 2, sizes.ranks)
    grid = (d.shape[0] * d.shape[2] // sizes.ranks, _cdiv(_cdiv(columns, QUARTERS), sizes.columns))
    parts, steps = _parts(grid, _cdiv(rows, sizes.rows))
    out = jax.ShapeDtypeStruct((parts, d.shape[0], d.shape[2], columns), jnp.float32)
    arguments = (_as_int32(seeds), x, d)
    settings: dict[str, Any] = {"grid": (*grid, parts), "tile": sizes, "rate": rate, "steps": steps, **launch}
    sums = backend.call(_dropout_d_A_kernel, *arguments, out=out, **settings)
    return jnp.sum(sums, axis=0)[:, :rank] / kept_share(rate)


def _pallas_d_x(
    d: jax.Array, A: jax.Array, seeds: jax.Array, rate: float, *, tile: tuple[int, int] | None = None, **launch: int
) -> jax.Array:
    rows, columns = d.shape[1], A.shape[2]
    sizes = _tile(tile, A.shape[1])
    grid = (_cdiv(_cdiv(columns, QUARTERS), sizes.columns), _cdiv(rows, sizes.rows))
    arguments = (_as_int32(seeds), _filled(d, 2, sizes.ranks), _filled(A, 1, sizes.ranks))
    out = jax.ShapeDtypeStruct((rows, columns), d.dtype)
    settings: dict[str, Any] = {"grid": grid, "tile": sizes, "rate": rate, **launch}
    return backend.call(_dropout_d_x_kernel, *arguments, out=out, **settings)


def _quarters(columns: int, step: jax.Array, block: int) -> tuple[jax.Array, list[jax.Array], list[jax.Array | None]]:
    """(counters [block], columns and masks [1, block] of each quarter) of a tile; a mask is None where it would hold.

    Beyond the end of a quarter lie columns of the next.
    """
    quarter, counter = _cdiv(columns, QUARTERS), step * block + jnp.arange(block)
    column = [i * quarter + counter for i in range(QUARTERS)]
    inside = []
    for i in range(QUARTERS):
        bounds = [(counter, quarter)] * (quarter % block != 0) + [(column[i], columns)] * ((i + 1) * quarter > columns)
        masks = [(index < bound)[None, :] for index, bound in bounds]
        inside.append(functools.reduce(jnp.logical_and, masks) if masks else None)
    return counter, column, inside


def _load(ref: Any, inside: jax.Array | None) -> jax.Array:
    if inside is None:
        return backend.load(ref)
    return backend.load(ref, mask=jnp.broadcast_to(inside, ref.shape), other=0)


def _masked(x: jax.Array, keep: jax.Array) -> jax.Array:
    """x where it is kept, and else 0: by its bits, for Triton cannot bring a tile of booleans into another layout."""
    bits = jnp.int16 if x.dtype.itemsize == 2 else jnp.int32
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) & -keep.astype(bits), x.dtype)


def _kept_in_tile(seeds_ref: Any, adapter: Any, row: jax.Array, counter: jax.Array, rate: float) -> list[jax.Array]:
    shape = (len(row), len(counter))
    rows, counters = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(counter[None, :], shape)
    return _kept((seeds_ref[adapter, 0], seeds_ref[adapter, 1]), rows, counters, rate)


def _adapter_and_ranks(size: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Of a program whose first id counts the tiles of ranks of all adapters."""
    tiles, program = size // block, backend.program_id(0)
    return program // tiles, program % tiles * block + jnp.arange(block)


def _steps(all_steps: int, steps: int) -> tuple[jax.Array, jax.Array]:
    """(first, stop) of a program whose third id is the part of a sum."""
    first = backend.program_id(2) * steps
    return first, jnp.minimum(first + steps, all_steps)


def _dropout_low_rank_kernel(seeds_ref, x_ref, A_ref, out_ref, *, tile: _Tile, rate: float, steps: int) -> None:
    """One tile [rows, ranks] of an adapter's product, over a part of the columns.

    Rows beyond the edge are read from the last one: they are not stored.
    """
    num_rows, columns = x_ref.shape
    adapter, ranks = _adapter_and_ranks(A_ref.shape[1], tile.ranks)
    row = backend.program_id(1) * tile.rows + jnp.arange(tile.rows)
    row_read = jnp.minimum(row, num_rows - 1)

    def add(step: jax.Array, sum: jax.Array) -> jax.Array:
        counter, column, inside = _quarters(columns, step, tile.columns)
        kept = _kept_in_tile(seeds_ref, adapter, row, counter, rate)
        for i in range(QUARTERS):
            x = _load(x_ref.at[row_read[:, None], column[i][None, :]], inside[i])
            A = _load(A_ref.at[adapter, ranks[:, None], column[i][None, :]], inside[i])
            sum = sum + backend.dot(_masked(x, kept[i]), A, trans_y=True)
        return sum

    first, stop = _steps(_cdiv(_cdiv(columns, QUARTERS), tile.columns), steps)
    sum = jax.lax.fori_loop(first, stop, add, jnp.zeros((tile.rows, tile.ranks), jnp.float32))
    stored = jnp.broadcast_to((row < num_rows)[:, None], sum.shape)
    backend.store(out_ref.at[backend.program_id(2), adapter, row[:, None], ranks[None, :]], sum, mask=stored)


def _dropout_d_A_kernel(seeds_ref, x_ref, d_ref, out_ref, *, tile: _Tile, rate: float, steps: int) -> None:
    """One tile [ranks, columns of each quarter] of an adapter's gradient, over a part of the rows."""
    num_rows, columns = x_ref.shape
    adapter, ranks = _adapter_and_ranks(d_ref.shape[2], tile.ranks)
    counter, column, inside = _quarters(columns, backend.program_id(1), tile.columns)

    def add(step: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row = step * tile.rows + jnp.arange(tile.rows)
        row_read = jnp.minimum(row, num_rows - 1)
        d = backend.load(d_ref.at[adapter, row_read[:, None], ranks[None, :]])
        d = jnp.where((row < num_rows)[:, None], d, jnp.zeros_like(d))
        kept = _kept_in_tile(seeds_ref, adapter, row, counter, rate)
        xs = [_load(x_ref.at[row_read[:, None], column[i][None, :]], inside[i]) for i in range(QUARTERS)]
        dropped = [_masked(x, keep) for keep, x in zip(kept, xs, strict=True)]
        return tuple(sum + backend.dot(d, x, trans_x=True) for sum, x in zip(sums, dropped, strict=True))

    sums = (jnp.zeros((tile.ranks, tile.columns), jnp.float32),) * QUARTERS
    first, stop = _steps(_cdiv(num_rows, tile.rows), steps)
    sums = jax.lax.fori_loop(first, stop, add, sums)
    for i, (sum, mask) in enumerate(zip(sums, inside, strict=True)):
        mask = None if mask is None else jnp.broadcast_to(mask, sum.shape)
        backend.store(out_ref.at[backend.program_id(2), adapter, ranks[:, None], column[i][None, :]], sum, mask=mask)


def _dropout_d_x_kernel(seeds_ref, d_ref, A_ref, out_ref, *, tile: _Tile, rate: float) -> None:
    """One tile [rows, columns of each quarter] of x's gradient."""
    (num_rows, columns), (adapters, rank, _) = out_ref.shape, A_ref.shape
    counter, column, inside = _quarters(columns, backend.program_id(0), tile.columns)
    row = backend.program_id(1) * tile.rows + jnp.arange(tile.rows)
    row_read = jnp.minimum(row, num_rows - 1)

    def product(adapter: int, i: int) -> jax.Array:
        """d A of an adapter, in quarter i."""
        sum = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        for first in range(0, rank, tile.ranks):
            ranks = first + jnp.arange(tile.ranks)
            d = backend.load(d_ref.at[adapter, row_read[:, None], ranks[None, :]])
            A = _load(A_ref.at[adapter, ranks[:, None], column[i][None, :]], inside[i])
            sum = sum + backend.dot(d, A)
        return sum

    sums = [jnp.zeros((tile.rows, tile.columns), jnp.float32)] * QUARTERS
    for adapter in range(adapters):
        kept = _kept_in_tile(seeds_ref, adapter, row, counter, rate)
        sums = [sums[i] + jnp.where(kept[i], product(adapter, i), 0) for i in range(QUARTERS)]
    for i, sum in enumerate(sums):
        stored = (row < num_rows)[:, None]
        stored = jnp.broadcast_to(stored if inside[i] is None else stored & inside[i], sum.shape)
        d_x = (sum * np.float32(1 / kept_share(rate))).astype(out_ref.dtype)
        backend.store(out_ref.at[row[:, None], column[i][None, :]], d_x, mask=stored)


# --- the op -------------------------------------------------------------------------------------------------------


def _rank(platform: str, x: jax.Array, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        return (Choice("pallas", "XLA writes what is left of x for each adapter to memory, and multiplies then"),)
    return (Choice("xla", "the kernels are for GPUs"),)


def _case(name: str, rows: int, columns: int, adapters: int, rank: int, rate: float) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {
            "x": normal(rng, (rows, columns), dtype),
            "A": normal(rng, (adapters, rank, columns), jnp.float32, scale=columns**-0.5),
            "seeds": jnp.asarray(rng.integers(0, 2**32, (adapters, 2), np.uint32)),
            "rate": rate,
        }

    return Case(name, make, reduction=max(rows, columns), differentiable=("x", "A"))


_PRODUCTS = {
    "xla": Products(_xla_low_rank, _xla_d_A, _xla_d_x),
    "pallas": Products(_pallas_low_rank, _pallas_d_A, _pallas_d_x),
}

DROPOUT_LOW_RANK = register(
    Op(
        name="dropout_low_rank",
        replaces="a mask, a dropped copy of x and a product for each adapter",
        saves="masks and copies of x; random numbers four values at a time",
        implementations={
            "xla": Implementation(functools.partial(_run, _PRODUCTS["xla"])),
            "pallas": Implementation(
                functools.partial(_run, _PRODUCTS["pallas"]), refuses=backend.refuses_dtype_or_platform
            ),
        },
        rank=_rank,
        cases=(
            # Several tiles of rows and columns and of ranks, none of them full; quarters that are not whole.
            _case("uneven quarters", 69, 139, 2, 3, rate=0.25),
            _case("many ranks", 33, 64, 1, 70, rate=0.1),
            _case("three columns", 1, 3, 3, 1, rate=0.5),
        ),
        roundings=4,
    )
)
