"""The maths of linears with low-rank adapters (Hu et al. 2021, arXiv:2106.09685), over plain or quantized weights.

    y_i = x W_i^T + bias_i + l_i B_i^T       l_i = s_i x A_i^T
    x [T, in], W_i [out_i, in], A_i [r_i, in], B_i [out_i, r_i]

for several linears that read the same x. `lora_linear`, `lora_qkv` and `lora_mlp` are built of these parts.
With g_i the cotangent of y_i, the small factors come first, and the [T, r] products are shared:

    d_i = s_i g_i B_i            dB_i = g_i^T l_i            dA_i = d_i^T x
    dx = sum over i of g_i W_i + d_i A_i            dW_i = g_i^T x, only where W_i is being differentiated

The A_i are one matrix [sum r_i, in] in all three places where they occur. With dropout each adapter has an input of its
own, x * mask / keep, and the three products are those of `dropout`.

Rows may be scaled, as DoRA's are (Liu et al. 2024, arXiv:2402.09353; c_i is magnitude over norm, see `row_norms`):

    y_i = c_i (x W_i^T + l_i B_i^T) + bias_i            dc_i = sum over T of g_i (y_i - bias_i) / c_i

c_i is multiplied into the rows of W_i as they are decoded and into those of B_i, so no array of T rows is read or
written for it; only its gradient takes one more pass over g_i and y_i. With dropout DoRA, as peft computes it, scales
what the dropped input x' gives, and only that: y_i = (x - x') W_i^T + c_i (x' W_i^T + l_i B_i^T) + bias_i, which takes
two products with W_i.

Every product is of two arrays in x's dtype, summed in float32. Products of T rows are rounded to x's dtype, and the
low-rank one is made *before* the large one, which then adds it as it writes its result (one cuBLAS call, beta = 1):
after it, it would read and write all of y again. XLA gives the addition to the sum's first term, so that is the large
one. Gradients of parameters stay float32 until they take the parameter's
own dtype. The rule is written out because autodiff of a mixed-precision product gives a float32 GEMM for dx and a
bfloat16 dW, and because a decoded weight would be kept: a quantized weight is taken as frozen, is kept packed, and is
decoded again in the backward pass. x is kept only where an adapter or a weight that trains needs it.

Where nothing is differentiated, few tokens are multiplied by a packed weight as it is: decoding text would otherwise
write and read a decoded weight for every token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.dropout import dropout_products, keep_mask, kept_share, seed
from pallas_kernels.nf4_matmul import MAX_TOKENS
from pallas_kernels.precision import einsum_float32, einsum_rounded

LOW_RANK = "lora_low_rank"  # checkpoint name of every l_i: tiny, and recomputing it needs the adapter's whole input


class Adapter(NamedTuple):
    """The low-rank part of a linear that has one; attributes as of `LoraWeights`, but with B's rows scaled."""

    A: jax.Array
    B: jax.Array
    scale: float | jax.Array
    dropout_key: jax.Array | None


class LoraWeights(NamedTuple):
    """The parameters of one linear.

    Attributes:
      weight: array [out, in] of any float dtype, or a pytree with a method `dequantize(dtype) -> [out, in]`, which is
        taken to be frozen, and possibly `matmul(x [T, in]) -> [T, out]`, for few tokens without a gradient.
      bias: [out] or None.
      lora_A, lora_B: [r, in] and [out, r], or both None. Their gradients come in their own dtype.
      scale: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA; a constant, without a gradient.
      dropout_key: PRNG key of the adapter's dropout, or None to drop nothing; linears that share x have all one of
        their own, or none.
      row_scale: float32 [out], what the rows of weight and adapter are multiplied by (DoRA), or None; only beside an
        adapter. A weight with `dequantize` takes it as a second argument.
    """

    weight: Any
    bias: jax.Array | None = None
    lora_A: jax.Array | None = None
    lora_B: jax.Array | None = None
    scale: float | jax.Array = 1.0
    dropout_key: jax.Array | None = None
    row_scale: jax.Array | None = None

    @property
    def adapter(self) -> Adapter | None:
        """The low-rank part, if there is one."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return Adapter(self.lora_A, _scale_rows(self.lora_B, self.row_scale), self.scale, self.dropout_key)


def check_weights(op: str, size_in: int, linears: dict[str, LoraWeights], dropout: float) -> None:
    """Refuses linears whose parts do not fit each other or an input of `size_in` columns."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), not {dropout}")
    if len({linear.dropout_key is None for linear in linears.values() if linear.lora_A is not None}) > 1:
        raise ValueError(f"{op}: each of {', '.join(linears)} with an adapter has a dropout_key, or none")
    for name, linear in linears.items():
        weight, lora_A, lora_B, row_scale = linear.weight, linear.lora_A, linear.lora_B, linear.row_scale
        of = f"{op}: {name}_" if name else f"{op}: "
        if (lora_A is None) != (lora_B is None):
            raise ValueError(f"{of}lora_A and lora_B come together, or not at all")
        if isinstance(weight, jax.Array) and weight.shape[1:] != (size_in,):
            raise ValueError(f"{of}weight {weight.shape} does not fit an input of {size_in} columns")
        if lora_A is None or lora_B is None:
            if row_scale is not None:
                raise ValueError(f"{of}row_scale needs an adapter beside it")
            continue
        if lora_A.shape[1] != size_in or lora_A.shape[0] != lora_B.shape[1]:
            shapes = f"lora_A {lora_A.shape} and lora_B {lora_B.shape}"
            raise ValueError(f"{of}{shapes} do not fit an input of {size_in} columns")
        if row_scale is not None and row_scale.shape != lora_B.shape[:1]:
            raise ValueError(f"{of}row_scale {row_scale.shape} does not fit {lora_B.shape[0]} rows")


