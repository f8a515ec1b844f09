"""Linear layers with low-rank adapters, one (`lora_linear`) or three of the same input (`lora_qkv`): see `lora_parts`.

Each is one `custom_vjp` over the parts. x is kept for the backward pass only where an adapter or a weight that trains
needs it, and of a quantized weight its codes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import nf4, nf4_linears
from pallas_kernels.lora_parts import (
    LoraWeights,
    add_bias,
    check_weights,
    flatten,
    gather,
    input_cotangent,
    instantiate,
    like_parameters,
    low_rank,
    low_rank_cotangents,
    parameter_cotangents,
    trained,
    values,
    without_bias,
)
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.op import Case, Implementation, Op, normal, register


def lora_linear(
    x: jax.Array,
    weight: Any,
    bias: jax.Array | None = None,
    lora_A: jax.Array | None = None,
    lora_B: jax.Array | None = None,
    *,
    scale: float | jax.Array = 1.0,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Returns row_scale (x W^T + scale (x A^T) B^T) + bias, [..., out] in x's dtype.

    Args:
      x: [..., in].
      weight, bias, lora_A, lora_B, scale, dropout_key, row_scale: see `LoraWeights`.
      dropout: probability of dropping a value of the adapter's input, in [0, 1); only with a key.
      implementation: "xla" or None.

    Raises:
      ValueError: only one of lora_A and lora_B is given, row_scale without them, shapes do not fit, or dropout is out
        of range.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels import lora_linear
      >>> x, weight = jnp.ones((2, 3)), jnp.ones((4, 3))
      >>> lora_A, lora_B = jnp.ones((1, 3)), jnp.full((4, 1), 0.5)
      >>> lora_linear(x, weight, None, lora_A, lora_B, scale=2.0)[0].tolist()
      [6.0, 6.0, 6.0, 6.0]
      >>> loss = lambda lora_B: jnp.sum(lora_linear(x, weight, None, lora_A, lora_B, scale=2.0))
      >>> jax.grad(loss)(lora_B)[:, 0].tolist()
      [12.0, 12.0, 12.0, 12.0]
    """
    linear = LoraWeights(weight, bias, lora_A, lora_B, row_scale=row_scale)
    check_weights("lora_linear", x.shape[-1], {"": linear}, dropout)
    return LORA_LINEAR(
        x,
        weight,
        bias,
        lora_A,
        lora_B,
        scale=scale,
        dropout=dropout,
        dropout_key=dropout_key,
        row_scale=row_scale,
        implementation=implementation,
    )


