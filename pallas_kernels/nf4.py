"""NF4: 4-bit NormalFloat with double quantization (Dettmers et al. 2023, arXiv:2305.14314), bitsandbytes' numerics.

A weight [out, in] is read row by row as blocks of 64 values (the last block may be shorter). Each value becomes the
index of the nearest entry of a 16-entry map after division by its block's largest magnitude (absmax). With double
quantization the float32 absmax are themselves quantized: their mean (nested_offset) is subtracted and blocks of 256 of
what is left become indices into a 256-entry map, with one float32 nested_absmax a block:

    absmax[b] = nested_quant_map[absmax_codes[b]] * nested_absmax[b // 256] + nested_offset
    w[i]      = quant_map[codes[i]] * absmax[i // 64]

each operation rounded to float32 by itself, as bitsandbytes does.

Shapes: codes uint8 [out, in / 2], the first of two values in the high nibble; absmax uint8 (float32 without double
quantization) [ceil(out * in / 64)]; nested_absmax float32 [ceil(blocks / 256)]; nested_offset float32 [].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
BYTES_PER_WORD = 4  # kernels read codes as int32
_PARTS = 32  # how many values one step of a sum adds up

# Quantiles of the standard normal distribution, normalised to [-1, 1] with an exact 0 (appendix E of the paper).
QUANT_MAP = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic map (Dettmers 2016, arXiv:1511.04561), float32 [256], ascending.

    Seven decades: the e-th has 2^e linear steps over [0.1, 1] * 10^(e - 6), with an entry at each step's centre, in
    both signs; and 0 and 1. Rounded as the stored maps are: each edge once, counted in steps from the nearer end.
    """
    start, end = np.float64(np.float32(0.1)), np.float64(1)
    values = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        steps = 2**exponent
        step = np.float64(np.float32(end - start) / np.float32(steps))
        index = np.arange(steps + 1)
        edges = np.where(2 * index < steps, start + step * index, end - step * (steps - index)).astype(np.float32)
        centres = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*centres, *-centres]
    return np.sort(np.array(values, np.float32))


NESTED_QUANT_MAP = _dynamic_map()


class QuantizedArrays(NamedTuple):
    """What `quantize` makes of one weight; the nested arrays are None without double quantization."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    nested_offset: jax.Array | None


def quantize(
    w: jax.Array,
    *,
    double_quantization: bool = True,
    block_size: int = BLOCK_SIZE,
    nested_block_size: int = NESTED_BLOCK_SIZE,
    implementation: str | None = None,
) -> QuantizedArrays:
    """Quantizes a weight [out, in] of any float dtype, compiled once a shape; the same bits under jit and vmap.

    Raises:
      ValueError: w is not a matrix, or has an odd number of columns (two values share a byte).
      ImplementationError: the named implementation does not exist.
    """
    if w.ndim != 2 or w.shape[1] % 2:
        raise ValueError(f"nf4.quantize: needs a matrix with an even number of columns, not {w.shape}")
    return NF4_QUANTIZE(
        w,
        double_quantization=double_quantization,
        block_size=block_size,
        nested_block_size=nested_block_size,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames=("double_quantization", "block_size", "nested_block_size"))
def _quantize_reference(
    w: jax.Array,
    *,
    double_quantization: bool = True,
    block_size: int = BLOCK_SIZE,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> QuantizedArrays:
    codes, absmax = _quantize_blocks(w.astype(jnp.float32).reshape(-1), QUANT_MAP, block_size)
    packed = jnp.sum(codes.reshape(w.shape[0], -1, 2) * jnp.array([16, 1], jnp.uint8)[None, None], -1, jnp.uint8)
    if not double_quantization:
        return QuantizedArrays(packed, absmax, None, None)
    offset = _mean(absmax)
    absmax_codes, nested_absmax = _quantize_blocks(absmax - offset, NESTED_QUANT_MAP, nested_block_size)
    return QuantizedArrays(packed, absmax_codes, nested_absmax, offset)


def _mean(values: jax.Array) -> jax.Array:
    """The mean of float32 [n] >= 0, summed in one order whatever it is compiled with: `jnp.mean`'s order varies."""
    sums = values
    while sums.shape[0] > 1:
        parts = _blocks(sums, _PARTS).reshape(_PARTS, -1)
        sums = functools.reduce(jnp.add, [parts[i] for i in range(_PARTS)])
    # XLA would contract the product with 1 / n and the subtraction that follows (see `_absmax`).
    return jnp.clip(sums[0] / values.shape[0], 0, jnp.finfo(jnp.float32).max)