def flatten(linears: dict[str, LoraWeights]) -> dict[str, Any]:
    """{"q": weights} -> {"q_weight": ..., "q_bias": ...}: an op's arguments are arrays, each with its own name."""
    return {f"{name}_{part}": x for name, weights in linears.items() for part, x in weights._asdict().items()}


def gather(names: Sequence[str], arguments: dict[str, Any]) -> tuple[LoraWeights, ...]:
    """The inverse of `flatten`; what is not among the arguments has its default."""
    prefixed = [f"{name}_{part}" for name in names for part in LoraWeights._fields]
    assert set(arguments) <= set(prefixed), f"unknown: {sorted(set(arguments) - set(prefixed))}"
    return tuple(
        LoraWeights(**{part: arguments[key] for part in LoraWeights._fields if (key := f"{name}_{part}") in arguments})
        for name in names
    )


def decoded(weight: Any, dtype: Any, row_scale: jax.Array | None = None) -> jax.Array:
    """[out, in] in `dtype`, its rows times `row_scale`.

    Example:
      >>> import jax.numpy as jnp
      >>> decoded(jnp.ones((2, 3)), jnp.float32, jnp.asarray([1.0, 2.0])).tolist()
      [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    if not hasattr(weight, "dequantize"):
        return _scale_rows(weight, row_scale).astype(dtype)
    return weight.dequantize(dtype) if row_scale is None else weight.dequantize(dtype, row_scale)


def _scale_rows(matrix: jax.Array, row_scale: jax.Array | None) -> jax.Array:
    """[out, ...] times float32 [out], in float32; as it is where there is no scale."""
    return matrix if row_scale is None else matrix.astype(jnp.float32) * row_scale[:, None]


def row_norms(
    weight: Any, squared_norms: jax.Array, lora_A: jax.Array, lora_B: jax.Array, scale: float | jax.Array, dtype: Any
) -> jax.Array:
    """The norm of each row of W + scale B A, float32 [out], without that matrix:

        ||w + s b A||^2 = ||w||^2 + 2 s b . (W A^T) + s^2 b (A A^T) b^T        for a row w of W and its b of B

    W A^T is the one product with W, of r columns; a packed weight is multiplied as it is. DoRA treats the norm as a
    constant (section 4.3 of arXiv:2402.09353), and so it has no gradient here.

    Args:
      weight: see `LoraWeights`.
      squared_norms: float32 [out], ||w||^2 of each row: constant, so it is computed once.
      lora_A, lora_B, scale: see `LoraWeights`.
      dtype: of the product with W: that of the activations.

    Example:
      >>> import jax.numpy as jnp
      >>> W, lora_A, lora_B = 3 * jnp.eye(2, 3), jnp.ones((1, 3)), jnp.asarray([[0.0], [1.0]])
      >>> (row_norms(W, jnp.sum(W**2, axis=1), lora_A, lora_B, 1.0, jnp.float32) ** 2).round().tolist()
      [9.0, 18.0]
    """
    A, B = jax.lax.stop_gradient((lora_A.astype(jnp.float32), lora_B.astype(jnp.float32)))
    few = A.shape[0] <= MAX_TOKENS and hasattr(weight, "matmul")
    rows = A.astype(dtype)
    products = weight.matmul(rows) if few else einsum_rounded("ri,oi->ro", rows, decoded(weight, dtype), dtype)
    scale = jnp.asarray(scale, jnp.float32).reshape(1)
    cross = jnp.sum(products.astype(jnp.float32).T * B, axis=1)
    own = jnp.sum(einsum_float32("or,rs->os", B, einsum_float32("ri,si->rs", A, A)) * B, axis=1)
    # Rounding must not make a row that the adapter cancels the root of a negative number.
    return jnp.sqrt(jnp.maximum(squared_norms + 2 * scale * cross + scale * scale * own, 0))


def low_rank(x: jax.Array, linears: Sequence[LoraWeights], dropout: float) -> tuple[jax.Array | None, ...]:
    """Every l_i [T, r_i] in x's dtype, named for remat policies; None where there is no adapter."""
    adapters = _adapters(linears)
    if not adapters:
        return (None,) * len(linears)
    if _drops(adapters, dropout):
        masked = _Masked(adapters, x, dropout)
        products = masked.unstacked(masked.run.low_rank(x, masked.A, masked.seeds, dropout), axis=1)
    else:
        products = _split(einsum_float32("ti,ri->tr", x, _stacked_A(adapters, x.dtype)), adapters, axis=1)
    return _at_adapters(linears, [_scaled(y, p, x.dtype) for y, p in zip(products, adapters, strict=True)])


