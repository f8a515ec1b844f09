"""The gated MLP with low-rank adapters on any of its three linears, as one op (parts: see `lora_linear`).

    gate = G(x)    up = U(x)    h = act(gate) * up    y = D(h)        G, U, D linears with adapters; x [T, in]

Kept for the backward pass: x, gate, up and the low-rank products of the adapters (named for remat policies), never h,
which is made again in the pass that makes d_gate and d_up out of d_h:

    d_h = g W_D + d_D A_D      (h, d_gate, d_up) from (gate, up, d_h)
    dx = d_gate W_G + d_up W_U + [d_G d_U] [A_G; A_U]

"xla" lets cuBLAS add each low-rank part to the large product; "pallas" makes them all inside the activation's two
passes (`lora_mlp_pallas`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import backend
from pallas_kernels import lora_mlp_pallas as kernels
from pallas_kernels.gated_activation import gated_activation, gated_activation_backward
from pallas_kernels.lora_linear import (
    LoraWeights,
    apply,
    case_differentiable,
    case_weights,
    check_weights,
    decoded,
    flatten,
    gather,
    input_cotangent,
    low_rank,
    low_rank_cotangents,
    parameter_cotangents,
    scaled_low_rank,
    trained,
    values,
)
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register

LINEARS = ("gate", "up", "down")


def lora_mlp(
    x: jax.Array,
    gate: LoraWeights,
    up: LoraWeights,
    down: LoraWeights,
    *,
    activation: str = "silu",
    dropout: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Returns down(act(gate(x)) * up(x)), [..., out] in x's dtype; any of the linears may have an adapter.

    Args:
      x: [..., in].
      gate, up, down: the parameters of each: [F, in], [F, in] and [out, F].
      activation: one of `gated_activation`'s.
      dropout: probability of dropping a value of an adapter's input, in [0, 1); for linears with a dropout_key.
      implementation: "pallas", "xla" or None for the fastest.

    Raises:
      ValueError: a linear has only one of lora_A and lora_B, shapes do not fit, dropout is out of range, or the
        activation is unknown.
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
      >>> jax.grad(loss)(down.lora_B).round(3).tolist()
      [[68.585], [68.585], [68.585]]
    """
    check_weights("lora_mlp", x.shape[-1], {"gate": gate, "up": up}, dropout)
    check_weights("lora_mlp", _rows(gate.weight), {"down": down}, dropout)
    linears = flatten({"gate": gate, "up": up, "down": down})
    return LORA_MLP(x, **linears, activation=activation, dropout=dropout, implementation=implementation)


def _rows(weight: Any) -> int:
    """The output size of a plain or quantized weight."""
    return jax.eval_shape(lambda: decoded(weight, jnp.float32)).shape[0]