def _blocks(values: jax.Array, block_size: int) -> jax.Array:
    """[n] -> [ceil(n / block_size), block_size], the last block filled up with zeros."""
    return jnp.pad(values, (0, -values.shape[0] % block_size)).reshape(-1, block_size)


def _quantize_blocks(values: jax.Array, quant_map: np.ndarray, block_size: int) -> tuple[jax.Array, jax.Array]:
    """float32 [n] -> (indices uint8 [n] of the nearest map entries, absmax float32 [ceil(n / block_size)])."""
    size = values.shape[0]
    blocks = _blocks(values, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    divisor = jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny)[:, None]
    # bitsandbytes multiplies full blocks by the reciprocal, but divides a shorter last one.
    scaled = blocks * (1 / divisor)
    if size % block_size:
        scaled = scaled.at[-1].set(blocks[-1] / divisor[-1])
    return _nearest(scaled.reshape(-1)[:size], quant_map), absmax


def _nearest(values: jax.Array, quant_map: np.ndarray) -> jax.Array:
    """uint8 [n]: how many midpoints of the ascending map lie below each value."""
    midpoints = (quant_map[:-1] + quant_map[1:]) / np.float32(2)
    if len(midpoints) > 15:
        return jnp.searchsorted(midpoints, values, method="scan").astype(jnp.uint8)
    # One fused pass: searchsorted would make an int32 array of the weight's size.
    return functools.reduce(jnp.add, [(values > midpoint).astype(jnp.uint8) for midpoint in midpoints])


def dequantize(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None = None,
    nested_offset: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    layer: jax.Array | int | None = None,
    quant_map: jax.Array | None = None,
    nested_quant_map: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    block_size: int = BLOCK_SIZE,
    nested_block_size: int = NESTED_BLOCK_SIZE,
    implementation: str | None = None,
) -> jax.Array:
    """Returns the weight [out, in] in `dtype`, rounded once from float32; bit for bit what bitsandbytes decodes.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import nf4
    >>> w = jax.random.normal(jax.random.key(0), (64, 128))
    >>> arrays = nf4.quantize(w)
    >>> arrays.codes.shape, arrays.codes.dtype
    ((64, 64), dtype('uint8'))
    >>> decoded = nf4.dequantize(*arrays, dtype=jnp.float32)
    >>> bool(jnp.abs(decoded - w).max() < 0.6)
    True

    Args:
      codes, absmax, nested_absmax, nested_offset: see the module; with `layer` every array has a leading axis [L].
      dtype: of the result.
      layer: int32 scalar; reads this layer of a stack, so that a scan over layers need not slice its codes.
      quant_map, nested_quant_map: float32 [16] and [256] as stored in a checkpoint; None means the constants.
      row_scale: float32 [out], of this weight alone: what to multiply its rows by before they are rounded, or None.
      block_size, nested_block_size: 64 and 256.
      implementation: "xla", "pallas" or None.

    Raises:
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    return NF4_DEQUANTIZE(
        codes,
        absmax,
        nested_absmax,
        nested_offset,
        dtype=dtype,
        layer=layer,
        quant_map=quant_map,
        nested_quant_map=nested_quant_map,
        row_scale=row_scale,
        block_size=block_size,
        nested_block_size=nested_block_size,
        implementation=implementation,
    )


def _at_layer(array: jax.Array, layer: jax.Array | int | None) -> jax.Array:
    """The layer's part of an array that has a leading axis [L] when there is a layer."""
    return array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


