"""The gated MLP with low-rank adapters on any of its three linears, as one op (parts: see `lora_parts`).

    gate = G(x)    up = U(x)    h = act(gate) * up    y = D(h)        G, U, D linears with adapters; x [T, in]

Kept for the backward pass: x, gate, up and the low-rank products of the adapters (named for remat policies), never h,
which is made again in the pass that makes d_gate and d_up out of d_h (and with `recompute` only x, from which gate and
up are made again, possibly for a tile of rows at a time, so that no [T, F] array exists whole). Where rows of D are
scaled, their scales' gradient needs y, too: it is kept, or made again by a product with W_D.

    d_h = g W_D + d_D A_D      (h, d_gate, d_up) from (gate, up, d_h)
    dx = d_gate W_G + d_up W_U + [d_G d_U] [A_G; A_U]

cuBLAS adds each low-rank part to the large product; the pass that makes h, d_gate and d_up writes over its inputs. One
kernel for that pass with every low-rank product of its arrays in it was slower: its sums over T and F at once do not
fit a program's registers (H100, 8192 tokens, 4096 -> 14336 -> 4096, r = 16: 19.3 ms for the whole op instead of 9.75).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import nf4_linears
from pallas_kernels.gated_activation import gated_activation, gated_activation_backward
from pallas_kernels.lora_linear import case_differentiable, case_weights
from pallas_kernels.lora_parts import (
    LoraWeights,
    apply,
    check_weights,
    decoded,
    flatten,
    gather,
    input_cotangent,
    like_parameters,
    low_rank,
    low_rank_cotangents,
    parameter_cotangents,
    scales_dropped,
    subtract_bias,
    trained,
    values,
)
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register

LINEARS = ("gate", "up", "down")
_FORWARD_TILE = 4  # times the backward pass's


def lora_mlp(
    x: jax.Array,
    gate: LoraWeights,
    up: LoraWeights,
    down: LoraWeights,
    *,
    activation: str = "silu",
    dropout: float = 0.0,
    recompute: bool = False,
    keep_output: bool = False,
    tile: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Returns down(act(gate(x)) * up(x)), [..., out] in x's dtype; any of the linears may have an adapter.

    Args:
      x: [..., in].
      gate, up, down: the parameters of each: [F, in], [F, in] and [out, F].
      activation: one of `gated_activation`'s.
      dropout: probability of dropping a value of an adapter's input, in [0, 1); for linears with a dropout_key.
      recompute: keep x instead of gate and up for the backward pass. Better than `jax.checkpoint` around this op, which
        would also make h again for the sake of its product with an adapter.
      keep_output: where down has a row_scale, keep the result, too, named "mlp_out" for remat policies: its gradient
        needs it, and a product with down's weight makes it again otherwise. It is as long as x.
      tile: with `recompute`: rows that the backward pass computes at a time (the forward pass, which has fewer arrays
        beside it, takes four times as many); every weight is decoded once, for all tiles. None: all rows. What dropout
        drops depends on it.
      implementation: "xla" or None.

    Raises:
      ValueError: a linear has only one of lora_A and lora_B, shapes do not fit, dropout is out of range, the activation
        is unknown, or there is a tile without `recompute`.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels import LoraWeights, lora_mlp
      >>> x, wide, narrow = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones((3, 4))
      >>> down = LoraWeights(narrow, lora_A=jnp.ones((1, 4)), lora_B=jnp.zeros((3, 1)))
      >>> y = lora_mlp(x, LoraWeights(wide), LoraWeights(wide), down)
      >>> y.shape, round(float(y[0, 0]), 3)
      ((2, 3), 34.293)
      >>> loss = lambda lora_B: jnp.sum(lora_mlp(x, LoraWeights(wide), LoraWeights(wide), down._replace(lora_B=lora_B)))
      >>> jax.grad(loss)(down.lora_B).astype(int).tolist()
      [[68], [68], [68]]
    """
    check_weights("lora_mlp", x.shape[-1], {"gate": gate, "up": up}, dropout)
    check_weights("lora_mlp", _rows(gate.weight), {"down": down}, dropout)
    linears = flatten({"gate": gate, "up": up, "down": down})
    if tile is not None and not (recompute and tile > 0):
        raise ValueError(f"lora_mlp: tile={tile} needs recompute=True and a positive number of rows")
    # Under dropout the scaled rows are a part of the result, which is made again anyway.
    keep_output = keep_output and down.row_scale is not None and not scales_dropped(down, dropout)
    static = {
        "activation": activation,
        "dropout": dropout,
        "recompute": recompute,
        "keep_output": keep_output,
        "tile": tile,
    }
    return LORA_MLP(x, **linears, **static, implementation=implementation)


