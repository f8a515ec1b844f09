"""The gate of a gated MLP (Shazeer 2020, arXiv:2002.05202).

    h = act(gate) * up                          gate, up, h [..., F]
    d_gate = g * up * act'(gate)                d_up = g * act(gate)

Computed in float32; h and d_up are returned in the dtype of `up`, d_gate in that of `gate`. SwiGLU is "silu", GeGLU
"gelu" (erf) or "gelu_pytorch_tanh". gpt-oss' "clamped_swiglu" (Hugging Face transformers, modeling_gpt_oss) is

    h = (min(max(up, -limit), limit) + 1) * act(min(gate, limit))           act(x) = x sigmoid(alpha x)

where a clamped value has gradient 0 (exactly at the limit it is not clamped). All but "gelu" are one family:

    act(x) = x s      act'(x) = s + x s (1 - s) u'(x)      s = sigmoid(u(x))
    silu                 u = x
    clamped_swiglu       u = alpha x
    gelu_pytorch_tanh    u = 2 sqrt(2 / pi) (x + 0.044715 x^3)             as (1 + tanh(v)) / 2 = sigmoid(2 v)

and "gelu" is x Phi(x) with act'(x) = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi), Phi the normal distribution function.

The kernels' backward pass reads gate, up and g once and writes its results over them (XLA copies what somebody still
needs). Nothing but gate and up is kept for it; h can be made again in the same pass.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "clamped_swiglu")

# Elements that one program computes, with 4 warps: two loads of 16 bytes for each thread and bfloat16 array.
BLOCK = 2048

# exp(z^2) erfc(z) = t P(t), t = 1 / (1 + ERFC_RATE z), z >= 0: a Chebyshev fit of degree 8 in t to 60-digit values for
# z up to 10, where float32's erfc is 0. The fit's relative error is 2.4e-8, with float32 arithmetic 1.4e-7.
ERFC_RATE = 0.3
ERFC_COEFFICIENTS = (
    0.169177338,
    0.170884416,
    0.147205472,
    0.219122514,
    -0.104048647,
    0.560781002,
    -0.523299158,
    0.49073562,
    -0.13055858,
)


def gated_activation(
    gate: jax.Array,
    up: jax.Array,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    implementation: str | None = None,
) -> jax.Array:
    """Returns act(gate) * up, [..., F], in the dtype of `up`; computed in float32.

    Args:
      gate, up: [..., F], float.
      activation: one of `ACTIVATIONS`; the module says what they are.
      alpha, limit: of "clamped_swiglu", which multiplies by `up + 1`, both clamped.
      implementation: "pallas", "xla" or None for the fastest.

    Raises:
      ValueError: the activation is not one of `ACTIVATIONS`, or the shapes differ.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from pallas_kernels import gated_activation
    >>> gate, up = jnp.array([[-1.0, 0.0, 2.0]]), jnp.array([[3.0, 4.0, 5.0]])
    >>> print(np.asarray(gated_activation(gate, up, activation="silu")).round(3))
    [[-0.807  0.     8.808]]
    >>> d_gate = jax.grad(lambda gate: gated_activation(gate, up, activation="silu").sum())(gate)
    >>> print(np.asarray(d_gate).round(3))
    [[0.217 2.    5.454]]
    """
    _check("gated_activation", activation, gate, up)
    return GATED_ACTIVATION(gate, up, activation=activation, alpha=alpha, limit=limit, implementation=implementation)


def gated_activation_backward(
    gate: jax.Array,
    up: jax.Array,
    g: jax.Array,
    activation: str,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (h, d_gate, d_up) in one pass, for an op whose own backward pass needs h again; see `gated_activation`.

    The kernel writes d_gate over gate, d_up over up and h over g. It has no gradient of its own.

    Args:
      gate, up: [..., F], as given to `gated_activation`.
      g: [..., F], the cotangent of its result, in the dtype of `up`.
      activation, alpha, limit, implementation: as of `gated_activation`.

    Raises:
      ValueError: the activation is not one of `ACTIVATIONS`, or the shapes differ.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pallas_kernels import gated_activation_backward
    >>> one = jnp.ones((1, 1))
    >>> h, d_gate, d_up = gated_activation_backward(one, 2 * one, one, "silu")
    >>> print(np.concatenate([h, d_gate, d_up]).ravel().round(3))
    [1.462 1.855 0.731]
    """
    _check("gated_activation_backward", activation, gate, up, g)
    return GATED_ACTIVATION_BACKWARD(
        gate, up, g, activation=activation, alpha=alpha, limit=limit, implementation=implementation
    )


