"""The gated MLP with low-rank adapters on any of its three linears, as one op (parts: see `lora_linear`).

    gate = G(x)    up = U(x)    h = act(gate) * up    y = D(h)        G, U, D linears with adapters; x [T, in]

Kept for the backward pass: x, gate, up and the low-rank products of the adapters (named for remat policies), never h,
which is made again in the pass that makes d_gate and d_up out of d_h:

    d_h = g W_D + d_D A_D      (h, d_gate, d_up) from (gate, up, d_h)
    dx = d_gate W_G + d_up W_U + [d_G d_U] [A_G; A_U]

cuBLAS adds each low-rank part to the large product; the pass that makes h, d_gate and d_up writes over its inputs. One
kernel for that pass with every low-rank product of its arrays in it was slower: its sums over T and F at once do not
fit a program's registers (H100, 8192 tokens, 4096 -> 14336 -> 4096, r = 16: 19.3 ms for the whole op instead of 9.75).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

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
      implementation: "xla" or None.

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
      >>> jax.grad(loss)(down.lora_B).astype(int).tolist()
      [[68], [68], [68]]
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


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass beside x."""

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
    gate = checkpoint_name(apply(x, shared[0], low[0]), "gate")
    up = checkpoint_name(apply(x, shared[1], low[1]), "up")
    h = gated_activation(gate, up, activation=static.activation)
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
    shared, down = linears[:2], linears[2:]
    d_low = low_rank_cotangents(down, (g,))
    d_h = input_cotangent(down, (g,), d_low, static.dropout)
    h, *d_shared = gated_activation_backward(kept.gate, kept.up, d_h, static.activation)
    d_down = parameter_cotangents(h, down, trains[2:], (g,), kept.low[2:], d_low, static.dropout)
    d_low = low_rank_cotangents(shared, d_shared)
    found = parameter_cotangents(x, shared, trains[:2], d_shared, kept.low[:2], d_low, static.dropout)
    return input_cotangent(shared, d_shared, d_low, static.dropout), (*found, *d_down)


_mlp.defvjp(_mlp_fwd, _mlp_bwd, symbolic_zeros=True)


def _reference(x: jax.Array, *, activation: str = "silu", dropout: float = 0.0, **arguments: Any) -> jax.Array:
    linears = gather(LINEARS, arguments)
    y = cast(jax.Array, _mlp(_Static(activation, dropout), x.reshape(-1, x.shape[-1]), linears))
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
        replaces="three linears with adapters and the gate",
        saves="h as a residual: it is made again",
        implementations={"xla": Implementation(_reference)},
        rank=_rank,
        cases=(
            _case("all adapted", 7, (24, 40), (4, 4, 4)),
            _case("over NF4, up without adapter", 5, (34, 66), (3, None, 1), packed=True),
            _case("bias, dropout, gelu", 9, (20, 36), (2, 2, 2), activation="gelu", bias=True, dropout=0.5),
        ),
        roundings=8,  # gate, up and their low-rank parts, h, d_h, d_gate and d_up are each rounded on the way
    )
)