def _rows(weight: Any) -> int:
    """The output size of a plain or quantized weight."""
    return jax.eval_shape(lambda: decoded(weight, jnp.float32)).shape[0]


class _Static(NamedTuple):
    """What is not an array."""

    activation: str
    dropout: float
    keep_output: bool
    tile: int | None

    def output(self, y: jax.Array, down: LoraWeights) -> jax.Array | None:
        """What to keep of the result y, named: y - bias, or None."""
        return checkpoint_name(subtract_bias(y, down), "mlp_out") if self.keep_output else None


class _Decoded(NamedTuple):
    """A weight decoded for all tiles: its rows scaled, and as they are where those are needed, too."""

    scaled: jax.Array
    plain: jax.Array | None

    def dequantize(self, dtype: Any, row_scale: jax.Array | None = None) -> jax.Array:
        """Either of them; `row_scale` is the one that it was decoded with."""
        weight = self.scaled if row_scale is not None or self.plain is None else self.plain
        return weight.astype(dtype)


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass beside x; None: to be made again, out of h."""

    gate: jax.Array
    up: jax.Array
    low: tuple[jax.Array | None, ...]
    low_down: jax.Array | None
    output: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(static: _Static, x: jax.Array, linears: tuple[LoraWeights, ...]) -> jax.Array:
    """x [T, in] -> [T, out]."""
    if nf4_linears.takes(x, linears):
        gate, up = nf4_linears.nf4_linears(x, linears[:2])
        # XLA's, which also brings h into the order of the next kernel.
        h = gated_activation(gate, up, activation=static.activation, implementation="xla")
        return nf4_linears.nf4_linears(h, linears[2:])[0]
    return _forward(static, x, nf4_linears.plain(linears), packed=True)[0]


def _gate_and_up(static: _Static, x: jax.Array, linears: tuple[LoraWeights, ...], *, packed: bool = False) -> _Kept:
    shared = linears[:2]
    low = low_rank(x, shared, static.dropout)
    gate, up = (apply(x, *each, static.dropout, packed=packed) for each in zip(shared, low, strict=True))
    return _Kept(gate, up, low, None, None)


def _forward(
    static: _Static, x: jax.Array, linears: tuple[LoraWeights, ...], *, packed: bool = False
) -> tuple[jax.Array, _Kept]:
    """The result and what to keep; `packed` as of `lora_parts.apply`."""
    down = linears[2]
    gate, up, low, *_ = _gate_and_up(static, x, linears, packed=packed)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    h = gated_activation(gate, up, activation=static.activation)
    (low_down,) = low_rank(h, (down,), static.dropout)
    y = apply(h, down, low_down, static.dropout, packed=packed)
    return y, _Kept(gate, up, low, low_down, static.output(y, down))


def _mlp_fwd(static, x, linears):
    trains = trained(linears)
    x, linears = x.value, values(linears)
    y, kept = _forward(static, x, linears)
    needs_x = any(trains[:2]) or any(linear.lora_A is not None for linear in linears[:2])
    return y, (x if needs_x else None, linears, kept, _marked(trains))


def _marked(flags: Sequence[bool]) -> tuple[tuple[()] | None, ...]:
    """Flags as a pytree without leaves, which residuals may hold."""
    return tuple(() if flag else None for flag in flags)


def _mlp_bwd(static, residuals, g):
    x, linears, kept, marks = residuals
    dx, gradients = _backward(static, x, linears, marks, kept, g)
    return dx, like_parameters(gradients, linears)


def _backward(static, x, linears, marks, kept: _Kept, g) -> tuple[jax.Array, tuple[LoraWeights, ...]]:
    """dx, and the parameters' gradients in float32."""
    trains = [mark is not None for mark in marks]
    shared, down = linears[:2], linears[2:]
    d_low = low_rank_cotangents(down, (g,))
    d_h = input_cotangent(down, (g,), d_low, static.dropout)
    h, *d_shared = gated_activation_backward(kept.gate, kept.up, d_h, static.activation)
    low_down = low_rank(h, down, static.dropout) if kept.low_down is None else (kept.low_down,)
    d_down = parameter_cotangents(h, down, trains[2:], (g,), low_down, d_low, (kept.output,), static.dropout)
    d_low = low_rank_cotangents(shared, d_shared)
    outputs = [subtract_bias(y, linear) for y, linear in zip(kept[:2], shared, strict=True)]
    found = parameter_cotangents(x, shared, trains[:2], d_shared, kept.low, d_low, outputs, static.dropout)
    return input_cotangent(shared, d_shared, d_low, static.dropout), (*found, *d_down)