def lora_qkv(
    x: jax.Array,
    q: LoraWeights,
    k: LoraWeights,
    v: LoraWeights,
    *,
    dropout: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three linears of one x, each [..., out] in x's dtype; any of them may have an adapter.

    Args:
      x: [..., in].
      q, k, v: the parameters of each.
      dropout: probability of dropping a value of an adapter's input, in [0, 1); for linears with a dropout_key.
      implementation: "xla" or None.

    Raises:
      ValueError: a linear has only one of lora_A and lora_B, shapes do not fit, or dropout is out of range.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import LoraWeights, lora_qkv
      >>> x, wide, narrow = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones((2, 3))
      >>> with_adapter = LoraWeights(wide, lora_A=jnp.ones((1, 3)), lora_B=jnp.ones((4, 1)), scale=0.5)
      >>> q, k, v = lora_qkv(x, with_adapter, LoraWeights(narrow), LoraWeights(narrow, bias=jnp.ones(2)))
      >>> q[0].tolist(), k[0].tolist(), v[0].tolist()
      ([4.5, 4.5, 4.5, 4.5], [3.0, 3.0], [4.0, 4.0])
    """
    linears = {"q": q, "k": k, "v": v}
    check_weights("lora_qkv", x.shape[-1], linears, dropout)
    return LORA_QKV(x, **flatten(linears), dropout=dropout, implementation=implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linears(dropout: float, x: jax.Array, linears: tuple[LoraWeights, ...]) -> tuple[jax.Array, ...]:
    """Linears that share x [T, in]."""
    if nf4_linears.takes(x, linears):
        return nf4_linears.nf4_linears(x, linears)
    return _forward(dropout, x, nf4_linears.plain(linears), packed=True)[0]


def _forward(
    dropout: float, x: jax.Array, linears: tuple[LoraWeights, ...], *, packed: bool = False
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...], tuple[jax.Array | None, ...]]:
    """Every y_i and l_i, and y_i - bias_i where rows are scaled."""
    low = low_rank(x, linears, dropout)
    products = [without_bias(x, *each, dropout, packed=packed) for each in zip(linears, low, strict=True)]
    out = tuple(add_bias(y, linear) for y, linear in zip(products, linears, strict=True))
    kept = tuple(None if linear.row_scale is None else y for y, linear in zip(products, linears, strict=True))
    return out, low, kept


def _linears_fwd(dropout, x, linears):
    trains = trained(linears)
    x, linears = x.value, values(linears)
    out, low, kept = _forward(dropout, x, linears)
    needs_x = any(trains) or any(linear.lora_A is not None for linear in linears)
    return out, (x if needs_x else None, linears, low, kept, tuple(() if train else None for train in trains))


def _linears_bwd(dropout, residuals, cotangents):
    x, linears, low, kept, trains = residuals
    cotangents = tuple(map(instantiate, cotangents))
    d_low = low_rank_cotangents(linears, cotangents)
    trains = [train is not None for train in trains]
    d_linears = parameter_cotangents(x, linears, trains, cotangents, low, d_low, kept, dropout)
    return input_cotangent(linears, cotangents, d_low, dropout), like_parameters(d_linears, linears)


_linears.defvjp(_linears_fwd, _linears_bwd, symbolic_zeros=True)


def _shared_input(dropout: float, x: jax.Array, linears: tuple[LoraWeights, ...]) -> tuple[jax.Array, ...]:
    """`_linears` over any leading axes."""
    out = _linears(dropout, x.reshape(-1, x.shape[-1]), linears)
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], y.shape[-1]), out)


def _linear_reference(
    x: jax.Array,
    weight: Any,
    bias: jax.Array | None = None,
    lora_A: jax.Array | None = None,
    lora_B: jax.Array | None = None,
    *,
    scale: float | jax.Array = 1.0,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    return _shared_input(dropout, x, (LoraWeights(weight, bias, lora_A, lora_B, scale, dropout_key, row_scale),))[0]


def _qkv_reference(x: jax.Array, *, dropout: float = 0.0, **arguments: Any) -> tuple[jax.Array, ...]:
    return _shared_input(dropout, x, gather(("q", "k", "v"), arguments))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """An NF4 weight for cases, tests and benchmarks; jaxft.quant has the complete one.

    Attributes:
      codes, absmax, nested_absmax, nested_offset: see `pallas_kernels.nf4`.
    """

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    nested_offset: jax.Array | None

    def dequantize(self, dtype: Any, row_scale: jax.Array | None = None) -> jax.Array:
        """The weight [out, in] in `dtype`, its rows times `row_scale`."""
        arrays = (self.codes, self.absmax, self.nested_absmax, self.nested_offset)
        return nf4.dequantize(*arrays, dtype=dtype, row_scale=row_scale)

    def matmul(self, x: jax.Array) -> jax.Array:
        """x [T, in] W^T -> [T, out] in x's dtype."""
        return nf4_matmul(x, self.codes, self.absmax, self.nested_absmax, self.nested_offset)


def case_weights(
    rng: np.random.Generator,
    dtype: Any,
    sizes: tuple[int, int],
    rank: int | None,
    *,
    bias: bool,
    packed: bool,
    scaled: bool = False,
) -> LoraWeights:
    """Parameters of one linear [out, in] = `sizes` for a case, scaled so that outputs are O(1)."""
    size_out, size_in = sizes
    weight = normal(rng, sizes, jnp.float32 if packed else dtype, scale=size_in**-0.5)
    return LoraWeights(
        Packed(*jax.jit(functools.partial(nf4.quantize, double_quantization=False))(weight)) if packed else weight,
        normal(rng, (size_out,), dtype) if bias else None,
        normal(rng, (rank, size_in), jnp.float32, scale=size_in**-0.5) if rank else None,
        normal(rng, (size_out, rank), jnp.float32, scale=rank**-0.5) if rank else None,
        scale=0.75,
        dropout_key=None,
        row_scale=1 + normal(rng, (size_out,), jnp.float32, scale=0.25) if scaled and rank else None,
    )


def case_differentiable(
    name: str, rank: int | None, *, bias: bool, packed: bool, scaled: bool = False
) -> tuple[str, ...]:
    """Which of one linear's parameters a case differentiates."""
    parts = ["weight"] * (not packed) + ["bias"] * bias + ["lora_A", "lora_B"] * (rank is not None)
    return tuple(f"{name}{part}" for part in parts + ["row_scale"] * (scaled and rank is not None))


def _linear_case(
    name: str,
    batch: tuple[int, ...],
    sizes: tuple[int, int],
    rank: int | None,
    *,
    bias: bool = False,
    packed: bool = False,
    dropout: float = 0.0,
    scaled: bool = False,
) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        x = normal(rng, (*batch, sizes[1]), dtype)
        weights = case_weights(rng, dtype, sizes, rank, bias=bias, packed=packed, scaled=scaled)
        key = jax.random.key(0) if dropout else None
        return {"x": x, **weights._asdict(), "dropout": dropout, "dropout_key": key}

    differentiable = ("x", *case_differentiable("", rank, bias=bias, packed=packed, scaled=scaled))
    return Case(name, make, reduction=max(math.prod(batch), *sizes), differentiable=differentiable)


def _qkv_case(
    name: str,
    tokens: int,
    size_in: int,
    sizes_out: tuple[int, int, int],
    ranks: tuple[int | None, int | None, int | None],
    *,
    bias: bool = False,
    packed: bool = False,
    dropout: float = 0.0,
    scaled: bool = False,
) -> Case:
    parts = tuple(zip("qkv", sizes_out, ranks, strict=True))

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        x = normal(rng, (tokens, size_in), dtype)
        linears = {
            part: case_weights(rng, dtype, (size, size_in), rank, bias=bias, packed=packed, scaled=scaled)._replace(
                dropout_key=jax.random.key(size) if dropout else None
            )
            for part, size, rank in parts
        }
        return {"x": x, **flatten(linears), "dropout": dropout}

    settings = {"bias": bias, "packed": packed, "scaled": scaled}
    differentiable = [field for part, _, rank in parts for field in case_differentiable(f"{part}_", rank, **settings)]
    return Case(name, make, reduction=max(tokens, size_in, *sizes_out), differentiable=("x", *differentiable))


LORA_LINEAR = register(
    Op(
        name="lora_linear",
        replaces="base, adapter and their backward passes",
        saves="the decoded weight as a residual; a pass for the adapter",
        implementations={"xla": Implementation(_linear_reference)},
        cases=(
            _linear_case("adapter", (2, 7), (49, 33), 4),
            _linear_case("adapter, bias, scaled rows", (5,), (17, 64), 1, bias=True, scaled=True),
            _linear_case("plain", (3, 1, 5), (23, 19), None),
            _linear_case("over NF4, dropout, scaled rows", (7,), (33, 66), 3, packed=True, dropout=0.25, scaled=True),
        ),
        roundings=4,
    )
)

LORA_QKV = register(
    Op(
        name="lora_qkv",
        replaces="three linears with adapters",
        saves="reading x once for each adapter",
        implementations={"xla": Implementation(_qkv_reference)},
        cases=(
            _qkv_case("grouped heads", 7, 33, (24, 8, 8), (4, 4, 4)),
            _qkv_case(
                "over NF4, k without adapter, scaled", 5, 66, (20, 10, 10), (3, None, 1), packed=True, scaled=True
            ),
            _qkv_case("bias, dropout", 9, 20, (16, 8, 8), (2, 2, 2), bias=True, dropout=0.5),
        ),
        roundings=4,
    )
)