def _scaled(product: jax.Array, adapter: Adapter, dtype: Any) -> jax.Array:
    """l_i (or d_i) of a float32 product with A_i (or B_i), named for remat policies."""
    scale = jnp.asarray(adapter.scale, jnp.float32).reshape(1, 1)
    return checkpoint_name((product * scale).astype(dtype), LOW_RANK)


def _times_weight(x: jax.Array, weight: Any, row_scale: jax.Array | None, packed: bool) -> jax.Array:
    """row_scale * x W^T [T, out] in x's dtype; `packed` allows not to decode a quantized weight first."""
    # Without the barrier XLA joins the products that share x: it copies their weights into one, and its result apart.
    if packed and x.shape[0] <= MAX_TOKENS and hasattr(weight, "matmul"):
        y = weight.matmul(jax.lax.optimization_barrier(x))
        return y if row_scale is None else (y.astype(jnp.float32) * row_scale[None, :]).astype(y.dtype)
    x, weight = jax.lax.optimization_barrier((x, decoded(weight, x.dtype, row_scale)))
    return einsum_rounded("ti,oi->to", x, weight, x.dtype)


def _scaled_part(x: jax.Array, linear: LoraWeights, low: jax.Array | None, packed: bool = False) -> jax.Array:
    """row_scale * (x W^T + l B^T) [T, out]."""
    y = _times_weight(x, linear.weight, linear.row_scale, packed)
    if low is None or linear.adapter is None:
        return y
    return y + einsum_rounded("tr,or->to", low, linear.adapter.B.astype(x.dtype), x.dtype)


def apply(
    x: jax.Array, linear: LoraWeights, low: jax.Array | None, dropout: float, *, packed: bool = False
) -> jax.Array:
    """y_i [T, out_i], given l_i; `packed` is for where nothing is differentiated."""
    return add_bias(without_bias(x, linear, low, dropout, packed=packed), linear)


def without_bias(
    x: jax.Array, linear: LoraWeights, low: jax.Array | None, dropout: float, *, packed: bool = False
) -> jax.Array:
    """y_i - bias_i."""
    if not scales_dropped(linear, dropout):
        return _scaled_part(x, linear, low, packed)
    dropped = _dropped(x, linear.dropout_key, dropout)
    return _times_weight(x - dropped, linear.weight, None, packed) + _scaled_part(dropped, linear, low, packed)


def add_bias(y: jax.Array, linear: LoraWeights) -> jax.Array:
    """y_i of what `without_bias` gave."""
    return y if linear.bias is None else y + jnp.broadcast_to(linear.bias.astype(y.dtype), y.shape)


def subtract_bias(y: jax.Array, linear: LoraWeights) -> jax.Array:
    """What `without_bias` gave, of y_i."""
    return y if linear.bias is None else y - jnp.broadcast_to(linear.bias.astype(y.dtype), y.shape)


def low_rank_cotangents(
    linears: Sequence[LoraWeights], cotangents: Sequence[jax.Array]
) -> tuple[jax.Array | None, ...]:
    """Every d_i [T, r_i] in the cotangents' dtype; None where there is no adapter."""
    pairs = ((linear.adapter, g) for linear, g in zip(linears, cotangents, strict=True))
    return tuple(
        None if p is None else _scaled(einsum_float32("to,or->tr", g, p.B.astype(g.dtype)), p, g.dtype)
        for p, g in pairs
    )


