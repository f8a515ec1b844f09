"""Linear layers with low-rank adapters (Hu et al. 2021, arXiv:2106.09685), over plain or quantized weights.

    y_i = x W_i^T + bias_i + l_i B_i^T       l_i = s_i x A_i^T
    x [T, in], W_i [out_i, in], A_i [r_i, in], B_i [out_i, r_i]

for one linear (`lora_linear`) or for several that read the same x (`lora_qkv`; `lora_mlp` is built of the same parts).
With g_i the cotangent of y_i, the small factors come first, and the [T, r] products are shared:

    d_i = s_i g_i B_i            dB_i = g_i^T l_i            dA_i = d_i^T x
    dx = sum over i of g_i W_i + d_i A_i            dW_i = g_i^T x, only where W_i is being differentiated

The A_i are one matrix [sum r_i, in] in all three places where they occur. With dropout the adapter's input is
x * mask / keep, a mask for each linear; the mask is made again from its key in the backward pass.

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

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import nf4, nf4_linears
from pallas_kernels.nf4_matmul import MAX_TOKENS, nf4_matmul
from pallas_kernels.op import Case, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32, einsum_rounded

LOW_RANK = "lora_low_rank"  # checkpoint name of every l_i: tiny, and recomputing it needs the adapter's whole input


class Adapter(NamedTuple):
    """The low-rank part of a linear that has one; attributes as of `LoraWeights`."""

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
      dropout_key: PRNG key of the adapter's dropout, or None to drop nothing.
    """

    weight: Any
    bias: jax.Array | None = None
    lora_A: jax.Array | None = None
    lora_B: jax.Array | None = None
    scale: float | jax.Array = 1.0
    dropout_key: jax.Array | None = None

    @property
    def adapter(self) -> Adapter | None:
        """The low-rank part, if there is one."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return Adapter(self.lora_A, self.lora_B, self.scale, self.dropout_key)


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
    implementation: str | None = None,
) -> jax.Array:
    """Returns x W^T (+ bias) + scale (x A^T) B^T, [..., out] in x's dtype.

    Args:
      x: [..., in].
      weight, bias, lora_A, lora_B, scale, dropout_key: see `LoraWeights`.
      dropout: probability of dropping a value of the adapter's input, in [0, 1); only with a key.
      implementation: "xla" or None.

    Raises:
      ValueError: only one of lora_A and lora_B is given, shapes do not fit, or dropout is out of range.
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
    check_weights("lora_linear", x.shape[-1], {"": LoraWeights(weight, bias, lora_A, lora_B)}, dropout)
    return LORA_LINEAR(
        x,
        weight,
        bias,
        lora_A,
        lora_B,
        scale=scale,
        dropout=dropout,
        dropout_key=dropout_key,
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


def check_weights(op: str, size_in: int, linears: dict[str, LoraWeights], dropout: float) -> None:
    """Refuses linears whose parts do not fit each other or an input of `size_in` columns."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), not {dropout}")
    for name, (weight, _, lora_A, lora_B, *_) in linears.items():
        of = f"{op}: {name}_" if name else f"{op}: "
        if (lora_A is None) != (lora_B is None):
            raise ValueError(f"{of}lora_A and lora_B come together, or not at all")
        if isinstance(weight, jax.Array) and weight.shape[1:] != (size_in,):
            raise ValueError(f"{of}weight {weight.shape} does not fit an input of {size_in} columns")
        if lora_A is None or lora_B is None:
            continue
        if lora_A.shape[1] != size_in or lora_A.shape[0] != lora_B.shape[1]:
            shapes = f"lora_A {lora_A.shape} and lora_B {lora_B.shape}"
            raise ValueError(f"{of}{shapes} do not fit an input of {size_in} columns")


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


def decoded(weight: Any, dtype: Any) -> jax.Array:
    """[out, in] in `dtype`."""
    return weight.dequantize(dtype) if hasattr(weight, "dequantize") else weight.astype(dtype)


def low_rank(x: jax.Array, linears: Sequence[LoraWeights], dropout: float) -> tuple[jax.Array | None, ...]:
    """Every l_i [T, r_i] in x's dtype, named for remat policies; None where there is no adapter."""
    adapters = _adapters(linears)
    if not adapters:
        return (None,) * len(linears)
    if _drops(adapters, dropout):
        products = [einsum_float32("ti,ri->tr", _dropped(x, p, dropout), p.A.astype(x.dtype)) for p in adapters]
    else:
        products = _split(einsum_float32("ti,ri->tr", x, _stacked_A(adapters, x.dtype)), adapters, axis=1)
    return _at_adapters(linears, [_scaled(y, p, x.dtype) for y, p in zip(products, adapters, strict=True)])


def _scaled(product: jax.Array, adapter: Adapter, dtype: Any) -> jax.Array:
    """l_i (or d_i) of a float32 product with A_i (or B_i), named for remat policies."""
    scale = jnp.asarray(adapter.scale, jnp.float32).reshape(1, 1)
    return checkpoint_name((product * scale).astype(dtype), LOW_RANK)


def _times_weight(x: jax.Array, weight: Any, packed: bool) -> jax.Array:
    """x W^T [T, out] in x's dtype; `packed` allows not to decode a quantized weight first."""
    # Without the barrier XLA joins the products that share x: it copies their weights into one, and its result apart.
    if packed and x.shape[0] <= MAX_TOKENS and hasattr(weight, "matmul"):
        return weight.matmul(jax.lax.optimization_barrier(x))
    x, weight = jax.lax.optimization_barrier((x, decoded(weight, x.dtype)))
    return einsum_rounded("ti,oi->to", x, weight, x.dtype)


def apply(x: jax.Array, linear: LoraWeights, low: jax.Array | None, *, packed: bool = False) -> jax.Array:
    """y_i [T, out_i], given l_i; `packed` is for where nothing is differentiated."""
    y = _times_weight(x, linear.weight, packed)
    if low is not None and linear.lora_B is not None:
        y = y + einsum_rounded("tr,or->to", low, linear.lora_B.astype(x.dtype), x.dtype)
    return y if linear.bias is None else y + jnp.broadcast_to(linear.bias.astype(y.dtype), y.shape)


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
    if adapters and _drops(adapters, dropout):
        for p, d in zip(adapters, d_adapters, strict=True):
            parts.append(_dropped(einsum_rounded("tr,ri->ti", d, p.A.astype(dtype), dtype), p, dropout))
    elif adapters:
        stacked = jnp.concatenate(d_adapters, axis=1)
        parts.append(einsum_rounded("tr,ri->ti", stacked, _stacked_A(adapters, dtype), dtype))
    for linear, g in zip(linears, cotangents, strict=True):
        parts.append(einsum_rounded("to,oi->ti", g, decoded(linear.weight, dtype), dtype))
    return functools.reduce(lambda done, part: part + done, parts)


def parameter_cotangents(
    x: jax.Array | None,
    linears: Sequence[LoraWeights],
    trains: Sequence[bool],
    cotangents: Sequence[jax.Array],
    low: Sequence[jax.Array | None],
    d_low: Sequence[jax.Array | None],
    dropout: float,
) -> tuple[LoraWeights, ...]:
    """dW, dbias, dA and dB of every linear, float32; `trains` says which plain weights want theirs."""
    d_A = _d_A(x, linears, d_low, dropout)
    found = []
    for linear, train, g, low_i, d_A_i in zip(linears, trains, cotangents, low, d_A, strict=True):
        d_weight = einsum_float32("to,ti->oi", g, x) if train and x is not None else None
        d_bias = None if linear.bias is None else jnp.sum(g.astype(jnp.float32), axis=0)
        d_B = None if low_i is None else einsum_float32("to,tr->or", g, low_i)
        found.append(LoraWeights._make((d_weight, d_bias, d_A_i, d_B, None, None)))
    return tuple(found)


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
        dropped = (_dropped(x, p, dropout) for p in adapters)
        products = [einsum_float32("tr,ti->ri", d, x_i) for d, x_i in zip(d_adapters, dropped, strict=True)]
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


def _dropped(x: jax.Array, adapter: Adapter, dropout: float) -> jax.Array:
    """x * mask / keep: the adapter's input, and what its cotangent goes back through."""
    if adapter.dropout_key is None:
        return x
    keep = np.float32(1.0 - dropout)
    mask = jax.random.bernoulli(adapter.dropout_key, keep, x.shape)
    return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linears(dropout: float, x: jax.Array, linears: tuple[LoraWeights, ...]) -> tuple[jax.Array, ...]:
    """Linears that share x [T, in]."""
    if nf4_linears.takes(x, linears):
        return nf4_linears.nf4_linears(x, linears)
    return _forward(dropout, x, nf4_linears.plain(linears), packed=True)[0]


def _forward(
    dropout: float, x: jax.Array, linears: tuple[LoraWeights, ...], *, packed: bool = False
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
    low = low_rank(x, linears, dropout)
    return tuple(apply(x, linear, low_i, packed=packed) for linear, low_i in zip(linears, low, strict=True)), low


def _linears_fwd(dropout, x, linears):
    trains = trained(linears)
    x, linears = x.value, values(linears)
    out, low = _forward(dropout, x, linears)
    needs_x = any(trains) or any(linear.lora_A is not None for linear in linears)
    return out, (x if needs_x else None, linears, low, tuple(() if train else None for train in trains))


def _linears_bwd(dropout, residuals, cotangents):
    x, linears, low, trains = residuals
    cotangents = tuple(map(instantiate, cotangents))
    d_low = low_rank_cotangents(linears, cotangents)
    trains = [train is not None for train in trains]
    d_linears = parameter_cotangents(x, linears, trains, cotangents, low, d_low, dropout)
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
) -> jax.Array:
    return _shared_input(dropout, x, (LoraWeights(weight, bias, lora_A, lora_B, scale, dropout_key),))[0]


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

    def dequantize(self, dtype: Any) -> jax.Array:
        """The weight [out, in] in `dtype`."""
        return nf4.dequantize(self.codes, self.absmax, self.nested_absmax, self.nested_offset, dtype=dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        """x [T, in] W^T -> [T, out] in x's dtype."""
        return nf4_matmul(x, self.codes, self.absmax, self.nested_absmax, self.nested_offset)


def case_weights(
    rng: np.random.Generator, dtype: Any, sizes: tuple[int, int], rank: int | None, *, bias: bool, packed: bool
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
    )


def case_differentiable(name: str, rank: int | None, *, bias: bool, packed: bool) -> tuple[str, ...]:
    """Which of one linear's parameters a case differentiates."""
    parts = ["weight"] * (not packed) + ["bias"] * bias + ["lora_A", "lora_B"] * (rank is not None)
    return tuple(f"{name}{part}" for part in parts)


def _linear_case(
    name: str,
    batch: tuple[int, ...],
    sizes: tuple[int, int],
    rank: int | None,
    *,
    bias: bool = False,
    packed: bool = False,
    dropout: float = 0.0,
) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        x = normal(rng, (*batch, sizes[1]), dtype)
        weights = case_weights(rng, dtype, sizes, rank, bias=bias, packed=packed)
        key = jax.random.key(0) if dropout else None
        return {"x": x, **weights._asdict(), "dropout": dropout, "dropout_key": key}

    differentiable = ("x", *case_differentiable("", rank, bias=bias, packed=packed))
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
) -> Case:
    parts = tuple(zip("qkv", sizes_out, ranks, strict=True))

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        x = normal(rng, (tokens, size_in), dtype)
        linears = {
            part: case_weights(rng, dtype, (size, size_in), rank, bias=bias, packed=packed)._replace(
                dropout_key=jax.random.key(size) if dropout else None
            )
            for part, size, rank in parts
        }
        return {"x": x, **flatten(linears), "dropout": dropout}

    differentiable = [
        field for part, _, rank in parts for field in case_differentiable(f"{part}_", rank, bias=bias, packed=packed)
    ]
    return Case(name, make, reduction=max(tokens, size_in, *sizes_out), differentiable=("x", *differentiable))


LORA_LINEAR = register(
    Op(
        name="lora_linear",
        replaces="base, adapter and their backward passes",
        saves="the decoded weight as a residual; a pass for the adapter",
        implementations={"xla": Implementation(_linear_reference)},
        cases=(
            _linear_case("adapter", (2, 7), (49, 33), 4),
            _linear_case("adapter, bias", (5,), (17, 64), 1, bias=True),
            _linear_case("plain", (3, 1, 5), (23, 19), None),
            _linear_case("over NF4, dropout", (7,), (33, 66), 3, packed=True, dropout=0.25),
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
            _qkv_case("over NF4, k without adapter, two ranks", 5, 66, (20, 10, 10), (3, None, 1), packed=True),
            _qkv_case("bias, dropout", 9, 20, (16, 8, 8), (2, 2, 2), bias=True, dropout=0.5),
        ),
        roundings=4,
    )
)
