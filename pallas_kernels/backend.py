"""The only file that touches Pallas' Triton names, so that another backend is a second file and not a rewrite."""

from __future__ import annotations

import contextvars
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Deprecated upstream since jax 0.11; ours because it runs from Ampere up and needs no CUDA toolkit.
warnings.filterwarnings("ignore", message=".*Pallas.*Triton.*deprecated", category=DeprecationWarning)

load = triton.load
store = triton.store
program_id = pl.program_id
when = pl.when
ds = pl.ds

PLATFORMS = ("cpu", "gpu")
AMPERE, HOPPER = (8, 0), (9, 0)

_interpreting = contextvars.ContextVar("interpreting", default=False)


def dot(x: jax.Array, y: jax.Array, *, trans_x: bool = False, trans_y: bool = False) -> jax.Array:
    """x [m, k] times y [k, n] in a kernel (or their transposes), float32; at least 16 along every axis, or 8 along n.

    float32 factors are multiplied exactly, not rounded to TF32.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = ((0 if trans_x else 1,), (1 if trans_y else 0,))
    return jax.lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def fma(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """float32 x * y + z, rounded once, which Triton does not make of product and sum; interpreted, rounded twice."""
    if _interpreting.get():
        return x * y + z
    return _assembly("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", jnp.float32, x, y, z)


def table_of_16(entry: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array | list[jax.Array]:
    """In a kernel: a table of the 16 float32 values entry(0) to entry(15), for `look_up` with an index of this shape.

    Each lane of a warp holds one entry, twice in 32. Entries are chosen by masks: of selections the compiler makes
    loads under conditions, each of which waits for the last. The interpreter's table is a list.
    """
    entries = [entry(jnp.int32(i)) for i in range(16)]
    if _interpreting.get():
        return entries
    lane = _assembly("mov.u32 $0, %laneid;", "=r,r", jnp.int32, jnp.zeros(shape, jnp.int32)) & 15
    held = jnp.zeros(shape, jnp.int32)
    for i, one in enumerate(entries):
        mine = jax.lax.shift_right_arithmetic((lane ^ i) - 1, jnp.full(shape, 31, jnp.int32))
        held |= mine & jax.lax.bitcast_convert_type(one, jnp.int32)
    return held


def look_up(table: jax.Array | list[jax.Array], index: jax.Array) -> jax.Array:
    """float32 of index's shape: entry index & 15 of a `table_of_16`.

    A lane takes the entry that it needs from its neighbour by a shuffle (PTX `shfl.sync.idx` with segments of 16
    lanes, which ignores an index's higher bits): two instructions instead of a load's four.
    """
    if isinstance(table, list):
        values = jnp.zeros(index.shape, jnp.float32)
        for i, one in enumerate(table):
            values = jnp.where(index & 15 == i, one, values)
        return values
    return _assembly("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=f,r,r", jnp.float32, table, index)


def nibbles(words: jax.Array, order: jax.Array) -> jax.Array:
    """int32 [n] -> [n, 8]: the four bits of each word that stand at the eight places of `order`, 0 the lowest."""
    shape = (words.shape[0], order.shape[0])
    shifts = jnp.broadcast_to(4 * order[None], shape)
    return jax.lax.shift_right_logical(jnp.broadcast_to(words[:, None], shape), shifts) & 15


def permute_bytes(low: jax.Array, high: jax.Array, selectors: jax.Array) -> jax.Array:
    """int32 whose i-th byte is named by the i-th four bits of `selectors`: a byte of low (0 to 3) or high (4 to 7), or,
    8 added, that byte's sign bit eight times (PTX `prmt`)."""
    if not _interpreting.get():
        return _assembly("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", jnp.int32, low, high, selectors)
    shift = jax.lax.shift_right_logical
    found = jnp.zeros(selectors.shape, jnp.int32)
    for i in range(4):
        selector = selectors >> 4 * i
        byte = shift(jnp.where(selector & 4 == 0, low, high), (selector & 3) * 8)
        byte = jnp.where(selector & 8 == 0, byte, -(shift(byte, jnp.full_like(byte, 7)) & 1)) & 255
        found |= byte << 8 * i
    return found


def multiply_pairs(x: jax.Array, y: jax.Array) -> jax.Array:
    """int32 of two float16 products each, of int32 that hold two float16 values each."""
    if not _interpreting.get():
        return _assembly("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", jnp.int32, x, y)
    return packed(*(first * second for first, second in zip(unpacked(x), unpacked(y), strict=True)))


def packed(low: jax.Array, high: jax.Array) -> jax.Array:
    """int32 of two float16 values each."""
    low, high = (jax.lax.bitcast_convert_type(half, jnp.int16).astype(jnp.int32) for half in (low, high))
    return low & 0xFFFF | high << 16


def unpacked(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `packed`."""
    low, high = (jax.lax.bitcast_convert_type(half.astype(jnp.int16), jnp.float16) for half in (pairs, pairs >> 16))
    return low, high


def _assembly(text: str, constraints: str, dtype: Any, *arguments: jax.Array) -> jax.Array:
    """PTX instructions for each element."""
    out = jax.ShapeDtypeStruct(arguments[0].shape, dtype)
    (result,) = triton.elementwise_inline_asm(
        text, args=arguments, constraints=constraints, pack=1, result_shape_dtypes=[out]
    )
    return result


def platform() -> str:
    """The platform that programs are made for: of the abstract device in force, or JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def compute_capability() -> tuple[int, int]:
    """The GPU's: of the machine, or where it has none of the abstract device that programs are made for."""
    if jax.default_backend() == "gpu":
        major, minor = str(jax.devices()[0].compute_capability).split(".")
        return int(major), int(minor)
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    if any(name in kind for name in ("B100", "B200", "B300")):
        return 10, 0
    return HOPPER if any(name in kind for name in ("H100", "H200", "H800", "H20")) else AMPERE


def refuses_platform(platform: str) -> str | None:
    """Why no kernel runs on a platform, or None where one does."""
    return None if platform in PLATFORMS else f"it is written for NVIDIA GPUs (interpreted on a CPU), not {platform!r}"


def refuses_dtype_or_platform(platform: str, x: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    """The same of kernels with products of x, which take floats of 16 and 32 bits."""
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it computes in float32, bfloat16 or float16, not {x.dtype}"
    return refuses_platform(platform)


def call(
    kernel: Callable[..., None],
    *arguments: jax.Array,
    out: Any,
    grid: tuple[int, ...],
    num_warps: int = 4,
    num_stages: int | None = None,
    aliases: Mapping[int, int] | None = None,
    **static: Any,
) -> Any:
    """Runs a kernel over a grid: compiled by Triton on a GPU, interpreted on a CPU (for tests).

    The platform is the one that the program is lowered for, so a program for a GPU can be lowered where there is none.
    The kernel gets the whole arrays as refs: Pallas multiplies an index of several axes in 64 bits where an array has
    more than 2^32 bytes, so kernels index rows and columns apart and never flatten them into one int32.

    Args:
      kernel: (input refs, output refs, **static) -> None; its name is the kernel's name in programs and profiles.
      arguments: the inputs.
      out: ShapeDtypeStruct of the result, or a tuple of them.
      grid: how many programs, for each axis of `program_id`. With an axis of length 0 the result is zeros.
      num_warps, num_stages: Triton's.
      aliases: {input: output} that share memory; XLA copies the input first where somebody still needs it.
      static: hashable Python values for the kernel.

    Returns:
      The outputs, in the form of `out`.
    """
    if 0 in grid:
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), out)
    return _launched(
        kernel, out, grid, num_warps, num_stages, tuple((aliases or {}).items()), tuple(static.items()), *arguments
    )


@functools.partial(jax.jit, static_argnums=tuple(range(7)), inline=True)
def _launched(kernel, out, grid, num_warps, num_stages, aliases, static, *arguments: jax.Array) -> Any:
    """See `call`. A function of its own under jit, so that a program traces and lowers a kernel once for its shapes and
    not once for each of its calls."""

    def named(*refs: Any) -> None:
        kernel(*refs, **dict(static))

    def interpreted(*refs: Any) -> None:
        token = _interpreting.set(True)
        try:
            kernel(*refs, **dict(static))
        finally:
            _interpreting.reset(token)

    named.__name__ = interpreted.__name__ = kernel.__name__.strip("_")
    # Always with parameters: they, and not the platform, are what selects Triton in every jax version.
    parameters: Any = triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    run = functools.partial(pl.pallas_call, out_shape=out, grid=grid, input_output_aliases=dict(aliases))
    return jax.lax.platform_dependent(
        *arguments, cpu=run(interpreted, interpret=True), default=run(named, compiler_params=parameters)
    )