def input_cotangent(
    linears: Sequence[LoraWeights],
    cotangents: Sequence[jax.Array],
    d_low: Sequence[jax.Array | None],
    dropout: float,
) -> jax.Array:
    """dx [T, in]: the low-rank part first, then each g_i W_i added to it."""
    dtype = cotangents[0].dtype
    adapters, d_adapters = _adapters(linears), [d for d in d_low if d is not None]
    parts = []
    if _drops(adapters, dropout):
        masked = _Masked(adapters, cotangents[0], dropout)
        parts.append(masked.run.d_x(masked.stacked(d_adapters, axis=1), masked.A, masked.seeds, dropout))
    elif adapters:
        stacked = jnp.concatenate(d_adapters, axis=1)
        parts.append(einsum_rounded("tr,ri->ti", stacked, _stacked_A(adapters, dtype), dtype))
    for linear, g in zip(linears, cotangents, strict=True):
        part = einsum_rounded("to,oi->ti", g, decoded(linear.weight, dtype, linear.row_scale), dtype)
        if scales_dropped(linear, dropout):
            plain = einsum_rounded("to,oi->ti", g, decoded(linear.weight, dtype), dtype)
            part = plain + _dropped(part - plain, linear.dropout_key, dropout)
        parts.append(part)
    return functools.reduce(lambda done, part: part + done, parts)


def parameter_cotangents(
    x: jax.Array | None,
    linears: Sequence[LoraWeights],
    trains: Sequence[bool],
    cotangents: Sequence[jax.Array],
    low: Sequence[jax.Array | None],
    d_low: Sequence[jax.Array | None],
    outputs: Sequence[jax.Array | None],
    dropout: float,
) -> tuple[LoraWeights, ...]:
    """The gradients of every linear's parameters, float32.

    Args:
      x: their input; None where no parameter needs it.
      trains: which plain weights want theirs.
      cotangents, low, d_low: g_i, l_i and d_i.
      outputs: y_i - bias_i of linears with scaled rows; None where it was not kept and is to be made again.
    """
    d_A = _d_A(x, linears, d_low, dropout)
    found = []
    for linear, train, g, low_i, d_A_i, y in zip(linears, trains, cotangents, low, d_A, outputs, strict=True):
        d_weight = _d_weight(x, linear, g, dropout) if train and x is not None else None
        d_bias = None if linear.bias is None else jnp.sum(g.astype(jnp.float32), axis=0)
        d_B = None if low_i is None else _scale_rows(einsum_float32("to,tr->or", g, low_i), linear.row_scale)
        d_rows = None if x is None else _d_row_scale(x, linear, g, low_i, y, dropout)
        found.append(LoraWeights._make((d_weight, d_bias, d_A_i, d_B, None, None, d_rows)))
    return tuple(found)


def _d_weight(x: jax.Array, linear: LoraWeights, g: jax.Array, dropout: float) -> jax.Array:
    if not scales_dropped(linear, dropout):
        return _scale_rows(einsum_float32("to,ti->oi", g, x), linear.row_scale)
    dropped = _dropped(x, linear.dropout_key, dropout)
    scaled = _scale_rows(einsum_float32("to,ti->oi", g, dropped), linear.row_scale)
    return scaled + einsum_float32("to,ti->oi", g, x - dropped)


def _d_row_scale(
    x: jax.Array, linear: LoraWeights, g: jax.Array, low: jax.Array | None, y: jax.Array | None, dropout: float
) -> jax.Array | None:
    """Of a row that is scaled by 0, what it gave cannot be told any more; its gradient is 0."""
    if linear.row_scale is None:
        return None
    dropped = scales_dropped(linear, dropout)
    if y is None or dropped:
        y = _scaled_part(_dropped(x, linear.dropout_key, dropout) if dropped else x, linear, low)
    product = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=0)
    return jnp.where(linear.row_scale == 0, 0.0, product / linear.row_scale)


def like_parameters(gradients: Sequence[LoraWeights], linears: Sequence[LoraWeights]) -> tuple[LoraWeights, ...]:
    """Every gradient in its parameter's own dtype."""

    def like(gradient: Any, parameter: Any) -> Any:
        return None if gradient is None else gradient.astype(parameter.dtype)

    return tuple(
        LoraWeights._make([like(gradient, parameter) for gradient, parameter in zip(*pair, strict=True)])
        for pair in zip(gradients, linears, strict=True)
    )


