"""Kernels of `lora_mlp`: the activation together with every low-rank product that touches an array [T, F].

F is the widest axis of the model, so each pass over [T, F] counts. cuBLAS leaves in memory only the products with the
large weights, gate = x W_G^T, up = x W_U^T and d_h = g W_D, and these kernels add the low-rank parts as they read them
(l, d [T, R]; B_G, B_U, A_D^T [F, R]; R is the rank, filled up with zeros to a power of two):

    forward     h = act(gate + l_G B_G^T) * (up + l_U B_U^T)             h A_D^T
    backward    the same h;    d_h + d_D A_D  ->  d_gate, d_up           d_gate B_G, d_up B_U
                d_gate^T l_G, d_up^T l_U, h^T d_D, the gradients of B_G, B_U and A_D^T

The forward kernel reads two arrays and writes one, the backward kernel reads three and writes d_gate over gate and
d_up over up: what the activation alone would do, and h need not be written. Sums over F or T that span programs are
written as float32 partial sums, one for each program, and added by XLA: deterministic, and small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.gated_activation import _activation_and_slope, _clamped
from pallas_kernels.gated_activation import _Kind as Kind

MIN_RANK = 16  # the smallest axis of a product in a kernel
MAX_RANK = 64


class Tiling(NamedTuple):
    """A program's part of [T, F]: `repeats` blocks of rows x columns, side by side (forward) or below each other."""

    rows: int
    columns: int
    repeats: int
    num_warps: int


FORWARD = Tiling(rows=64, columns=128, repeats=8, num_warps=8)
BACKWARD = Tiling(rows=32, columns=256, repeats=16, num_warps=8)


def padded_rank(*ranks: int) -> int:
    """R for kernels."""
    return max(MIN_RANK, 1 << (max(ranks) - 1).bit_length())