class _Static(NamedTuple):
    """What is not an array."""

    activation: str
    dropout: float
    fused: bool


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass beside x.

    `gate` and `up` are without their low-rank parts where the kernels add them.
    """

    gate: jax.Array
    up: jax.Array
    low: tuple[jax.Array | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(static: _Static, x: jax.Array, linears: tuple[LoraWeights, ...]) -> jax.Array:
    """x [T, in] -> [T, out]."""
    return _forward(static, x, linears)[0]


def _forward(static: _Static, x: jax.Array, linears: tuple[LoraWeights, ...]) -> tuple[jax.Array, _Kept]:
    shared, down = linears[:2], linears[2]
    low = low_rank(x, shared, static.dropout)
    in_product = (None, None) if static.fused else low
    gate = checkpoint_name(apply(x, shared[0], in_product[0]), "gate")
    up = checkpoint_name(apply(x, shared[1], in_product[1]), "up")
    if static.fused:
        factors, (low_gate, low_up) = _padded(linears, gate.dtype), _padded_columns(low, linears, x)
        h, down_low = kernels.forward(gate, up, (low_gate, low_up), factors, _kind(static))
        low_down = None if down.lora_A is None else scaled_low_rank(down_low[:, : down.lora_A.shape[0]], down, x.dtype)
    else:
        h = gated_activation(gate, up, activation=static.activation, implementation="xla")
        (low_down,) = low_rank(h, (down,), static.dropout)
    return apply(h, down, low_down), _Kept(gate, up, (*low, low_down))


def _mlp_fwd(static, x, linears):
    trains = trained(linears)
    x, linears = x.value, values(linears)
    y, kept = _forward(static, x, linears)
    needs_x = any(trains[:2]) or any(linear.lora_A is not None for linear in linears[:2])
    return y, (x if needs_x else None, linears, kept, tuple(() if train else None for train in trains))


def _mlp_bwd(static, residuals, g):
    x, linears, kept, trains = residuals
    trains = [train is not None for train in trains]
    between = _between_fused if static.fused else _between
    d_shared, d_low_shared, d_down, gradients_of_B = between(static, linears, trains[2], kept, g)
    shared = linears[:2]
    low = (None, None) if static.fused else kept.low[:2]
    found = parameter_cotangents(x, shared, trains[:2], d_shared, low, d_low_shared, static.dropout)
    if static.fused:
        found = tuple(d._replace(lora_B=d_B) for d, d_B in zip(found, gradients_of_B, strict=True))
    return input_cotangent(shared, d_shared, d_low_shared, static.dropout), (*found, d_down)


_mlp.defvjp(_mlp_fwd, _mlp_bwd, symbolic_zeros=True)


def _between(static: _Static, linears: tuple[LoraWeights, ...], train_down: bool, kept: _Kept, g: jax.Array):
    """From g to ((d_gate, d_up), their d_i, the gradients of down, None)."""
    shared, down = linears[:2], linears[2:]
    d_low = low_rank_cotangents(down, (g,))
    d_h = input_cotangent(down, (g,), d_low, static.dropout)
    h, *d_shared = gated_activation_backward(kept.gate, kept.up, d_h, static.activation, implementation="xla")
    (d_down,) = parameter_cotangents(h, down, (train_down,), (g,), kept.low[2:], d_low, static.dropout)
    return d_shared, low_rank_cotangents(shared, d_shared), d_down, None


def _between_fused(static: _Static, linears: tuple[LoraWeights, ...], train_down: bool, kept: _Kept, g: jax.Array):
    """As `_between`, with the gradients of B of gate and up, by the kernel that makes d_gate and d_up."""
    down = linears[2:]
    d_low = low_rank_cotangents(down, (g,))
    d_h = input_cotangent(down, (g,), (None,), static.dropout)
    padded = _padded_columns((*kept.low[:2], *d_low), linears, g)
    factors = _padded(linears, g.dtype)
    made = kernels.backward(kept.gate, kept.up, d_h, padded, factors, _kind(static), with_h=train_down)
    (d_down,) = parameter_cotangents(made.h, down, (train_down,), (g,), kept.low[2:], d_low, static.dropout)
    d_down = d_down._replace(lora_A=_like(made.d_down_A.T, down[0].lora_A))
    products = (made.gate_times_B, made.up_times_B)
    d_low_shared = tuple(
        None if linear.lora_B is None else scaled_low_rank(product[:, : linear.lora_B.shape[1]], linear, g.dtype)
        for linear, product in zip(linears, products, strict=False)
    )
    gradients_of_B = (_like(made.d_gate_B, linears[0].lora_B), _like(made.d_up_B, linears[1].lora_B))
    return (made.d_gate, made.d_up), d_low_shared, d_down, gradients_of_B


def _kind(static: _Static) -> kernels.Kind:
    return kernels.Kind(static.activation, alpha=1.702, limit=7.0)


def _rank_of(linears: Sequence[LoraWeights]) -> int:
    """R of the kernels."""
    return kernels.padded_rank(*(1 if linear.lora_A is None else linear.lora_A.shape[0] for linear in linears))


def _padded(linears: tuple[LoraWeights, ...], dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """B of gate and up and A^T of down, [F, R]: zeros where there is no adapter, or beyond its rank."""
    gate, up, down = linears
    width, rank = _rows(gate.weight), _rank_of(linears)
    narrow = (gate.lora_B, up.lora_B, None if down.lora_A is None else down.lora_A.T)
    return _with_columns(narrow, width, rank, dtype)


def _padded_columns(
    narrow: Sequence[jax.Array | None], linears: tuple[LoraWeights, ...], x: jax.Array
) -> tuple[jax.Array, ...]:
    """Low-rank products [T, r_i] as [T, R]."""
    return _with_columns(narrow, x.shape[0], _rank_of(linears), x.dtype)


def _with_columns(narrow: Sequence[jax.Array | None], rows: int, rank: int, dtype: Any) -> Any:
    return tuple(
        jnp.zeros((rows, rank), dtype) if a is None else jnp.pad(a.astype(dtype), ((0, 0), (0, rank - a.shape[1])))
        for a in narrow
    )


def _like(gradient: jax.Array, parameter: jax.Array | None) -> jax.Array | None:
    """A gradient made for R columns or rows, of a parameter of fewer; None for none."""
    if parameter is None:
        return None
    return gradient[: parameter.shape[0], : parameter.shape[1]].astype(parameter.dtype)


def _implementation(
    x: jax.Array, *, fused: bool, activation: str = "silu", dropout: float = 0.0, **arguments: Any
) -> jax.Array:
    y = _mlp(_Static(activation, dropout, fused), x.reshape(-1, x.shape[-1]), gather(LINEARS, arguments))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _ranks(arguments: dict[str, Any]) -> list[int]:
    """The ranks of the adapters there are."""
    factors = (arguments.get(f"{name}_lora_A") for name in LINEARS)
    return [factor.shape[0] for factor in factors if factor is not None]


def _pallas_refuses(platform: str, x: jax.Array, *, dropout: float = 0.0, **arguments: Any) -> str | None:
    if reason := backend.refuses_platform(platform):
        return reason
    if dropout and arguments.get("down_dropout_key") is not None:
        return "its kernels do not drop values of down's input"
    ranks = _ranks(arguments)
    if not ranks:
        return "there is no adapter, so nothing to fuse"
    if max(ranks) > kernels.MAX_RANK:
        return f"its kernels hold ranks up to {kernels.MAX_RANK}, not {max(ranks)}"
    return None


def _rank(platform: str, x: jax.Array, **arguments: Any) -> tuple[Choice, ...]:
    tokens = math.prod(x.shape[:-1])
    if platform == "gpu" and x.dtype != jnp.float32 and tokens >= kernels.FORWARD.rows * 16:
        return (Choice("pallas", "it makes the low-rank products in the activation's own passes over [T, F]"),)
    return (Choice("xla", "the kernels are for GPUs, 16-bit activations and more than a thousand tokens"),)


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
) -> Case:
    size, wide = sizes
    shapes = ((wide, size), (wide, size), (size, wide))
    parts = tuple(zip(LINEARS, shapes, ranks, strict=True))

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        x = normal(rng, (tokens, size), dtype)
        linears = {
            part: case_weights(rng, dtype, shape, rank, bias=bias, packed=packed)._replace(
                dropout_key=jax.random.key(i) if dropout else None
            )
            for i, (part, shape, rank) in enumerate(parts)
        }
        return {"x": x, **flatten(linears), "activation": activation, "dropout": dropout}

    differentiable = [
        field for part, _, rank in parts for field in case_differentiable(f"{part}_", rank, bias=bias, packed=packed)
    ]
    return Case(name, make, reduction=max(tokens, *sizes), differentiable=("x", *differentiable))


LORA_MLP = register(
    Op(
        name="lora_mlp",
        implementations={
            "xla": Implementation(functools.partial(_implementation, fused=False)),
            "pallas": Implementation(functools.partial(_implementation, fused=True), refuses=_pallas_refuses),
        },
        rank=_rank,
        cases=(
            _case("all adapted", 7, (24, 40), (4, 4, 4)),
            _case("over NF4, up without adapter", 5, (34, 66), (3, None, 1), packed=True),
            _case("bias, dropout, gelu", 9, (20, 36), (2, 2, 2), activation="gelu", bias=True, dropout=0.5),
        ),
        roundings=8,  # gate, up and their low-rank parts, h, d_h, d_gate and d_up are each rounded on the way
    )
)