def _absmax(
    absmax: jax.Array,
    nested_absmax: jax.Array | None,
    nested_offset: jax.Array | None,
    nested_quant_map: jax.Array | None,
    nested_block_size: int,
    layer: jax.Array | int | None,
) -> jax.Array:
    """float32 [blocks] of one layer: the absmax as stored, or decoded where they are double-quantized."""
    absmax = _at_layer(absmax, layer)
    if nested_absmax is None or nested_offset is None:
        return absmax
    nested_absmax, nested_offset = _at_layer(nested_absmax, layer), _at_layer(nested_offset, layer)
    nested_map = jnp.asarray(NESTED_QUANT_MAP) if nested_quant_map is None else _at_layer(nested_quant_map, layer)
    product = (_blocks(nested_map[absmax], nested_block_size) * nested_absmax[:, None]).reshape(-1)
    # XLA would contract product and sum into one fused multiply-add, which rounds once where bitsandbytes rounds twice
    # (an optimization barrier does not stop it). Clamping to the finite range changes nothing, and keeps them apart.
    finite = jnp.finfo(jnp.float32)
    return jnp.clip(product[: absmax.shape[0]], finite.min, finite.max) + nested_offset


def _reference(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None = None,
    nested_offset: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    layer: jax.Array | int | None = None,
    quant_map: jax.Array | None = None,
    nested_quant_map: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    block_size: int = BLOCK_SIZE,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> jax.Array:
    codes = _at_layer(codes, layer)
    scales = _absmax(absmax, nested_absmax, nested_offset, nested_quant_map, nested_block_size, layer)
    quant_map = jnp.asarray(QUANT_MAP) if quant_map is None else _at_layer(quant_map, layer)
    rows, half = codes.shape
    blocks = _blocks(codes.reshape(-1), block_size // 2)
    first, second = quant_map[blocks >> 4] * scales[:, None], quant_map[blocks & 15] * scales[:, None]
    if row_scale is None:  # the cast first: it halves what is stacked
        first, second = first.astype(dtype), second.astype(dtype)
    values = jnp.stack([first, second], axis=-1).reshape(-1)[: rows * half * 2].reshape(rows, half * 2)
    return values if row_scale is None else (values * row_scale[:, None]).astype(dtype)


def _pallas(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None = None,
    nested_offset: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    layer: jax.Array | int | None = None,
    quant_map: jax.Array | None = None,
    nested_quant_map: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    block_size: int = BLOCK_SIZE,
    nested_block_size: int = NESTED_BLOCK_SIZE,
    words: int = 256,
    num_warps: int = 1,
) -> jax.Array:
    """One program decodes `words` int32 words of eight codes each, absmax and all, from the whole stack of codes."""
    rows, half = codes.shape[-2:]
    total = rows * half // BYTES_PER_WORD
    stack = as_stack(codes, absmax, nested_absmax, nested_offset, layer, quant_map, nested_quant_map)
    values = backend.call(
        _nf4_dequantize,
        *stack._replace(codes=stack.codes.reshape(stack.codes.shape[0], total)),
        *(() if row_scale is None else (row_scale,)),
        out=jax.ShapeDtypeStruct((total, 2 * BYTES_PER_WORD), dtype),
        grid=(-(-total // words),),
        num_warps=num_warps,
        words=words,
        block_words=block_size // (2 * BYTES_PER_WORD),
        row_words=half // BYTES_PER_WORD,
        nested_block_size=nested_block_size,
    )
    return values.reshape(rows, half * 2)


class Weight(NamedTuple):
    """The arrays of a weight, as `dequantize` takes them."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None = None
    nested_offset: jax.Array | None = None
    layer: jax.Array | int | None = None
    quant_map: jax.Array | None = None
    nested_quant_map: jax.Array | None = None

    def nf4_arguments(self) -> dict[str, Any]:
        """The arguments of `dequantize`."""
        return self._asdict() | {"block_size": BLOCK_SIZE, "nested_block_size": NESTED_BLOCK_SIZE}


class Stack(NamedTuple):
    """What a kernel reads, as arrays or refs: each with a leading axis [L], codes as int32 words; the layer to read."""

    layer: Any  # int32 [1]
    codes: Any  # int32 [L, out, in / 8]
    absmax: Any  # uint8 or float32 [L, blocks]
    nested_absmax: Any  # float32 [L, nested blocks]
    nested_offset: Any  # float32 [L]
    quant_map: Any  # float32 [L, 16]
    nested_quant_map: Any  # float32 [L, 256]


def as_stack(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None,
    nested_offset: jax.Array | None,
    layer: jax.Array | int | None,
    quant_map: jax.Array | None,
    nested_quant_map: jax.Array | None,
) -> Stack:
    """The arguments of `dequantize` for a kernel: no copies of codes or absmax, and stand-ins for what is None."""
    rows, half = codes.shape[-2:]
    layers = 1 if layer is None else codes.shape[0]
    # As words, codes of up to 8 GiB have offsets that fit 32 bits: Pallas would let those of bytes overflow from 2 GiB.
    words = jax.lax.bitcast_convert_type(codes.reshape(-1, BYTES_PER_WORD), jnp.int32)

    # Rows of whole words where they are; a flat layer where a word crosses rows, which only dequantize can read.
    whole = half % BYTES_PER_WORD == 0
    words_shape = (layers, rows, half // BYTES_PER_WORD) if whole else (layers, rows * half // BYTES_PER_WORD)

    def stacked(array: jax.Array | None, constant: np.ndarray) -> jax.Array:
        if array is None:
            return jnp.broadcast_to(jnp.asarray(constant)[None], (layers, *constant.shape))
        return array if layer is not None else array[None]

    return Stack(
        layer=jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        codes=words.reshape(words_shape),
        absmax=stacked(absmax, np.zeros(1, np.float32)),
        nested_absmax=stacked(nested_absmax, np.zeros(1, np.float32)),
        nested_offset=stacked(nested_offset, np.zeros((), np.float32)),
        quant_map=stacked(quant_map, QUANT_MAP),
        nested_quant_map=stacked(nested_quant_map, NESTED_QUANT_MAP),
    )


class FetchedAbsmax(NamedTuple):
    """What a kernel has loaded of some blocks' absmax; `nested` None: stored as they are."""

    absmax: jax.Array
    nested: jax.Array | None


def fetch_absmax(
    stack: Stack, layer: jax.Array, block: jax.Array, nested_block_size: int, mask: jax.Array | None = None
) -> FetchedAbsmax:
    """In a kernel: begins to load the absmax of the blocks with these indices."""
    other = None if mask is None else 0
    absmax = backend.load(stack.absmax.at[layer, block], mask=mask, other=other)
    if absmax.dtype == jnp.float32:
        return FetchedAbsmax(absmax, None)
    nested = backend.load(stack.nested_absmax.at[layer, block // nested_block_size], mask=mask, other=other)
    return FetchedAbsmax(absmax, nested)


def decode_absmax(stack: Stack, layer: jax.Array, fetched: FetchedAbsmax) -> jax.Array:
    """In a kernel: the float32 absmax of fetched blocks, in the bits of `_absmax`."""
    absmax, nested = fetched
    if nested is None:
        return absmax
    nested_map = backend.load(stack.nested_quant_map.at[layer, absmax.astype(jnp.int32)])
    # Kept apart from the sum as in `_absmax`: Triton, too, would contract them.
    finite = jnp.finfo(jnp.float32)
    product = jnp.clip(nested_map * nested, jnp.float32(finite.min), jnp.float32(finite.max))
    return product + backend.load(stack.nested_offset.at[layer])


def _nf4_dequantize(*refs: Any, words: int, block_words: int, row_words: int, nested_block_size: int) -> None:
    stack, row_scale, out_ref = Stack(*refs[: len(Stack._fields)]), refs[len(Stack._fields) : -1], refs[-1]
    layer, start = stack.layer[0], backend.program_id(0) * words
    total, per_word = out_ref.shape
    word = start + jax.lax.iota(jnp.int32, words)
    mask = None if total % words == 0 else word < total
    codes = backend.load(stack.codes.at[layer, backend.ds(start, words)], mask=mask, other=None if mask is None else 0)
    shape = (words, per_word)
    # Bytes ascend in a word, and the first of a byte's two values is in its high nibble.
    values = backend.load(stack.quant_map.at[layer, backend.nibbles(codes, jax.lax.iota(jnp.int32, per_word) ^ 1)])
    absmax = fetch_absmax(stack, layer, word // block_words, nested_block_size, mask)
    scaled = values * decode_absmax(stack, layer, absmax)[:, None]
    for ref in row_scale:
        other = None if mask is None else 0
        scaled = scaled * backend.load(ref.at[word // row_words], mask=mask, other=other)[:, None]
    out_mask = None if mask is None else jnp.broadcast_to(mask[:, None], shape)
    backend.store(out_ref.at[backend.ds(start, words), :], scaled.astype(out_ref.dtype), mask=out_mask)


def refuses_words(codes: jax.Array, block_size: int) -> str | None:
    """Why a kernel cannot read codes as int32 words of one absmax each, or None."""
    if codes.shape[-2] * codes.shape[-1] % BYTES_PER_WORD:
        return f"{codes.shape[-2]} x {codes.shape[-1] * 2} codes do not fill words of 32 bits"
    if block_size % (2 * BYTES_PER_WORD):
        return f"blocks of {block_size} values are not whole words of 8"
    return None


def _pallas_refuses(
    platform: str,
    codes: jax.Array,
    *args: Any,
    block_size: int = BLOCK_SIZE,
    row_scale: jax.Array | None = None,
    **kwargs: Any,
) -> str | None:
    if row_scale is not None and codes.shape[-1] % BYTES_PER_WORD:
        return f"rows of {codes.shape[-1] * 2} codes are not whole words, of one row's scale each"
    return backend.refuses_platform(platform) or refuses_words(codes, block_size)


def _rank(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        return (Choice("pallas", "one kernel decodes codes and absmax: 0.053 ms, XLA 0.143 (14336x4096 on an H100)"),)
    return (Choice("xla", "the kernel is for GPUs"),)


def _case(
    name: str,
    shape: tuple[int, int],
    *,
    layers: int | None = None,
    double_quantization: bool = True,
    scaled: bool = False,
) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        one = functools.partial(quantize, double_quantization=double_quantization)
        w = normal(rng, shape if layers is None else (layers, *shape), jnp.float32)
        arrays = jax.jit(one if layers is None else jax.vmap(one))(w)
        row_scale = normal(rng, shape[:1], jnp.float32) if scaled else None
        layer = None if layers is None else jnp.int32(layers - 1)
        return arrays._asdict() | {"dtype": dtype, "layer": layer, "row_scale": row_scale}

    return Case(name, make, reduction=1)


NF4_DEQUANTIZE = register(
    Op(
        name="nf4_dequantize",
        replaces="gathers for codes and scales",
        saves="passes for the nested scales; a slice of the stack",
        implementations={
            "xla": Implementation(_reference),
            "pallas": Implementation(_pallas, refuses=_pallas_refuses),
        },
        rank=_rank,
        cases=(
            _case("layer of a stack", (16, 2048), layers=3),
            _case("partial blocks", (5, 1026)),
            _case("not double-quantized, scaled rows", (12, 192), double_quantization=False, scaled=True),
        ),
    )
)


def _quantize_case(name: str, shape: tuple[int, int], *, double_quantization: bool = True) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {"w": normal(rng, shape, dtype), "double_quantization": double_quantization}

    return Case(name, make, reduction=shape[0] * shape[1] // BLOCK_SIZE)


NF4_QUANTIZE = register(
    Op(
        name="nf4_quantize",
        replaces="a search for every value",
        saves="an int32 array of the weight's size",
        implementations={"xla": Implementation(_quantize_reference)},
        cases=(
            _quantize_case("several nested blocks", (33, 514)),
            _quantize_case("partial blocks", (5, 50)),
            _quantize_case("not double-quantized", (12, 192), double_quantization=False),
        ),
    )
)