def _d_A(
    x: jax.Array | None, linears: Sequence[LoraWeights], d_low: Sequence[jax.Array | None], dropout: float
) -> Sequence[jax.Array | None]:
    adapters, d_adapters = _adapters(linears), [d for d in d_low if d is not None]
    if not adapters or x is None:
        return (None,) * len(linears)
    if _drops(adapters, dropout):
        masked = _Masked(adapters, x, dropout)
        d_A = masked.run.d_A(x, masked.stacked(d_adapters, axis=1), masked.seeds, dropout)
        products = masked.unstacked(d_A, axis=0)
    else:
        products = _split(einsum_float32("tr,ti->ri", jnp.concatenate(d_adapters, axis=1), x), adapters, axis=0)
    return _at_adapters(linears, products)


def _adapters(linears: Sequence[LoraWeights]) -> list[Adapter]:
    return [linear.adapter for linear in linears if linear.adapter is not None]


def _stacked_A(adapters: Sequence[Adapter], dtype: Any) -> jax.Array:
    return jnp.concatenate([p.A for p in adapters], axis=0).astype(dtype)


def _split(x: jax.Array, adapters: Sequence[Adapter], axis: int) -> list[jax.Array]:
    """Parts of `x` as long as each adapter's rank."""
    ends = np.cumsum([p.A.shape[0] for p in adapters])
    return jnp.split(x, ends[:-1], axis=axis)


def _at_adapters(linears: Sequence[LoraWeights], values: Sequence[jax.Array]) -> tuple[jax.Array | None, ...]:
    """One value for each linear with an adapter, None for the others."""
    remaining = iter(values)
    return tuple(None if linear.adapter is None else next(remaining) for linear in linears)


def _drops(adapters: Sequence[Adapter], dropout: float) -> bool:
    return dropout > 0 and any(p.dropout_key is not None for p in adapters)


class _Masked:
    """Adapters of one x [T, in] as arrays for `dropout`'s products, ranks filled up with zeros to the largest."""

    def __init__(self, adapters: Sequence[Adapter], x: jax.Array, dropout: float) -> None:
        self.ranks = [p.A.shape[0] for p in adapters]
        self.A = self.stacked([p.A.astype(x.dtype) for p in adapters], axis=0)
        self.seeds = jnp.stack([seed(p.dropout_key) for p in adapters if p.dropout_key is not None])
        self.run = dropout_products(x, self.A, self.seeds, rate=dropout)

    def stacked(self, arrays: Sequence[jax.Array], axis: int) -> jax.Array:
        """One array of each adapter's, whose `axis` is the rank."""
        more = [max(self.ranks) - rank for rank in self.ranks]
        return jnp.stack(
            [jnp.pad(x, [(0, n * (i == axis)) for i in range(2)]) for x, n in zip(arrays, more, strict=True)]
        )

    def unstacked(self, array: jax.Array, axis: int) -> list[jax.Array]:
        """The inverse of `stacked`."""
        parts = zip(array, self.ranks, strict=True)
        return [jax.lax.slice_in_dim(part, 0, rank, axis=axis) for part, rank in parts]


def scales_dropped(linear: LoraWeights, dropout: float) -> bool:
    """Whether rows are scaled for the dropped input only."""
    return dropout > 0 and linear.dropout_key is not None and linear.row_scale is not None


def _dropped(x: jax.Array, dropout_key: jax.Array | None, dropout: float) -> jax.Array:
    """x * mask / keep: the adapter's input, and what its cotangent goes back through."""
    if dropout_key is None:
        return x
    scaled = x / jnp.asarray(kept_share(dropout), x.dtype)
    return jnp.where(keep_mask(seed(dropout_key), x.shape, dropout), scaled, jnp.zeros_like(x))


def instantiate(cotangent: Any) -> jax.Array:
    """The zeros behind the cotangent of a result that nothing uses."""
    return _zeros(cotangent) if isinstance(cotangent, jax.custom_derivatives.SymbolicZero) else cotangent


def _zeros(like: Any) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def values(primals: Any) -> Any:
    """The values of what a forward rule with symbolic zeros gets."""
    return jax.tree.map(
        lambda primal: primal.value, primals, is_leaf=lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
    )


def trained(linears: Sequence[LoraWeights]) -> tuple[bool, ...]:
    """Which weights are plain arrays that are being differentiated, of a forward rule's arguments."""
    primal = jax.custom_derivatives.CustomVJPPrimal
    return tuple(isinstance(linear.weight, primal) and linear.weight.perturbed for linear in linears)
