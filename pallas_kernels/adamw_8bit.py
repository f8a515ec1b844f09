"""AdamW with 8-bit states (Dettmers et al. 2022, arXiv:2110.02861; Loshchilov and Hutter 2019, arXiv:1711.05101).

Both moments are kept as blocks of 256 values: a code a value and one float32 absmax a block,

    m[i] = signed_map[m_codes[i]] * m_absmax[i // 256]            v[i] = unsigned_map[v_codes[i]] * v_absmax[i // 256]

and one step decodes them, updates and encodes them again, in float32:

    m = b1 m + (1 - b1) g                     v = b2 v + (1 - b2) g^2
    p = p (1 - lr weight_decay) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    absmax = max |m| over the block           code = that of the map's entry nearest to m / absmax

The order is that of bitsandbytes 0.50 on a CPU and in Triton; its CUDA kernel multiplies p by (1 - lr weight_decay)
after the step and not before, which differs by lr^2 weight_decay. The new parameter comes from the moments before they
are encoded.

The maps have decades: the e-th of the positive entries has 2^e equal steps over [0.1, 1] * 10^(e - 6) (the unsigned
map 2^(e + 1)), with an entry at each step's centre; and there are 0 and 1. So the rank j of an entry, counted from 0,
has its decade in the highest bit of j (of j + 1) and the step in the others. A code is found from that and not by a
search: the decade by comparisons with the exact thresholds, the step by one multiplication, biased downwards so that it
is right or one too low, and one comparison with the exact midpoint above it, from a table.

Shapes: parameter and gradient [...] in any float dtype; codes uint8 [...]; absmax float32 [ceil(size / 256)].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.nf4 import NESTED_QUANT_MAP
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register

BLOCK_SIZE = 256
DECADES = 7


def _unsigned_map() -> np.ndarray:
    """The unsigned 8-bit dynamic map, float32 [256], ascending: 2^(e + 1) steps in the e-th decade, and 0 and 1.

    Rounded as the stored map is: edges counted in steps from the nearer end, centres multiplied in float32.
    """
    start, end = np.float64(np.float32(0.1)), np.float64(1)
    values = [np.zeros(1, np.float32)]
    for exponent in range(DECADES):
        steps = 2 ** (exponent + 1)
        step = np.float64(np.float32(end - start) / np.float32(steps))
        index = np.arange(steps + 1)
        edges = np.where(2 * index < steps, start + step * index, end - step * (steps - index)).astype(np.float32)
        values.append((edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6)))
    return np.concatenate([*values, np.ones(1, np.float32)])


SIGNED_MAP = NESTED_QUANT_MAP
UNSIGNED_MAP = _unsigned_map()


class _Map(NamedTuple):
    """A map and what finds the nearest of its entries, ranked from 0 at the value 0.

    Attributes:
      values: float32 [256], ascending.
      midpoints: float32 [256], between the ranks j and j + 1 of the entries that are not negative; then infinite.
      zero: the code of the value 0, whose rank is 0.
      first: rank of the first entry of each decade, and of the value 1.
    """

    values: np.ndarray
    midpoints: np.ndarray
    zero: int
    first: tuple[int, ...]


def _map(values: np.ndarray, zero: int) -> _Map:
    upwards = values[zero:]
    midpoints = np.full(256, np.inf, np.float32)
    midpoints[: len(upwards) - 1] = (upwards[:-1] + upwards[1:]) / np.float32(2)
    signed = zero > 0
    first = tuple(2**e if signed else 2 ** (e + 1) - 1 for e in range(DECADES + 1))
    return _Map(values, midpoints, zero, first)


SIGNED, UNSIGNED = _map(SIGNED_MAP, 127), _map(UNSIGNED_MAP, 0)


class State(NamedTuple):
    """Both moments of a parameter, quantized; see the module for shapes."""

    m_codes: jax.Array
    m_absmax: jax.Array
    v_codes: jax.Array
    v_absmax: jax.Array


def init(parameter: jax.Array) -> State:
    """Both moments zero."""

    def moment(zero: int) -> tuple[jax.Array, jax.Array]:
        blocks = -(-parameter.size // BLOCK_SIZE)
        return jnp.full(parameter.shape, zero, jnp.uint8), jnp.zeros(blocks, jnp.float32)

    return State(*moment(SIGNED.zero), *moment(UNSIGNED.zero))


def update(
    parameter: jax.Array,
    gradient: jax.Array,
    state: State,
    *,
    step: jax.Array | int,
    learning_rate: jax.Array | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, State]:
    """Returns (parameter, state) after one step; in place where the caller donates them.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels import adamw_8bit
      >>> parameter = jnp.array([1.0, -2.0, 3.0])
      >>> step = jax.jit(adamw_8bit.update, donate_argnums=(0, 2))
      >>> state = adamw_8bit.init(parameter)
      >>> parameter, state = step(parameter, jnp.array([0.5, 0.0, -4.0]), state, step=1, learning_rate=0.25)
      >>> parameter.tolist()
      [0.75, -2.0, 3.25]
      >>> state.m_codes.tolist(), state.v_absmax.shape
      ([192, 127, 0], (1,))

    Args:
      parameter, gradient: [...], float32, bfloat16 or float16, each.
      state: of `init`, or of the step before.
      step: int32, 1 for the first step.
      learning_rate: float32 scalar or float; may be traced, as `step` may.
      b1, b2, eps, weight_decay: AdamW's.
      implementation: "xla", "pallas" or None.

    Raises:
      ValueError: shapes do not fit.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    blocks = -(-parameter.size // BLOCK_SIZE)
    shapes = [parameter.shape, parameter.shape, (blocks,), parameter.shape, (blocks,)]
    if [array.shape for array in (gradient, *state)] != shapes:
        got = ", ".join(str(array.shape) for array in (gradient, *state))
        raise ValueError(f"adamw_8bit: gradient and state {got} do not fit a parameter {parameter.shape}")
    parameter, *new_state = ADAMW_8BIT(
        parameter,
        gradient,
        *state,
        step=step,
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        implementation=implementation,
    )
    return parameter, State(*new_state)


class _Scalars(NamedTuple):
    """float32 scalars of a step; `correction2` is the square root of v's bias correction."""

    b1: jax.Array
    one_minus_b1: jax.Array
    b2: jax.Array
    one_minus_b2: jax.Array
    eps: jax.Array
    decay: jax.Array
    step_size: jax.Array
    correction2: jax.Array


def _scalars(*, step: Any, learning_rate: Any, b1: float, b2: float, eps: float, weight_decay: float) -> jax.Array:
    """float32 [8], in the order of `_Scalars`."""
    learning_rate = jnp.asarray(learning_rate, jnp.float32)
    decay = 1 - learning_rate * jnp.float32(weight_decay)
    step_size = learning_rate / bias_correction(b1, step)
    correction2 = jnp.sqrt(bias_correction(b2, step))
    fixed = [jnp.float32(value) for value in (b1, 1 - b1, b2, 1 - b2, eps)]
    return jnp.stack([*fixed, decay, step_size, correction2])


def bias_correction(b: float, step: Any) -> jax.Array:
    """1 - b^step: 1 - 0.999 has but ten bits left when it is subtracted in float32."""
    return -jnp.expm1(jnp.asarray(step, jnp.float32) * jnp.float32(math.log(b) if b else -math.inf))


def _step(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, scalars: _Scalars) -> tuple[jax.Array, ...]:
    """(p, m, v) after the update, all float32 and of one shape."""
    m = m * scalars.b1 + g * scalars.one_minus_b1
    v = v * scalars.b2 + g * g * scalars.one_minus_b2
    p = p * scalars.decay - scalars.step_size * (m / (jnp.sqrt(v) / scalars.correction2 + scalars.eps))
    return p, m, v


def _encode(values: jax.Array, kind: _Map, lookup: Any, divided: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """float32 [blocks, 256] -> (codes uint8, absmax float32 [blocks]).

    lookup: indices -> the map's midpoints at them. divided: [blocks, 1], where to divide by absmax; elsewhere, or with
    None, it multiplies by the reciprocal. (bitsandbytes divides only a shorter last block.)
    """
    absmax = jnp.max(jnp.abs(values), axis=1)
    divisor = jnp.maximum(absmax, jnp.float32(np.finfo(np.float32).tiny))[:, None]
    scaled = values * jnp.broadcast_to(1 / divisor, values.shape)
    if divided is not None:
        divided = jnp.broadcast_to(divided, values.shape)
        scaled = jnp.where(divided, values / jnp.broadcast_to(divisor, values.shape), scaled)
    return _nearest(scaled, kind, lookup).astype(jnp.uint8), absmax


def _nearest(scaled: jax.Array, kind: _Map, lookup: Any) -> jax.Array:
    """Codes, int32, of the nearest entries; halfway between two it is the lower one.

    Downwards from 0 'the lower one' is the one farther from 0, so there a midpoint counts as passed when it is reached:
    the next larger float is compared in its stead.
    """
    negative = scaled < 0
    magnitude = jnp.abs(scaled)
    if kind.zero:
        bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32) + negative.astype(jnp.int32)
        magnitude = jax.lax.bitcast_convert_type(bits, jnp.float32)
    first = jnp.zeros(scaled.shape, jnp.int32)
    slope = jnp.zeros(scaled.shape, jnp.float32)
    offset = jnp.zeros(scaled.shape, jnp.float32)
    for decade, rank in enumerate(kind.first):
        steps = kind.first[decade + 1] - rank if decade < DECADES else 0
        inside = magnitude > jnp.float32(kind.midpoints[rank - 1])
        first = jnp.where(inside, jnp.int32(rank), first)
        slope = jnp.where(inside, jnp.float32(steps / 0.9 * 10.0 ** (6 - decade)), slope)
        offset = jnp.where(inside, jnp.float32(steps / 9), offset)
    # In steps from the decade's start, minus more than float32 can have got wrong (1e-4 steps).
    within = (magnitude * slope - offset - jnp.float32(0.01)).astype(jnp.int32)
    # The upper end of a decade is nearer to its last entry than to the next one's first, up to that one's threshold.
    last = 2 * first - 1 if kind.zero else 2 * first
    rank = jnp.maximum(jnp.minimum(first + within, last), first)
    rank = rank + (magnitude > lookup(rank)).astype(jnp.int32)
    if not kind.zero:
        return rank
    return kind.zero + jnp.where(negative, -jnp.minimum(rank, kind.zero), rank)


def _blocked(array: jax.Array, fill: int = 0) -> jax.Array:
    """[...] -> [blocks, 256]; a view where there are whole blocks, else filled up (codes with that of 0)."""
    flat = array.reshape(-1)
    return jnp.pad(flat, (0, -flat.shape[0] % BLOCK_SIZE), constant_values=fill).reshape(-1, BLOCK_SIZE)


def _unblocked(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


def _ends_in_a_partial_block(size: int) -> bool:
    """Whether the last block is divided by its absmax: bitsandbytes does that to a shorter one."""
    return size % BLOCK_SIZE != 0


def _reference(
    parameter: jax.Array,
    gradient: jax.Array,
    m_codes: jax.Array,
    m_absmax: jax.Array,
    v_codes: jax.Array,
    v_absmax: jax.Array,
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """settings: those of `_scalars`."""
    scalars = _Scalars(*_scalars(**settings))
    p, g = _blocked(parameter).astype(jnp.float32), _blocked(gradient).astype(jnp.float32)
    m, v = (
        jnp.asarray(kind.values)[_blocked(codes, kind.zero)] * absmax[:, None]
        for kind, codes, absmax in ((SIGNED, m_codes, m_absmax), (UNSIGNED, v_codes, v_absmax))
    )
    p, m, v = _step(p, g, m, v, scalars)
    divided = None
    if _ends_in_a_partial_block(parameter.size):
        divided = (jnp.arange(m_absmax.shape[0]) == m_absmax.shape[0] - 1)[:, None]
    m_codes, m_absmax = _encode(m, SIGNED, lambda rank: jnp.asarray(SIGNED.midpoints)[rank], divided)
    v_codes, v_absmax = _encode(v, UNSIGNED, lambda rank: jnp.asarray(UNSIGNED.midpoints)[rank], divided)
    shape = parameter.shape
    p = _unblocked(p, shape).astype(parameter.dtype)
    return p, _unblocked(m_codes, shape), m_absmax, _unblocked(v_codes, shape), v_absmax


def _pallas(
    parameter: jax.Array,
    gradient: jax.Array,
    m_codes: jax.Array,
    m_absmax: jax.Array,
    v_codes: jax.Array,
    v_absmax: jax.Array,
    *,
    rows: int = 2,
    num_warps: int = 2,
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """One program updates `rows` blocks (`rows` and `num_warps` are for tuning); settings: those of `_scalars`."""
    scalars = _scalars(**settings)
    blocks = m_absmax.shape[0]
    codes = _blocked(m_codes, SIGNED.zero), _blocked(v_codes, UNSIGNED.zero)
    state = (_blocked(parameter), codes[0], m_absmax, codes[1], v_absmax)
    p, m_codes, m_absmax, v_codes, v_absmax = backend.call(
        _adamw_8bit_kernel,
        *state,
        _blocked(gradient),
        scalars,
        *(jnp.asarray(table) for kind in (SIGNED, UNSIGNED) for table in (kind.values, kind.midpoints)),
        out=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in state),
        grid=(-(-blocks // rows),),
        num_warps=num_warps,
        aliases={index: index for index in range(len(state))},
        rows=rows,
        partial=_ends_in_a_partial_block(parameter.size),
    )
    shape = parameter.shape
    return _unblocked(p, shape), _unblocked(m_codes, shape), m_absmax, _unblocked(v_codes, shape), v_absmax


def _adamw_8bit_kernel(*refs, rows: int, partial: bool) -> None:
    state_refs, (g_ref, scalars_ref, *table_refs), out_refs = refs[:5], refs[5:-5], refs[-5:]
    p_ref, m_codes_ref, m_absmax_ref, v_codes_ref, v_absmax_ref = state_refs
    m_values_ref, m_midpoints_ref, v_values_ref, v_midpoints_ref = table_refs
    blocks = m_absmax_ref.shape[0]
    block = backend.program_id(0) * rows + jnp.arange(rows)
    here = (backend.ds(backend.program_id(0) * rows, rows), slice(None))
    exists = block < blocks
    everywhere = jnp.broadcast_to(exists[:, None], (rows, BLOCK_SIZE))

    def moment(values_ref: Any, codes_ref: Any, absmax_ref: Any) -> jax.Array:
        codes = backend.load(codes_ref.at[here], mask=everywhere, other=0).astype(jnp.int32)
        absmax = backend.load(absmax_ref.at[here[0]], mask=exists, other=0.0)
        return backend.load(values_ref.at[codes]) * jnp.broadcast_to(absmax[:, None], codes.shape)

    p, g = (backend.load(ref.at[here], mask=everywhere, other=0).astype(jnp.float32) for ref in (p_ref, g_ref))
    scalars = _Scalars(*(scalars_ref[index] for index in range(len(_Scalars._fields))))
    m = moment(m_values_ref, m_codes_ref, m_absmax_ref)
    v = moment(v_values_ref, v_codes_ref, v_absmax_ref)
    p, m, v = _step(p, g, m, v, scalars)
    divided = (block == blocks - 1)[:, None] if partial else None
    m_codes, m_absmax = _encode(m, SIGNED, lambda rank: backend.load(m_midpoints_ref.at[rank]), divided)
    v_codes, v_absmax = _encode(v, UNSIGNED, lambda rank: backend.load(v_midpoints_ref.at[rank]), divided)
    for ref, value in zip(out_refs, (p, m_codes, m_absmax, v_codes, v_absmax), strict=True):
        if value.ndim == 2:
            backend.store(ref.at[here], value.astype(ref.dtype), mask=everywhere)
        else:
            backend.store(ref.at[here[0]], value, mask=exists)


def _pallas_refuses(platform: str, parameter: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    if parameter.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it updates parameters in float32, bfloat16 or float16, not {parameter.dtype}"
    if parameter.size >= 2**31:  # Pallas computes offsets into arrays of up to 2^32 bytes, as the codes are, in int32
        return f"it updates fewer than 2^31 parameters at once, not {parameter.size:,}"
    return backend.refuses_platform(platform)


def _rank(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        return (Choice("pallas", "it goes over everything once: 0.31 ms, XLA 0.73 (42 M parameters on an H100)"),)
    return (Choice("xla", "the kernel is for GPUs"),)


def _case(name: str, shape: tuple[int, ...]) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        """The state after a first step with another gradient."""
        parameter, before, gradient = (normal(rng, shape, dtype) for _ in range(3))
        settings = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
        state = _reference(parameter, before, *init(parameter), step=1, **settings)[1:]
        arrays = dict(zip(State._fields, state, strict=True))
        return {"parameter": parameter, "gradient": gradient, **arrays, "step": jnp.int32(2), **settings}

    return Case(name, make, reduction=1)


ADAMW_8BIT = register(
    Op(
        name="adamw_8bit",
        replaces="decoding, AdamW's update and encoding as several passes",
        saves="float32 moments in memory: 16 bytes a parameter in all",
        implementations={
            "xla": Implementation(_reference),
            "pallas": Implementation(_pallas, refuses=_pallas_refuses),
        },
        rank=_rank,
        cases=(
            _case("partial block", (7, 43)),
            _case("more blocks than one program's", (9, 512)),
        ),
    )
)
