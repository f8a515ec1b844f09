"""The linear layer of a mixture of experts: rows sorted by expert, each group of rows times its expert's weight.

Row i belongs to the expert e whose group it is in; W_e [out, in], A_e [r, in], B_e [out, r]:

    h[i] = scale x[i] A_e^T        y[i] = x[i] W_e^T + h[i] B_e^T            rows beyond the last group: y[i] = 0

The adapter stays split: W + scale B A is never formed. Gradients, with g the cotangent of y:

    dh[i] = scale g[i] B_e         dx[i] = g[i] W_e + dh[i] A_e
    dA_e  = sum_i dh[i]^T x[i]     dB_e  = sum_i g[i]^T h[i]        dW_e = sum_i g[i]^T x[i]

with sums over the rows of e's group. So there are two products, each of which comes in two directions:

    rows times experts    [M, K] x [E, N, K] (or [E, K, N]) -> [M, N]     y, h, dh, dx
    sums over groups      [M, P] x [M, Q] -> [E, P, Q]                     dA, dB, dW

Products are of arrays in x's dtype, summed in float32; h and dh are rounded to x's dtype, after they were scaled. So
the low-rank term is one more product into the same sum.

Kernel: XLA cuts the groups into tiles of rows, none over a group's edge; there are at most M // block + E + 1 of them
(the last group are the rows that belong to nobody, which get zeros), so the grid is static and programs without a tile
do nothing. Programs run through 8 tiles of rows for one tile of columns, then for the next, so that the tiles of x and
those of an expert's weight are both still in the L2 cache when they are read again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register

SWIZZLE = 8  # tiles of rows that share a tile of columns
LOW_RANK_BLOCK = 32  # ranks whose factors a program holds in registers while it sums over K


def grouped_matmul(
    x: jax.Array,
    weight: Any,
    group_sizes: jax.Array,
    lora_A: jax.Array | None = None,
    lora_B: jax.Array | None = None,
    *,
    scale: float | jax.Array = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """Returns [M, out] in x's dtype: each row of x times its expert's weight, with an optional adapter per expert.

    Example: three rows of the first expert, none of the second, one of the third, and one of nobody.

      >>> import jax.numpy as jnp
      >>> from pallas_kernels.grouped_matmul import grouped_matmul
      >>> x = jnp.ones((5, 4))
      >>> weight = jnp.ones((3, 2, 4)) * jnp.array([1.0, 2.0, 3.0])[:, None, None]
      >>> y = grouped_matmul(x, weight, jnp.array([3, 0, 1]))
      >>> y[:, 0].tolist()
      [4.0, 4.0, 4.0, 12.0, 0.0]
      >>> lora_A, lora_B = jnp.ones((3, 1, 4)), jnp.ones((3, 2, 1))
      >>> grouped_matmul(x, weight, jnp.array([3, 0, 1]), lora_A, lora_B, scale=0.5)[:, 0].tolist()
      [6.0, 6.0, 6.0, 14.0, 0.0]

    Args:
      x: [M, in], sorted by expert.
      weight: array [E, out, in] of any float dtype, or a pytree with a method `dequantize(dtype) -> [E, out, in]`,
        which is taken to be frozen and decoded again in the backward pass. One that also has `stack` [L, E, out, in]
        and `layer`, an int32 scalar, is read out of the stack by the kernel, if the stack is of x's dtype.
      group_sizes: int32 [E], how many rows belong to each expert; at most M in all. Rows beyond them give zeros.
      lora_A, lora_B: [E, r, in] and [E, out, r], or both None. Their gradients come in their own dtype.
      scale: lora_alpha / r; a constant, it gets no gradient.
      implementation: "xla", "pallas" or None.

    Raises:
      ValueError: shapes do not fit, or only one of lora_A and lora_B is given.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    if (lora_A is None) != (lora_B is None):
        raise ValueError("grouped_matmul: lora_A and lora_B come together, or not at all")
    if x.ndim != 2 or group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: needs x [M, in], not {x.shape}, and integer group_sizes [E]")
    experts, size_in = group_sizes.shape[0], x.shape[1]
    if not hasattr(weight, "dequantize") and (weight.ndim != 3 or weight.shape[::2] != (experts, size_in)):
        raise ValueError(f"grouped_matmul: weight {weight.shape} does not fit [{experts}, out, {size_in}]")
    if lora_A is not None and (lora_A.ndim != 3 or lora_A.shape[::2] != (experts, size_in)):
        raise ValueError(f"grouped_matmul: lora_A {lora_A.shape} does not fit [{experts}, r, {size_in}]")
    return GROUPED_MATMUL(x, weight, group_sizes, lora_A, lora_B, scale=scale, implementation=implementation)