def _check(op: str, activation: str, *arrays: jax.Array) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if len({array.shape for array in arrays}) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"{op}: the arrays must have one shape, not {shapes}")


def _reference(
    gate: jax.Array, up: jax.Array, *, activation: str = "silu", alpha: float = 1.702, limit: float = 7.0
) -> jax.Array:
    return _recomputing(gate, up, Kind(activation, alpha, limit))


def _plain(gate: jax.Array, up: jax.Array, *, activation: str, alpha: float, limit: float) -> jax.Array:
    x, factor = gate.astype(jnp.float32), up.astype(jnp.float32)
    if activation == "clamped_swiglu":
        x = jnp.where(x > limit, limit, x)
        factor = jnp.where(jnp.abs(factor) > limit, limit * jnp.sign(factor), factor) + 1
        activated = x * jax.nn.sigmoid(alpha * x)
    elif activation == "silu":
        activated = jax.nn.silu(x)
    else:
        activated = jax.nn.gelu(x, approximate=activation == "gelu_pytorch_tanh")
    return (activated * factor).astype(up.dtype)


def _reference_backward(
    gate: jax.Array, up: jax.Array, g: jax.Array, *, activation: str, **clamp: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    clamp = {"alpha": 1.702, "limit": 7.0} | clamp
    h, pull_back = jax.vjp(functools.partial(_plain, activation=activation, **clamp), gate, up)
    return h, *pull_back(g)


class Kind(NamedTuple):
    """Which function of gate and up."""

    activation: str
    alpha: float = 1.702
    limit: float = 7.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _recomputing(gate, up, kind: Kind):
    """`_plain`, but kept for the backward pass are gate and up only: autodiff would keep several float32 arrays."""
    return _plain(gate, up, **kind._asdict())


def _recomputing_fwd(gate, up, kind):
    return _recomputing(gate, up, kind), (gate, up)


def _recomputing_bwd(kind, residuals, g):
    gate, up = residuals
    return _reference_backward(gate, up, g, **kind._asdict())[1:]


_recomputing.defvjp(_recomputing_fwd, _recomputing_bwd)


class _Tiling(NamedTuple):
    """Elements of one program, its warps, and whether the backward pass writes over its inputs."""

    block: int = BLOCK
    num_warps: int = 4
    in_place: bool = True


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def _activation_and_slope(x: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """float32 x -> (act(x), act'(x)); a kernel that uses only one of them computes only that one."""
    if kind.activation == "gelu":
        return _gelu_and_slope(x)
    if kind.activation == "gelu_pytorch_tanh":
        rate = 2 * math.sqrt(2 / math.pi)
        u, du = rate * (x + 0.044715 * x * x * x), rate * (1 + 3 * 0.044715 * x * x)
    else:
        du = kind.alpha if kind.activation == "clamped_swiglu" else 1.0
        u = du * x
    s = _sigmoid(u)
    return x * s, s + x * s * (1 - s) * du


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    gaussian = jnp.exp(-0.5 * x * x)
    t = 1 / (1 + ERFC_RATE * math.sqrt(0.5) * jnp.abs(x))
    polynomial = jnp.full_like(x, ERFC_COEFFICIENTS[-1])
    for coefficient in ERFC_COEFFICIENTS[-2::-1]:
        polynomial = polynomial * t + coefficient
    tail = 0.5 * t * polynomial * gaussian  # Phi(-|x|)
    phi = jnp.where(x < 0, tail, 1 - tail)
    return x * phi, phi + x * gaussian * (1 / math.sqrt(2 * math.pi))


def _clamped(gate: jax.Array, up: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """(what the activation is taken of, what it is multiplied by)."""
    if kind.activation != "clamped_swiglu":
        return gate, up
    up = jnp.where(up > kind.limit, kind.limit, jnp.where(up < -kind.limit, -kind.limit, up))
    return jnp.where(gate > kind.limit, kind.limit, gate), up + 1


def activated(gate: jax.Array, up: jax.Array, kind: Kind) -> jax.Array:
    """In a kernel: act(gate) * up of float32 values."""
    x, factor = _clamped(gate, up, kind)
    return _activation_and_slope(x, kind)[0] * factor


def _block_index(columns: int, block: int) -> tuple[tuple[Any, Any], jax.Array | None]:
    """(row and columns of this program's block, mask where columns are not whole blocks)."""
    start = backend.program_id(0) * block
    mask = None if columns % block == 0 else start + jnp.arange(block) < columns
    return (backend.program_id(1), backend.ds(start, block)), mask


def _gated_activation_forward(gate_ref, up_ref, out_ref, *, kind: Kind, block: int) -> None:
    index, mask = _block_index(out_ref.shape[-1], block)
    gate, up = (backend.load(ref.at[index], mask=mask).astype(jnp.float32) for ref in (gate_ref, up_ref))
    backend.store(out_ref.at[index], activated(gate, up, kind).astype(out_ref.dtype), mask=mask)


def _gated_activation_backward(gate_ref, up_ref, g_ref, d_gate_ref, d_up_ref, *h_refs, kind: Kind, block: int) -> None:
    index, mask = _block_index(g_ref.shape[-1], block)
    gate, up, g = (backend.load(ref.at[index], mask=mask).astype(jnp.float32) for ref in (gate_ref, up_ref, g_ref))
    x, factor = _clamped(gate, up, kind)
    value, slope = _activation_and_slope(x, kind)
    d_gate, d_up = g * factor * slope, g * value
    if kind.activation == "clamped_swiglu":
        d_gate = jnp.where(gate > kind.limit, 0.0, d_gate)
        d_up = jnp.where(jnp.abs(up) > kind.limit, 0.0, d_up)
    backend.store(d_gate_ref.at[index], d_gate.astype(d_gate_ref.dtype), mask=mask)
    backend.store(d_up_ref.at[index], d_up.astype(d_up_ref.dtype), mask=mask)
    for h_ref in h_refs:
        backend.store(h_ref.at[index], (value * factor).astype(h_ref.dtype), mask=mask)


def _call(kernel, arrays: tuple[jax.Array, ...], out_dtypes: tuple[Any, ...], kind: Kind, tiling: _Tiling, aliases):
    """Runs a kernel over blocks of arrays that have one shape: whole blocks where they divide the size, else rows."""
    shape = arrays[0].shape
    size = math.prod(shape)
    columns = tiling.block if size % tiling.block == 0 else shape[-1]
    block = min(tiling.block, 1 << (columns - 1).bit_length())
    rows = size // columns
    outs = backend.call(
        kernel,
        *(array.reshape(rows, columns) for array in arrays),
        out=tuple(jax.ShapeDtypeStruct((rows, columns), dtype) for dtype in out_dtypes),
        grid=(-(-columns // block), rows),
        num_warps=tiling.num_warps,
        aliases=aliases,
        kind=kind,
        block=block,
    )
    return tuple(out.reshape(shape) for out in outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _kernel_call(gate, up, kind: Kind, tiling: _Tiling):
    (h,) = _call(_gated_activation_forward, (gate, up), (up.dtype,), kind, tiling, {})
    return h


def _kernel_call_fwd(gate, up, kind, tiling):
    return _kernel_call(gate, up, kind, tiling), (gate, up)


def _kernel_call_bwd(kind, tiling, residuals, g):
    gate, up = residuals
    return _backward_kernel_call(gate, up, g, kind, tiling, with_h=False)


_kernel_call.defvjp(_kernel_call_fwd, _kernel_call_bwd)


def _backward_kernel_call(gate, up, g, kind: Kind, tiling: _Tiling, *, with_h: bool) -> tuple[jax.Array, ...]:
    """(d_gate, d_up) or, with h, (d_gate, d_up, h)."""
    dtypes = (gate.dtype, up.dtype, up.dtype) if with_h else (gate.dtype, up.dtype)
    aliases = {i: i for i in range(len(dtypes))} if tiling.in_place else {}
    return _call(_gated_activation_backward, (gate, up, g), dtypes, kind, tiling, aliases)


def _pallas(
    gate: jax.Array, up: jax.Array, *, activation: str = "silu", alpha: float = 1.702, limit: float = 7.0
) -> jax.Array:
    return _kernel_call(gate, up, Kind(activation, alpha, limit), _Tiling())


def _pallas_backward(
    gate: jax.Array,
    up: jax.Array,
    g: jax.Array,
    *,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    kind = Kind(activation, alpha, limit)
    d_gate, d_up, h = _backward_kernel_call(gate, up, g.astype(up.dtype), kind, _Tiling(), with_h=True)
    return h, d_gate, d_up


def _refuses(platform: str, gate: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    if not gate.ndim:
        return "it takes arrays with at least one axis"
    return backend.refuses_platform(platform)


def _rank_backward(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        # 8192 x 14336 on an H100: 0.388 ms, XLA 0.387.
        return (Choice("pallas", "it writes over its inputs: three arrays of [T, F] less, in the same time"),)
    return (Choice("xla", "the kernel is for GPUs"),)


def _arrays(rng: np.random.Generator, names: tuple[str, ...], shape: tuple[int, ...], dtype: Any, scale: float):
    return {name: normal(rng, shape, dtype, scale) for name in names}


def _case(name: str, shape: tuple[int, ...], activation: str, scale: float = 1.0) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return _arrays(rng, ("gate", "up"), shape, dtype, scale) | {"activation": activation}

    return Case(name, make, reduction=1, differentiable=("gate", "up"))


def _backward_case(name: str, shape: tuple[int, ...], activation: str, scale: float = 1.0) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return _arrays(rng, ("gate", "up", "g"), shape, dtype, scale) | {"activation": activation}

    return Case(name, make, reduction=1)


GATED_ACTIVATION = register(
    Op(
        name="gated_activation",
        replaces="activation and product",
        saves="float32 residuals: keeps gate and up only",
        implementations={"xla": Implementation(_reference), "pallas": Implementation(_pallas, refuses=_refuses)},
        cases=(
            _case("silu, odd sizes", (3, 7, 65), "silu"),
            _case("silu, whole blocks", (3, 2, 2048), "silu"),
            _case("gelu", (3, 7, 65), "gelu"),
            _case("gelu_pytorch_tanh", (3, 7, 65), "gelu_pytorch_tanh"),
            # Large enough that gate and up are often clamped.
            _case("clamped_swiglu", (3, 7, 65), "clamped_swiglu", scale=6.0),
        ),
    )
)

GATED_ACTIVATION_BACKWARD = register(
    Op(
        name="gated_activation_backward",
        implementations={
            "xla": Implementation(_reference_backward),
            "pallas": Implementation(_pallas_backward, refuses=_refuses),
        },
        rank=_rank_backward,
        cases=(
            _backward_case("silu, odd sizes", (3, 7, 65), "silu"),
            _backward_case("clamped_swiglu, rows of two blocks", (5, 2049), "clamped_swiglu", scale=6.0),
        ),
    )
)