_mlp.defvjp(_mlp_fwd, _mlp_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputing_mlp(static: _Static, x: jax.Array, linears: tuple[LoraWeights, ...]) -> jax.Array:
    """`_mlp` that keeps only x, and y where it is to be kept, `static.tile` rows at a time."""
    weights = _decoded(static, linears, x.dtype)
    y, _ = _over_tiles(
        _FORWARD_TILE * (static.tile or 0), weights, lambda x, at: (_forward(static, x, at)[0], ()), (x,)
    )
    return y


def _recomputing_fwd(static, x, linears):
    trains = trained(linears)
    x, linears = x.value, values(linears)
    y = _recomputing_mlp(static, x, linears)
    return y, (x, linears, _marked(trains), static.output(y, linears[2]))


def _recomputing_bwd(static, residuals, g):
    x, linears, marks, output = residuals

    def backward(x_tile, g_tile, *rest):
        *output_tile, at = rest
        kept = _gate_and_up(static, x_tile, at)._replace(output=output_tile[0] if output_tile else None)
        return _backward(static, x_tile, at, marks, kept, g_tile)

    arrays = (x, g) if output is None else (x, g, output)
    dx, gradients = _over_tiles(static.tile or 0, _decoded(static, linears, x.dtype), backward, arrays)
    return dx, like_parameters(gradients, linears)


_recomputing_mlp.defvjp(_recomputing_fwd, _recomputing_bwd, symbolic_zeros=True)


def _decoded(static: _Static, linears: tuple[LoraWeights, ...], dtype: Any) -> tuple[LoraWeights, ...]:
    def of(linear: LoraWeights) -> LoraWeights:
        scaled = decoded(linear.weight, dtype, linear.row_scale)
        plain = decoded(linear.weight, dtype) if scales_dropped(linear, static.dropout) else None
        return linear._replace(weight=_Decoded(scaled, plain))

    return tuple(map(of, linears))


def _over_tiles(tile: int, linears, run, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
    """run(*tiles of arrays [T, ...], linears) -> (rows, sums): all rows [T, ...] in order, and the sums' total.

    `tile` 0 is all rows.

    Where they fit, the rows are written over the first array's tiles, which nobody reads again: an array of their own
    would begin as zeros, which XLA makes once and keeps all through the layers.
    """
    rows = arrays[0].shape[0]
    if tile == 0 or tile >= rows:
        return run(*arrays, linears)
    part, sums = jax.eval_shape(lambda *tiles: run(*tiles, _of_tile(linears, 0)), *(array[:tile] for array in arrays))
    in_place = part.shape[1:] == arrays[0].shape[1:] and part.dtype == arrays[0].dtype

    def step(index: Any, carry: tuple[jax.Array, Any], size: int = tile) -> tuple[jax.Array, Any]:
        done, total = carry
        inputs = (done, *arrays[1:]) if in_place else arrays
        tiles = (jax.lax.dynamic_slice_in_dim(array, index * tile, size) for array in inputs)
        part, sums = run(*tiles, _of_tile(linears, index))
        done = jax.lax.dynamic_update_slice_in_dim(done, part, index * tile, axis=0)
        return done, jax.tree.map(jnp.add, total, sums)

    done = arrays[0] if in_place else jnp.zeros((rows, *part.shape[1:]), part.dtype)
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)
    carry = jax.lax.fori_loop(jnp.int32(0), jnp.int32(rows // tile), step, (done, total))
    return step(rows // tile, carry, rows % tile) if rows % tile else carry


def _of_tile(linears: tuple[LoraWeights, ...], index: Any) -> tuple[LoraWeights, ...]:
    """The linears with dropout of this tile's own."""
    keys = (linear.dropout_key for linear in linears)
    keys = (None if key is None else jax.random.fold_in(key, index) for key in keys)
    return tuple(linear._replace(dropout_key=key) for linear, key in zip(linears, keys, strict=True))


def _reference(
    x: jax.Array,
    *,
    activation: str = "silu",
    dropout: float = 0.0,
    recompute: bool = False,
    keep_output: bool = False,
    tile: int | None = None,
    **arguments: Any,
) -> jax.Array:
    mlp = _recomputing_mlp if recompute else _mlp
    static = _Static(activation, dropout, keep_output, tile)
    y = cast(jax.Array, mlp(static, x.reshape(-1, x.shape[-1]), gather(LINEARS, arguments)))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _rank(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    return (Choice("xla", "cuBLAS adds the adapters to its products; a kernel for the rest took twice as long"),)


def _case(
    name: str,
    tokens: int,
    sizes: tuple[int, int],
    ranks: tuple[int | None, int | None, int | None],
    *,
    activation: str = "silu",
    bias: bool = False,
    packed: bool = False,
    dropout: float = 0.0,
    tile: int | None = None,
    scaled: bool = False,
    keep_output: bool = False,
) -> Case:
    size, wide = sizes
    shapes = ((wide, size), (wide, size), (size, wide))
    parts = tuple(zip(LINEARS, shapes, ranks, strict=True))

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        x = normal(rng, (tokens, size), dtype)
        linears = {
            part: case_weights(rng, dtype, shape, rank, bias=bias, packed=packed, scaled=scaled)._replace(
                dropout_key=jax.random.key(i) if dropout else None
            )
            for i, (part, shape, rank) in enumerate(parts)
        }
        static = {"activation": activation, "dropout": dropout, "recompute": tile is not None, "tile": tile}
        static |= {"keep_output": keep_output}
        return {"x": x, **flatten(linears), **static}

    settings = {"bias": bias, "packed": packed, "scaled": scaled}
    differentiable = [field for part, _, rank in parts for field in case_differentiable(f"{part}_", rank, **settings)]
    return Case(name, make, reduction=max(tokens, *sizes), differentiable=("x", *differentiable))


LORA_MLP = register(
    Op(
        name="lora_mlp",
        replaces="three linears with adapters and the gate",
        saves="h as a residual: it is made again",
        implementations={"xla": Implementation(_reference)},
        rank=_rank,
        cases=(
            _case("all adapted, bias, scaled rows", 7, (24, 40), (4, 4, 4), bias=True, scaled=True),
            _case("over NF4, up without adapter", 5, (34, 66), (3, None, 1), packed=True),
            _case("over NF4, tiles and a rest, scaled", 7, (34, 66), (3, None, 1), packed=True, tile=3, scaled=True),
            _case("scaled rows, output kept", 5, (34, 66), (3, 1, 2), packed=True, scaled=True, keep_output=True),
            _case("the same, bias, tiles", 7, (20, 36), (2, 2, 2), bias=True, tile=3, scaled=True, keep_output=True),
            _case("bias, tiles", 8, (20, 36), (2, 2, 2), bias=True, tile=4),
            _case("bias, dropout, gelu", 9, (20, 36), (2, 2, 2), activation="gelu", bias=True, dropout=0.5),
        ),
        roundings=8,  # gate, up and their low-rank parts, h, d_h, d_gate and d_up are each rounded on the way
    )
)