class _Experts(NamedTuple):
    """Weights [X, out, in] of which those from `first` on are the experts'; None: from the first."""

    values: jax.Array
    first: jax.Array | None = None

    def decoded(self, count: int) -> jax.Array:
        """The weights [E, out, in] of `count` experts."""
        if self.first is None:
            return self.values
        return jax.lax.dynamic_slice_in_dim(self.values, self.first, count)


def _experts(weight: Any, dtype: Any, count: int) -> _Experts:
    """The weights in `dtype`; where they lie in a stack of layers of that dtype, nothing is copied."""
    if getattr(getattr(weight, "stack", None), "dtype", None) == dtype:
        return _Experts(weight.stack.reshape(-1, *weight.stack.shape[2:]), count * weight.layer.astype(jnp.int32))
    return _Experts(weight.dequantize(dtype) if hasattr(weight, "dequantize") else weight.astype(dtype))


# --- the rule, for every implementation of the two products -------------------------------------------------------


def _run(
    products: Any,
    x: jax.Array,
    weight: Any,
    group_sizes: jax.Array,
    lora_A: jax.Array | None = None,
    lora_B: jax.Array | None = None,
    *,
    scale: float | jax.Array = 1.0,
) -> jax.Array:
    lora = None if lora_A is None or lora_B is None else (lora_A, lora_B)
    # A constant by contract; as an operand it may still be traced.
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    return _grouped(products, x, weight, group_sizes.astype(jnp.int32), lora, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(products, x, weight, group_sizes, lora, scale):
    return _forward(products, x, weight, group_sizes, lora, scale)[0]


def _forward(products, x, weight, group_sizes, lora, scale):
    """(y, h): h is None without an adapter."""
    groups = products(x, group_sizes)
    experts = _experts(weight, x.dtype, group_sizes.shape[0])
    if lora is None:
        return groups.times(x, experts, transposed=True), None
    lora_A, lora_B = (factor.astype(x.dtype) for factor in lora)
    h = groups.times(x, _Experts(lora_A), scale=scale, transposed=True)
    return groups.times(x, experts, (h, lora_B), transposed=True), h


def _fwd(products, x, weight, group_sizes, lora, scale):
    weight_trains = any(leaf.perturbed for leaf in jax.tree.leaves(weight)) and not hasattr(weight, "dequantize")
    x, weight, group_sizes, lora, scale = jax.tree.map(lambda leaf: leaf.value, (x, weight, group_sizes, lora, scale))
    y, h = _forward(products, x, weight, group_sizes, lora, scale)
    kept = x if weight_trains or lora is not None else None
    return y, (kept, weight, group_sizes, lora, scale, h, weight_trains)


def _bwd(products, residuals, g):
    x, weight, group_sizes, lora, scale, h, weight_trains = residuals
    groups = products(g, group_sizes)
    experts = _experts(weight, g.dtype, group_sizes.shape[0])
    d_weight = groups.sums(g, x, weight.dtype) if weight_trains else None
    if lora is None:
        return groups.times(g, experts, transposed=False), d_weight, None, None, None
    lora_A, lora_B = (factor.astype(g.dtype) for factor in lora)
    d_h = groups.times(g, _Experts(lora_B), scale=scale, transposed=False)
    d_x = groups.times(g, experts, (d_h, lora_A), transposed=False)
    d_lora = groups.sums(d_h, x, lora[0].dtype), groups.sums(g, h, lora[1].dtype)
    return d_x, d_weight, None, d_lora, None


_grouped.defvjp(_fwd, _bwd, symbolic_zeros=True)


# --- XLA ----------------------------------------------------------------------------------------------------------


class _Ragged:
    """The two products by `jax.lax.ragged_dot_general`."""

    def __init__(self, rows: jax.Array, group_sizes: jax.Array) -> None:
        self.group_sizes = group_sizes

    def times(self, rows, experts, low_rank=None, scale=None, *, transposed):
        weights = experts.decoded(self.group_sizes.shape[0])
        y = self._product(rows, weights, ((1,), (2 if transposed else 1,)), grouped=(0,))
        if low_rank is not None:
            h, factor = low_rank
            y = y + self._product(h, factor, ((1,), (2 if transposed else 1,)), grouped=(0,))
        if scale is not None:
            y = scale * y
        inside = jnp.arange(rows.shape[0]) < jnp.sum(self.group_sizes)
        return jnp.where(inside[:, None], y, 0).astype(rows.dtype)

    def sums(self, left, right, dtype):
        return self._product(left, right, ((0,), (0,)), grouped=()).astype(dtype)

    def _product(self, left: jax.Array, right: jax.Array, contracted: Any, grouped: tuple[int, ...]) -> jax.Array:
        numbers = jax.lax.RaggedDotDimensionNumbers((contracted, ((), ())), (0,), grouped)

        # One by one under vmap: JAX has no rule for a ragged product with some of its operands batched.
        @jax.custom_batching.sequential_vmap
        def product(left: jax.Array, right: jax.Array, group_sizes: jax.Array) -> jax.Array:
            precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
            return jax.lax.ragged_dot_general(
                left, right, group_sizes, numbers, precision=precision, preferred_element_type=jnp.float32
            )

        return product(left, right, self.group_sizes)


# --- Pallas -------------------------------------------------------------------------------------------------------


class _Tiled:
    """The two products by kernels.

    Private arguments of `times` and `sums` are for tuning: sizes of a tile, warps and stages.
    """

    def __init__(self, rows: jax.Array, group_sizes: jax.Array) -> None:
        self.group_sizes = group_sizes

    def times(
        self, rows, experts, low_rank=None, scale=None, *, transposed, block=None, num_warps=None, num_stages=None
    ):
        (num_rows, size_k), size, num_experts = rows.shape, experts.values.shape[1:], self.group_sizes.shape[0]
        size_n = size[0] if transposed else size[1]
        out = jax.ShapeDtypeStruct((num_rows, size_n), rows.dtype)
        if 0 in (num_rows, size_k, size_n, num_experts):
            return jnp.zeros(out.shape, out.dtype)
        block_m, block_n, block_k = block or _times_block(num_rows // num_experts, size_n, size_k, rows.dtype)
        tiles = _row_tiles(self.group_sizes, num_rows, block_m, experts.first)
        return backend.call(
            _grouped_matmul_kernel,
            tiles,
            rows,
            experts.values,
            *(() if low_rank is None else _padded_rank(low_rank, transposed)),
            *(() if scale is None else (scale.reshape(1),)),
            out=out,
            grid=(tiles.shape[1] * _cdiv(size_n, block_n),),
            num_warps=num_warps or (8 if block_m * block_n >= 128 * 128 else 4),
            num_stages=num_stages or _times_stages(),
            block_m=block_m,
            block_n=block_n,
            block_k=block_k,
            num_experts=num_experts,
            transposed=transposed,
            has_low_rank=low_rank is not None,
        )

    def sums(self, left, right, dtype, *, block=None, num_warps=4, num_stages=3):
        (num_rows, size_p), size_q, num_experts = left.shape, right.shape[1], self.group_sizes.shape[0]
        out = jax.ShapeDtypeStruct((num_experts, size_p, size_q), dtype)
        if 0 in (num_rows, size_p, size_q, num_experts):
            return jnp.zeros(out.shape, out.dtype)
        block_p, block_q, block_rows = block or _sums_block(size_p, size_q, left.dtype)
        return backend.call(
            _grouped_sums_kernel,
            _starts(self.group_sizes),
            left,
            right,
            out=out,
            grid=(_cdiv(size_p, block_p), _cdiv(size_q, block_q), num_experts),
            num_warps=num_warps,
            num_stages=num_stages,
            block_p=block_p,
            block_q=block_q,
            block_rows=block_rows,
        )


def _cdiv(n: int, block: int) -> int:
    return -(-n // block)


def _power_of_two(n: int, most: int) -> int:
    """The smallest power of two that holds n, from 16 (what a tile of `dot` needs) to `most`."""
    return min(max(16, 1 << (n - 1).bit_length()), most)


def _times_block(rows_per_expert: int, size_n: int, size_k: int, dtype: Any) -> tuple[int, int, int]:
    """(rows, columns, reduction) of a tile."""
    wide = 2 if jnp.dtype(dtype).itemsize == 2 else 1
    block_m = 128 if wide == 2 and rows_per_expert >= 64 else _power_of_two(max(rows_per_expert, 1), 64)
    return block_m, _power_of_two(size_n, 128 * wide), _power_of_two(size_k, 32 * wide)


def _times_stages() -> int:
    """Tiles in flight: 4 of 48 KiB fit in a multiprocessor's shared memory from Hopper on, 3 in Ampere's. With 4 a
    product of 16,384 rows with 32 experts of 2880 x 2880 takes 0.595 ms on an H100 instead of 0.629."""
    return 4 if backend.platform() == "gpu" and backend.compute_capability() >= backend.HOPPER else 3


def _sums_block(size_p: int, size_q: int, dtype: Any) -> tuple[int, int, int]:
    """(left columns, right columns, rows) of a tile."""
    most = 128 if jnp.dtype(dtype).itemsize == 2 else 64
    return _power_of_two(size_p, most), _power_of_two(size_q, most), most // 2


def _starts(group_sizes: jax.Array) -> jax.Array:
    """int32 [E + 1]: the first row of each group, and of what belongs to nobody."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes, dtype=jnp.int32)])


def _row_tiles(group_sizes: jax.Array, num_rows: int, block: int, first: jax.Array | None = None) -> jax.Array:
    """int32 [4, tiles]: expert, first row, row to stop at, and where the expert's weight is.

    Expert E gets zeros, and a tile without rows is idle.
    """
    starts = _starts(group_sizes)
    stops = jnp.concatenate([starts[1:], jnp.full(1, num_rows, jnp.int32)])
    last_tiles = jnp.cumsum((stops - starts + block - 1) // block, dtype=jnp.int32)
    first_tiles = jnp.concatenate([jnp.zeros(1, jnp.int32), last_tiles[:-1]])
    most = num_rows // block + group_sizes.shape[0] + 1
    tile = jnp.arange(_cdiv(most, SWIZZLE) * SWIZZLE, dtype=jnp.int32)
    group = jnp.sum(last_tiles[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    known = jnp.minimum(group, group_sizes.shape[0])
    start = starts[known] + (tile - first_tiles[known]) * block
    weight = jnp.minimum(known, group_sizes.shape[0] - 1) + (0 if first is None else first)
    return jnp.stack([known, start, jnp.where(group == known, stops[known], start), weight])


def _padded_rank(low_rank: tuple[jax.Array, jax.Array], transposed: bool) -> tuple[jax.Array, jax.Array]:
    """h [M, r] and a factor [E, N, r] (or [E, r, N]) with the rank filled up with zeros to what a tile holds."""
    h, factor = low_rank
    more = _power_of_two(h.shape[1], 1 << 30) - h.shape[1]
    rank_axis = 2 if transposed else 1
    return jnp.pad(h, ((0, 0), (0, more))), jnp.pad(factor, [(0, more * (axis == rank_axis)) for axis in range(3)])


def _grouped_matmul_kernel(
    tiles_ref,
    x_ref,
    w_ref,
    *refs,
    block_m: int,
    block_n: int,
    block_k: int,
    num_experts: int,
    transposed: bool,
    has_low_rank: bool,
) -> None:
    """One tile [block_m, block_n] of the result.

    Rows beyond the edge are read from the last one instead of masked: they are not stored. Along an array's last axis
    only masks will do, because Triton loads several elements at once where it sees that their indices are consecutive.
    """
    low_rank_refs, scale_refs, out_ref = refs[: 2 * has_low_rank], refs[2 * has_low_rank : -1], refs[-1]
    (num_rows, size_k), size_n = x_ref.shape, out_ref.shape[1]
    tile, n_tile = _swizzled(backend.program_id(0), _cdiv(size_n, block_n))
    expert, start, stop, weight = (tiles_ref[row, tile] for row in range(4))
    row, n = start + jnp.arange(block_m), n_tile * block_n + jnp.arange(block_n)
    row_read, expert_read = jnp.minimum(row, num_rows - 1), jnp.minimum(expert, num_experts - 1)
    inside_n = None if size_n % block_n == 0 else (n < size_n)[None, :]

    def operands(left_ref: Any, right_ref: Any, which: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """left_ref [M, K] at the tile's rows and k, right_ref [X, N, K] or [X, K, N] at `which`, its columns and k."""
        size = left_ref.shape[1]
        ragged = size % len(k) != 0
        inside = (k < size)[None, :] if ragged else None
        left = _load(left_ref.at[row_read[:, None], k[None, :]], inside)
        if transposed:
            return left, _load(right_ref.at[which, jnp.minimum(n, size_n - 1)[:, None], k[None, :]], inside)
        # A k beyond the edge meets zeros on the left, so its row only has to exist.
        k_read = jnp.minimum(k, size - 1) if ragged else k
        return left, _load(right_ref.at[which, k_read[:, None], n[None, :]], inside_n)

    def add(left_ref: Any, right_ref: Any, which: jax.Array, block: int, step: jax.Array, sum: jax.Array) -> jax.Array:
        left, right = operands(left_ref, right_ref, which, step * block + jnp.arange(block))
        return sum + backend.dot(left, right, trans_y=transposed)

    block_rank = min(low_rank_refs[0].shape[1], LOW_RANK_BLOCK) if has_low_rank else 0
    # Loaded before the loop, so that they arrive during it.
    ranks = jnp.arange(block_rank)
    low_rank = operands(low_rank_refs[0], low_rank_refs[1], expert_read, ranks) if has_low_rank else None
    steps = jnp.where((expert < num_experts) & (start < stop), jnp.int32(_cdiv(size_k, block_k)), jnp.int32(0))
    sum = jnp.zeros((block_m, block_n), jnp.float32)
    sum = jax.lax.fori_loop(jnp.int32(0), steps, functools.partial(add, x_ref, w_ref, weight, block_k), sum)
    if low_rank is not None:
        sum = sum + backend.dot(*low_rank, trans_y=transposed)
        more = jnp.int32(low_rank_refs[0].shape[1] // block_rank)
        sum = jax.lax.fori_loop(
            jnp.int32(1), more, functools.partial(add, *low_rank_refs, expert_read, block_rank), sum
        )
        sum = jnp.where(expert < num_experts, sum, 0)
    if scale_refs:
        sum = scale_refs[0][0] * sum
    stored = (row < stop)[:, None] & (n < size_n)[None, :]
    backend.store(out_ref.at[row[:, None], n[None, :]], sum.astype(out_ref.dtype), mask=stored)


def _swizzled(program: jax.Array, n_tiles: int) -> tuple[jax.Array, jax.Array]:
    """(tile of rows, tile of columns): SWIZZLE tiles of rows for a tile of columns, then the next columns."""
    band, within = program // (SWIZZLE * n_tiles), program % (SWIZZLE * n_tiles)
    return band * SWIZZLE + within % SWIZZLE, within // SWIZZLE


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return backend.load(ref)
    return backend.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)


def _grouped_sums_kernel(
    starts_ref, left_ref, right_ref, out_ref, *, block_p: int, block_q: int, block_rows: int
) -> None:
    """One tile [block_p, block_q] of sum_i left[i]^T right[i] over the rows of one group."""
    p_tile, q_tile, expert = (backend.program_id(axis) for axis in range(3))
    p, q = p_tile * block_p + jnp.arange(block_p), q_tile * block_q + jnp.arange(block_q)
    start, stop = starts_ref[expert], starts_ref[expert + 1]

    def rows_of(ref: Any, row: jax.Array, column: jax.Array) -> jax.Array:
        inside = (row < stop)[:, None]
        if ref.shape[1] % len(column):
            inside = inside & (column < ref.shape[1])[None, :]
        return _load(ref.at[row[:, None], column[None, :]], inside)

    def add(step: jax.Array, sum: jax.Array) -> jax.Array:
        row = start + step * block_rows + jnp.arange(block_rows)
        return sum + backend.dot(rows_of(left_ref, row, p), rows_of(right_ref, row, q), trans_x=True)

    steps = (stop - start + block_rows - 1) // block_rows
    sum = jax.lax.fori_loop(jnp.int32(0), steps, add, jnp.zeros((block_p, block_q), jnp.float32))
    stored = (p < out_ref.shape[1])[:, None] & (q < out_ref.shape[2])[None, :]
    backend.store(out_ref.at[expert, p[:, None], q[None, :]], sum.astype(out_ref.dtype), mask=stored)


# --- the op -------------------------------------------------------------------------------------------------------


def _rank(platform: str, x: jax.Array, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        why = "XLA multiplies every row by every expert's weight and masks the rest; the kernel only by its own"
        return (Choice("pallas", why),)
    return (Choice("xla", "the kernel is for GPUs"),)


def _case(name: str, group_sizes: tuple[int, ...], rows: int, sizes: tuple[int, int, int], adapter: bool) -> Case:
    size_in, size_out, rank = sizes
    experts = len(group_sizes)

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {
            "x": normal(rng, (rows, size_in), dtype),
            "weight": normal(rng, (experts, size_out, size_in), dtype, scale=size_in**-0.5),
            "group_sizes": jnp.array(group_sizes, jnp.int32),
            "lora_A": normal(rng, (experts, rank, size_in), jnp.float32, scale=size_in**-0.5) if adapter else None,
            "lora_B": normal(rng, (experts, size_out, rank), jnp.float32, scale=rank**-0.5) if adapter else None,
            "scale": 0.75,
        }

    differentiable = ("x", "weight", "lora_A", "lora_B") if adapter else ("x", "weight")
    return Case(name, make, reduction=max(rows, size_in, size_out), differentiable=differentiable)


GROUPED_MATMUL = register(
    Op(
        name="grouped_matmul",
        replaces="a masked product with every expert, or a loop over experts",
        saves="products with experts that a row did not choose, [E, M, in] copies, W + BA",
        implementations={
            "xla": Implementation(functools.partial(_run, _Ragged)),
            "pallas": Implementation(functools.partial(_run, _Tiled), refuses=backend.refuses_dtype_or_platform),
        },
        rank=_rank,
        cases=(
            # Group edges inside a block of rows, an empty group, rows of nobody, no size a multiple of a block.
            _case("empty group, rows of nobody", (5, 0, 9), 17, (33, 49, 4), adapter=True),
            _case("one expert has all rows", (0, 40), 40, (40, 17, 2), adapter=False),
        ),
        roundings=4,
    )
)