def forward(
    gate: jax.Array,
    up: jax.Array,
    low: tuple[jax.Array, jax.Array],
    factors: tuple[jax.Array, jax.Array, jax.Array],
    kind: Kind,
    tiling: Tiling = FORWARD,
) -> tuple[jax.Array, jax.Array]:
    """Returns h [T, F] and h A_D^T [T, R] in float32.

    Args:
      gate, up: [T, F], without their low-rank parts.
      low: l_G, l_U [T, R] in the dtype of gate.
      factors: B_G, B_U, A_D^T [F, R] in that dtype.
      kind: the activation.
      tiling: private; for measurements.
    """
    tokens, width = gate.shape
    rank = low[0].shape[1]
    chunks = -(-width // (tiling.columns * tiling.repeats))
    h, partial = backend.call(
        _lora_mlp_forward,
        gate,
        up,
        *low,
        *factors,
        out=(
            jax.ShapeDtypeStruct(gate.shape, gate.dtype),
            jax.ShapeDtypeStruct((chunks, tokens, rank), jnp.float32),
        ),
        grid=(chunks, -(-tokens // tiling.rows)),
        num_warps=tiling.num_warps,
        kind=kind,
        tiling=tiling,
    )
    return h, jnp.sum(partial, axis=0)


class Backward(NamedTuple):
    """What the backward kernel makes: [T, F] in the inputs' dtype, the rest float32; h is None unless asked for."""

    d_gate: jax.Array
    d_up: jax.Array
    gate_times_B: jax.Array  # d_gate B_G [T, R]
    up_times_B: jax.Array
    d_gate_B: jax.Array  # [F, R]
    d_up_B: jax.Array
    d_down_A: jax.Array
    h: jax.Array | None


def backward(
    gate: jax.Array,
    up: jax.Array,
    d_h: jax.Array,
    low: tuple[jax.Array, jax.Array, jax.Array],
    factors: tuple[jax.Array, jax.Array, jax.Array],
    kind: Kind,
    with_h: bool,
    tiling: Tiling = BACKWARD,
) -> Backward:
    """The backward pass between the large products.

    Args:
      gate, up, d_h: [T, F], without their low-rank parts.
      low: l_G, l_U, d_D [T, R].
      factors, kind, tiling: as of `forward`.
      with_h: also write h, over d_h; for the gradient of a W_D that trains.
    """
    tokens, width = gate.shape
    rank = low[0].shape[1]
    chunks, strips = -(-tokens // (tiling.rows * tiling.repeats)), -(-width // tiling.columns)
    like = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    of_tokens = jax.ShapeDtypeStruct((strips, tokens, rank), jnp.float32)
    of_columns = jax.ShapeDtypeStruct((chunks, width, rank), jnp.float32)
    d_gate, d_up, *rest = backend.call(
        _lora_mlp_backward,
        gate,
        up,
        d_h,
        *low,
        *factors,
        out=(like, like, of_tokens, of_tokens, of_columns, of_columns, of_columns) + (like,) * with_h,
        grid=(strips, chunks),
        num_warps=tiling.num_warps,
        aliases={0: 0, 1: 1} | ({2: 7} if with_h else {}),
        kind=kind,
        tiling=tiling,
    )
    return Backward(d_gate, d_up, *(jnp.sum(partial, axis=0) for partial in rest[:5]), rest[5] if with_h else None)


def _rows_of(ref: Any, start: jax.Array, size: int, seen: jax.Array) -> jax.Array:
    """[size, R] rows of a narrow array, zeros beyond its end."""
    mask = jnp.broadcast_to(seen[:, None], (size, ref.shape[1]))
    return backend.load(ref.at[backend.ds(start, size), :], mask=mask, other=0)


def _store_rows(ref: Any, program: jax.Array, start: jax.Array, seen: jax.Array, value: jax.Array) -> None:
    """Writes a partial sum [size, R] of one program."""
    mask = jnp.broadcast_to(seen[:, None], value.shape)
    backend.store(ref.at[program, backend.ds(start, value.shape[0]), :], value, mask=mask)


def _seen(start: jax.Array, size: int, length: int) -> jax.Array:
    return start + jnp.arange(size, dtype=jnp.int32) < length


def _lora_mlp_forward(
    gate_ref, up_ref, gate_l_ref, up_l_ref, gate_B_ref, up_B_ref, down_A_ref, h_ref, partial_ref, *, kind, tiling
) -> None:
    chunk, row = backend.program_id(0), backend.program_id(1) * tiling.rows
    tokens, width = gate_ref.shape
    seen_rows = _seen(row, tiling.rows, tokens)
    gate_l = _rows_of(gate_l_ref, row, tiling.rows, seen_rows)
    up_l = _rows_of(up_l_ref, row, tiling.rows, seen_rows)

    def block(i: jax.Array, partial: jax.Array) -> jax.Array:
        column = (chunk * tiling.repeats + i) * tiling.columns
        seen_columns = _seen(column, tiling.columns, width)
        mask = seen_rows[:, None] & seen_columns[None, :]
        index = (backend.ds(row, tiling.rows), backend.ds(column, tiling.columns))
        gate, up = (backend.load(ref.at[index], mask=mask, other=0) for ref in (gate_ref, up_ref))
        gate_B, up_B, down_A = (
            _rows_of(ref, column, tiling.columns, seen_columns) for ref in (gate_B_ref, up_B_ref, down_A_ref)
        )
        gate = gate.astype(jnp.float32) + backend.dot(gate_l, gate_B, trans_y=True)
        up = up.astype(jnp.float32) + backend.dot(up_l, up_B, trans_y=True)
        x, factor = _clamped(gate, up, kind)
        h = (_activation_and_slope(x, kind)[0] * factor).astype(h_ref.dtype)
        backend.store(h_ref.at[index], h, mask=mask)
        return partial + backend.dot(h, down_A)

    partial = jnp.zeros((tiling.rows, partial_ref.shape[-1]), jnp.float32)
    partial = jax.lax.fori_loop(0, tiling.repeats, block, partial)
    _store_rows(partial_ref, chunk, row, seen_rows, partial)


def _lora_mlp_backward(
    gate_ref,
    up_ref,
    d_h_ref,
    gate_l_ref,
    up_l_ref,
    down_d_ref,
    gate_B_ref,
    up_B_ref,
    down_A_ref,
    d_gate_ref,
    d_up_ref,
    gate_times_B_ref,
    up_times_B_ref,
    d_gate_B_ref,
    d_up_B_ref,
    d_down_A_ref,
    *h_refs,
    kind,
    tiling,
) -> None:
    strip, chunk = backend.program_id(0), backend.program_id(1)
    tokens, width = gate_ref.shape
    column = strip * tiling.columns
    seen_columns = _seen(column, tiling.columns, width)
    gate_B, up_B, down_A = (
        _rows_of(ref, column, tiling.columns, seen_columns) for ref in (gate_B_ref, up_B_ref, down_A_ref)
    )

    def block(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row = (chunk * tiling.repeats + i) * tiling.rows
        seen_rows = _seen(row, tiling.rows, tokens)
        mask = seen_rows[:, None] & seen_columns[None, :]
        index = (backend.ds(row, tiling.rows), backend.ds(column, tiling.columns))
        gate, up, d_h = (backend.load(ref.at[index], mask=mask, other=0) for ref in (gate_ref, up_ref, d_h_ref))
        gate_l, up_l, down_d = (
            _rows_of(ref, row, tiling.rows, seen_rows) for ref in (gate_l_ref, up_l_ref, down_d_ref)
        )
        gate = gate.astype(jnp.float32) + backend.dot(gate_l, gate_B, trans_y=True)
        up = up.astype(jnp.float32) + backend.dot(up_l, up_B, trans_y=True)
        d_h = d_h.astype(jnp.float32) + backend.dot(down_d, down_A, trans_y=True)
        h, d_gate, d_up = (y.astype(d_gate_ref.dtype) for y in _pull_back(gate, up, d_h, kind))
        backend.store(d_gate_ref.at[index], d_gate, mask=mask)
        backend.store(d_up_ref.at[index], d_up, mask=mask)
        for h_ref in h_refs:
            backend.store(h_ref.at[index], h, mask=mask)
        _store_rows(gate_times_B_ref, strip, row, seen_rows, backend.dot(d_gate, gate_B))
        _store_rows(up_times_B_ref, strip, row, seen_rows, backend.dot(d_up, up_B))
        pairs = ((d_gate, gate_l), (d_up, up_l), (h, down_d))
        return tuple(sum + backend.dot(wide, low, trans_x=True) for sum, (wide, low) in zip(sums, pairs, strict=True))

    zeros = jnp.zeros((tiling.columns, gate_B_ref.shape[1]), jnp.float32)
    sums = jax.lax.fori_loop(0, tiling.repeats, block, (zeros,) * 3)
    for ref, sum in zip((d_gate_B_ref, d_up_B_ref, d_down_A_ref), sums, strict=True):
        _store_rows(ref, chunk, column, seen_columns, sum)


def _pull_back(gate: jax.Array, up: jax.Array, g: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(h, d_gate, d_up), all float32."""
    x, factor = _clamped(gate, up, kind)
    activated, slope = _activation_and_slope(x, kind)
    d_gate, d_up = g * factor * slope, g * activated
    if kind.activation == "clamped_swiglu":
        d_gate = jnp.where(gate > kind.limit, 0.0, d_gate)
        d_up = jnp.where(jnp.abs(up) > kind.limit, 0.0, d_up)
    return activated * factor, d_gate, d_up
