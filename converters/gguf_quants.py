"""GGUF's block quantizations of a matrix, byte for byte what ggml's reference C code writes.

A block of 32 or 256 neighbours in a row is stored as float16 scales and small integers. ggml finds them by short
searches whose results hang on the last bit of float32 sums, so everything here is numpy float32 in ggml's order of
operations (XLA fuses multiplications and additions, which rounds differently). What makes it fast: the searches run
on arrays [n, groups], n values of a group along the first axis. Each step is then one long SIMD loop over groups,
and a sum over the first axis adds in ggml's order.

Sources: the formats and searches are ggml's (https://github.com/ggml-org/ggml, src/ggml-quants.c, `*_ref` and
`make_*_quants`); the tests compare with libgguf, which is that code. MXFP4 and the ternary types are left to gguf;
its quantizers of Q8_0 and Q4_0 to Q5_1 take over ten times as long as these.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

# Values that one thread works on at a time: 4 MB arrays. With smaller ones, threads wait for the interpreter's lock.
_CHUNK = 1 << 20
_THREADS = min(8, os.cpu_count() or 1)

# ggml takes groups below this for zeros.
_EPSILON = np.float32(1e-15)

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def quantize(matrix: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The matrix in a quantized type.

    Args:
      matrix: [..., columns] of float32, float16 or bfloat16; columns a multiple of the type's block.
      kind: a type of `QUANTIZABLE`.

    Returns:
      uint8 [..., bytes of a row].

    Raises:
      FloatingPointError: a value is not finite, or a block's float16 scale would not be.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = matrix.reshape(-1, block)
    quantized = np.empty((len(blocks), block_bytes), np.uint8)
    step = _CHUNK // block

    def work(start: int) -> None:
        quantized[start : start + step] = _quantize_blocks(blocks[start : start + step], kind)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, range(0, len(blocks), step)))
    return quantized.reshape(*matrix.shape[:-1], -1)


def _quantize_blocks(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    blocks = blocks.astype(np.float32, copy=False)
    if not np.isfinite(blocks).all():
        raise FloatingPointError("a value is not finite")
    # Divisions by the scale 0 of a constant group are sorted out where their results would be used.
    with np.errstate(all="ignore"):
        quantized = _QUANTIZERS[kind](blocks)
    for offset in _SCALES[kind]:
        if not np.isfinite(np.ascontiguousarray(quantized[:, offset : offset + 2]).view(np.float16)).all():
            raise FloatingPointError("a scale is beyond float16")
    return quantized


class _Affine(NamedTuple):
    """A fit of x ~ scale * level + minimum to each group, and what its levels came from: float32 [groups] each."""

    scale: np.ndarray
    minimum: np.ndarray
    inverse: np.ndarray
    origin: np.ndarray


def _fit_affine(
    x: np.ndarray, weights: np.ndarray, top: int, first: float, steps: int, *, absolute: bool = False
) -> _Affine:
    """ggml's make_qkx2_quants: of `steps + 1` trial roundings the one whose least-squares scale and minimum fit best.

    Args:
      x, weights: [n, groups].
      top: the largest level; the smallest is 0. Trial i is scaled to the range top + first + 0.1 * i.
      absolute: weigh absolute errors instead of squared ones.
    """
    low, high = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    sum_w, sum_x = _sum(weights), _sum(weights * x)
    levels, work, weighted = (np.empty_like(x) for _ in range(3))
    size = np.abs if absolute else np.square

    def round_to_levels(inverse: np.ndarray) -> None:
        np.subtract(x, low, out=levels)
        np.multiply(levels, inverse, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, np.float32(0), np.float32(top), out=levels)

    def error(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        np.multiply(levels, scale, out=work)
        np.add(work, minimum, out=work)
        np.subtract(work, x, out=work)
        size(work, out=work)
        return _sum(np.multiply(work, weights, out=work))

    inverse = np.float32(top) / (high - low)
    fit = _Affine(1 / inverse, low, inverse, low.copy())
    round_to_levels(inverse)
    best = error(fit.scale, low)
    for step in range(steps + 1):
        inverse = (np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(top)) / (high - low)
        round_to_levels(inverse)
        sum_l = _sum(np.multiply(weights, levels, out=weighted))
        sum_xl = _sum(np.multiply(weighted, x, out=work))
        sum_l2 = _sum(np.multiply(weighted, levels, out=work))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = minimum > 0
        np.copyto(minimum, np.float32(0), where=above)
        np.copyto(scale, sum_xl / sum_l2, where=above)
        found = error(scale, minimum)
        better = (determinant > 0) & (found < best)
        np.copyto(best, found, where=better)
        # `low` is the fit's minimum from here on, also for the next trial.
        for kept, new in zip(fit, (scale, minimum, inverse, low.copy()), strict=True):
            np.copyto(kept, new, where=better)
    return fit


def _levels_of(x: np.ndarray, fit: _Affine, top: int) -> np.ndarray:
    """The levels that the search chose, uint8 [n, groups]."""
    return np.clip(_nearest_int((x - fit.origin) * fit.inverse), 0, top).astype(np.uint8)


class _Linear(NamedTuple):
    """A fit of x ~ scale * level to each group, float32 [groups], and its levels + the lowest, uint8 [n, groups]."""

    scale: np.ndarray
    levels: np.ndarray


def _fit_linear(x: np.ndarray, top: int) -> _Linear:
    """ggml's make_qx_quants with weights x^2: the best of 19 trial scales; levels from -top to top - 1."""
    largest = _largest(x)
    weights = x * x
    weighted_x = weights * x
    levels, work = np.empty_like(x), np.empty_like(x)

    def sums(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.multiply(x, inverse, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, np.float32(-top), np.float32(top - 1), out=levels)
        sum_lx = _sum(np.multiply(weighted_x, levels, out=work))
        np.multiply(weights, levels, out=work)
        return sum_lx, _sum(np.multiply(work, levels, out=work))

    inverse = np.float32(-top) / largest
    sum_lx, sum_l2 = sums(inverse)
    scale = np.where(sum_l2 != 0, sum_lx / sum_l2, np.float32(0))
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        trial = -(np.float32(top) + np.float32(0.1) * np.float32(step)) / largest
        sum_lx, sum_l2 = sums(trial)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        np.copyto(inverse, trial, where=better)
        np.copyto(scale, sum_lx / sum_l2, where=better)
        np.copyto(best, scale * sum_lx, where=better)
    zero = np.abs(largest) < _EPSILON
    scale[zero] = 0
    chosen = (np.clip(_nearest_int(x * inverse), -top, top - 1) + top).astype(np.uint8)
    chosen[:, zero] = 0
    return _Linear(scale, chosen)


def _fit_by_coordinates(x: np.ndarray, top: int) -> _Linear:
    """ggml's make_q3_quants with weights x^2: from the largest value's scale, five rounds of moving level by level."""
    largest = _largest(x)
    weights = x * x
    weighted_x = weights * x
    levels = np.clip(_nearest_int(x * (np.float32(-top) / largest)), -top, top - 1).astype(np.float32)
    sum_lx, sum_l2 = _sum(weighted_x * levels), _sum(weights * levels * levels)
    for _ in range(5):
        before = levels.copy()
        for value, weight, weighted, level in zip(x, weights, weighted_x, levels, strict=True):
            rest_lx, rest_l2 = sum_lx - weighted * level, sum_l2 - weight * level * level
            new = np.clip(_nearest_int(value * rest_l2 / rest_lx), -top, top - 1).astype(np.float32)
            new_lx, new_l2 = rest_lx + weighted * new, rest_l2 + weight * new * new
            better = (rest_lx > 0) & (new != level) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            np.copyto(level, new, where=better)
            np.copyto(sum_lx, new_lx, where=better)
            np.copyto(sum_l2, new_l2, where=better)
        if (before == levels).all():
            break
    scale = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))
    zero = np.abs(largest) < _EPSILON
    scale[zero] = 0
    chosen = (levels + np.float32(top)).astype(np.uint8)
    chosen[:, zero] = 0
    return _Linear(scale, chosen)


def _fit_iq4(x: np.ndarray) -> np.ndarray:
    """ggml's search of quantize_row_iq4_nl_impl: scales of x ~ scale * (one of _IQ4_VALUES), float32 [groups]."""
    largest = _largest(x)
    weights = x * x

    def sums(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = _IQ4_VALUES[_nearest_iq4(x * inverse)]
        weighted = weights * values
        return _sum(weighted * x), _sum(weighted * values)

    sum_qx, sum_q2 = sums(1 / (-largest / _IQ4_VALUES[0]))
    scale = sum_qx / sum_q2
    best = scale * sum_qx
    for step in range(-7, 8):
        sum_qx, sum_q2 = sums((np.float32(step) + _IQ4_VALUES[0]) / largest)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        np.copyto(scale, sum_qx / sum_q2, where=better)
        np.copyto(best, scale * sum_qx, where=better)
    scale[np.abs(largest) < _EPSILON] = 0
    return scale


# The index of the nearest value, by floor(2 x): all midpoints of neighbours are multiples of a half.
_IQ4_NEAREST = np.searchsorted(_IQ4_VALUES[1:] + _IQ4_VALUES[:-1], np.arange(-256, 256), side="right").astype(np.uint8)


def _nearest_iq4(x: np.ndarray) -> np.ndarray:
    """Indices into _IQ4_VALUES, uint8; the upper one of two that are as near."""
    doubled = np.clip(np.floor(x + x), np.float32(-256), np.float32(255))
    return _IQ4_NEAREST.take(doubled.astype(np.int64) + 256, mode="clip")


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    x = _groups(blocks, 32)
    d = np.abs(x).max(axis=0) / np.float32(127)
    scaled = x * _reciprocal(d)
    # Half away from zero, as C's roundf; adding 0.5 itself would round the number just below 0.5 up as well.
    levels = _truncate(scaled + np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), scaled))
    return np.concatenate([_bytes(d.astype(np.float16)), levels.T.view(np.uint8)], axis=1)


def _symmetric(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Q4_0 and Q5_0: the largest value becomes the lowest level."""
    x, half = _groups(blocks, 32), 2 ** (bits - 1)
    d = _largest(x) / np.float32(-half)
    levels = _truncate(x * _reciprocal(d) + np.float32(half + 0.5))
    levels = np.minimum(levels, np.int8(2 * half - 1)).view(np.uint8)
    return np.concatenate([_bytes(d.astype(np.float16)), *_nibbles(levels, bits)], axis=1)


def _with_minimum(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Q4_1 and Q5_1: levels from the smallest value up."""
    x, top = _groups(blocks, 32), 2**bits - 1
    low = x.min(axis=0)
    # ggml keeps the sign of the first of several zeros.
    zero = np.flatnonzero(low == 0)
    low[zero] = _at(x[:, zero], x[:, zero].argmin(axis=0))
    d = (x.max(axis=0) - low + np.float32(0)) / np.float32(top)  # + 0: no -0 from zeros of both signs
    levels = _truncate((x - low) * _reciprocal(d) + np.float32(0.5))
    levels = np.minimum(levels, np.int8(top)).view(np.uint8)
    halves = (_bytes(part.astype(np.float16)) for part in (d, low))
    return np.concatenate([*halves, *_nibbles(levels, bits)], axis=1)


def _nibbles(levels: np.ndarray, bits: int) -> list[np.ndarray]:
    """[32, blocks] levels as a block's last fields: with five bits, the fifth ones before the nibbles."""
    levels = levels.T.reshape(-1, 1, 2, 16)
    fifth = [_pack((levels >> 4).reshape(-1, 4, 8, 1))] if bits == 5 else []
    return [*fifth, _pack(levels & 15)]


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    x = _groups(blocks, 16)
    fit = _fit_affine(x, np.abs(x), 3, -0.5, 15, absolute=True)
    d, scales = _shared_scale(fit.scale, 15, 16)
    d_min, minima = _shared_scale(-fit.minimum, 15, 16)
    levels = _requantize_affine(x, fit, (d, scales), (d_min, minima), 3)
    packed = (scales | minima << 4).astype(np.uint8)
    return np.concatenate([packed, _pack(levels.reshape(-1, 2, 4, 32)), _bytes(d), _bytes(d_min)], axis=1)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    x = _groups(blocks, 16)
    fit = _fit_by_coordinates(x, 4)
    inverse, scales = _signed_scales(fit.scale, -32, 31)
    d = np.where(np.isfinite(inverse), 1 / inverse, np.float32(0)).astype(np.float16)
    levels = _requantize_linear(x, fit, d, scales, 4)
    high_bits, low_bits = _pack((levels >> 2).reshape(-1, 1, 8, 32)), _pack((levels & 3).reshape(-1, 2, 4, 32))
    codes = np.where(np.isfinite(inverse)[:, None], scales + 32, 0).astype(np.uint8)
    packed = [codes[:, :8] & 15 | (codes[:, 8:] & 15) << 4, _pack((codes >> 4).reshape(-1, 1, 4, 4))]
    return np.concatenate([high_bits, low_bits, *packed, _bytes(d)], axis=1)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    header, levels = _k_scales_and_levels(blocks, 15, -1.0, 20)
    return np.concatenate([header, _pack(levels.reshape(-1, 4, 2, 32))], axis=1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    header, levels = _k_scales_and_levels(blocks, 31, -0.5, 15)
    fifth_bits = _pack((levels >> 4).reshape(-1, 1, 8, 32))
    return np.concatenate([header, fifth_bits, _pack((levels & 15).reshape(-1, 4, 2, 32))], axis=1)


def _k_scales_and_levels(blocks: np.ndarray, top: int, first: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What Q4_K and Q5_K share: float16 d and d_min with eight 6-bit scales and minima, uint8 [blocks, 16]; levels."""
    x = _groups(blocks, 32)
    weights = np.sqrt(_sum(x * x) / np.float32(32)) + np.abs(x)
    fit = _fit_affine(x, weights, top, first, steps)
    d, scales = _shared_scale(fit.scale, 63, 8)
    d_min, minima = _shared_scale(-fit.minimum, 63, 8)
    levels = _requantize_affine(x, fit, (d, scales), (d_min, minima), top)
    packed = [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
    ]
    return np.concatenate([_bytes(d), _bytes(d_min), *packed], axis=1), levels


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    x = _groups(blocks, 16)
    fit = _fit_linear(x, 32)
    inverse, scales = _signed_scales(fit.scale, -128, 127)
    d = (1 / inverse).astype(np.float16)
    levels = _requantize_linear(x, fit, d, scales, 32)
    halves = levels.reshape(-1, 2, 4, 32)
    low = _pack((halves & 15).reshape(-1, 2, 2, 2, 32).swapaxes(2, 3).reshape(-1, 4, 2, 32))
    parts = [low, _pack(halves >> 4), scales.astype(np.int8).view(np.uint8), _bytes(d)]
    quantized = np.concatenate(parts, axis=1)
    quantized[np.abs(fit.scale).reshape(-1, 16).max(axis=1) < _EPSILON] = 0
    return quantized


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    scale = _fit_iq4(_groups(blocks, 32))
    inverse = _reciprocal(scale)
    levels = _nearest_iq4(blocks * inverse[:, None])
    return np.concatenate([_bytes(scale.astype(np.float16)), _pack(levels.reshape(-1, 1, 2, 16))], axis=1)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    scales = _fit_iq4(_groups(blocks, 32)).reshape(-1, 8)
    d = -_largest(scales.T) / np.float32(32)
    inverse = _reciprocal(d)
    codes = np.clip(_nearest_int(inverse[:, None] * scales), -32, 31)
    group_d = d[:, None] * codes.astype(np.float32)
    group_inverse = _reciprocal(group_d)
    levels = _nearest_iq4(blocks.reshape(-1, 8, 32) * group_inverse[:, :, None])
    codes = (codes + 32).astype(np.uint8)
    high = _pack((codes >> 4).reshape(-1, 2, 4, 1))
    low = _pack((codes & 15).reshape(-1, 4, 2, 1))
    return np.concatenate([_bytes(d.astype(np.float16)), high, low, _pack(levels.reshape(-1, 8, 2, 16))], axis=1)


def _shared_scale(values: np.ndarray, top: int, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups' values as multiples 0 .. top of one float16 a block: float16 [blocks], uint8 [blocks, n_groups]."""
    values = values.reshape(-1, n_groups)
    largest = np.maximum(values.max(axis=1), np.float32(0))
    inverse = np.where(largest > 0, np.float32(top) / largest, np.float32(0))
    codes = _nearest_int(inverse[:, None] * values).astype(np.uint8)
    return (largest / np.float32(top)).astype(np.float16), np.minimum(codes, np.uint8(top))


def _signed_scales(values: np.ndarray, bottom: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups' values as integers, the largest of a block as `bottom`: 1 / scale [blocks], int32 [blocks, 16]."""
    values = values.reshape(-1, 16)
    inverse = np.float32(bottom) / _largest(values.T)
    return inverse, np.clip(_nearest_int(inverse[:, None] * values), bottom, top)


def _requantize_affine(
    x: np.ndarray,
    fit: _Affine,
    scale: tuple[np.ndarray, np.ndarray],
    minimum: tuple[np.ndarray, np.ndarray],
    top: int,
) -> np.ndarray:
    """Levels for the scales and minima as they are stored, uint8 [blocks, 256]; the search's where the scale is 0."""
    (d, codes), (d_min, min_codes) = scale, minimum
    group_d = (d.astype(np.float32)[:, None] * codes.astype(np.float32)).reshape(-1)
    group_min = (d_min.astype(np.float32)[:, None] * min_codes.astype(np.float32)).reshape(-1)
    levels = np.clip(_nearest_int((x + group_min) / group_d), 0, top).astype(np.uint8)
    zero = np.flatnonzero(group_d == 0)
    levels[:, zero] = _levels_of(x[:, zero], _Affine(*(part[zero] for part in fit)), top)
    return _in_blocks(levels)


def _requantize_linear(x: np.ndarray, fit: _Linear, d: np.ndarray, codes: np.ndarray, top: int) -> np.ndarray:
    """Levels + `top` for the scales as they are stored, uint8 [blocks, 256]; the search's where the scale is 0."""
    group_d = (d.astype(np.float32)[:, None] * codes.astype(np.float32)).reshape(-1)
    levels = (np.clip(_nearest_int(x / group_d), -top, top - 1) + top).astype(np.uint8)
    return _in_blocks(np.where(group_d == 0, fit.levels, levels))


def _groups(blocks: np.ndarray, n: int) -> np.ndarray:
    """[blocks, size] -> [n, groups]: the values of each group of n neighbours along the first axis."""
    return np.ascontiguousarray(blocks.reshape(-1, n).T)


def _in_blocks(groups: np.ndarray) -> np.ndarray:
    """[n, groups] -> [blocks, 256]."""
    return groups.T.reshape(-1, 256)


def _sum(x: np.ndarray) -> np.ndarray:
    """Sums over the first axis, one value after the other; numpy would add a single column in pairs."""
    return np.add.reduce(x, axis=0) if x.shape[1] > 1 else np.add.accumulate(x, axis=0)[-1]


def _largest(x: np.ndarray) -> np.ndarray:
    """The first value of each column whose absolute value is the column's largest; never -0."""
    high, low = x.max(axis=0), x.min(axis=0)
    largest = np.where(high > -low, high, low)
    tied = np.flatnonzero(high == -low)
    largest[tied] = _at(x[:, tied], np.abs(x[:, tied]).argmax(axis=0))
    return largest + np.float32(0)


def _at(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One value of each column."""
    return np.take_along_axis(x, rows[None], axis=0)[0]


def _reciprocal(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 for 0."""
    return np.where(x != 0, 1 / x, np.float32(0))


def _truncate(x: np.ndarray) -> np.ndarray:
    """C's conversion to int8 on x86, by way of int32, also of the infinite values that vanishing scales give."""
    return x.astype(np.int32).astype(np.int8)


def _nearest_int(x: np.ndarray) -> np.ndarray:
    """ggml's nearest_int: half to even, by the bits of x + 1.5 * 2^23. int32; what is not finite gives no error."""
    return ((x + np.float32(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def _pack(parts: np.ndarray) -> np.ndarray:
    """uint8 [blocks, a, k, b] -> [blocks, a * b]: the k parts share a byte, the first in its lowest 8 / k bits."""
    k = parts.shape[2]
    shifts = np.arange(0, 8, 8 // k, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(parts), -1)


def _bytes(halves: np.ndarray) -> np.ndarray:
    """float16 [blocks] -> uint8 [blocks, 2]."""
    return halves[:, None].view(np.uint8)


def _by_gguf(kind: GGMLQuantizationType) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: gguf.quants.quantize(blocks, kind)


_QUANTIZERS: dict[GGMLQuantizationType, Callable[[np.ndarray], np.ndarray]] = {
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_0: partial(_symmetric, bits=4),
    GGMLQuantizationType.Q4_1: partial(_with_minimum, bits=4),
    GGMLQuantizationType.Q5_0: partial(_symmetric, bits=5),
    GGMLQuantizationType.Q5_1: partial(_with_minimum, bits=5),
    GGMLQuantizationType.Q2_K: _q2_k,
    GGMLQuantizationType.Q3_K: _q3_k,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
    GGMLQuantizationType.IQ4_NL: _iq4_nl,
    GGMLQuantizationType.IQ4_XS: _iq4_xs,
    GGMLQuantizationType.MXFP4: _by_gguf(GGMLQuantizationType.MXFP4),
    GGMLQuantizationType.TQ1_0: _by_gguf(GGMLQuantizationType.TQ1_0),
    GGMLQuantizationType.TQ2_0: _by_gguf(GGMLQuantizationType.TQ2_0),
}
QUANTIZABLE = frozenset(_QUANTIZERS)

# Where a block keeps its float16 scales.
_SCALES: dict[GGMLQuantizationType, tuple[int, ...]] = {
    GGMLQuantizationType.Q8_0: (0,),
    GGMLQuantizationType.Q4_0: (0,),
    GGMLQuantizationType.Q4_1: (0, 2),
    GGMLQuantizationType.Q5_0: (0,),
    GGMLQuantizationType.Q5_1: (0, 2),
    GGMLQuantizationType.Q2_K: (80, 82),
    GGMLQuantizationType.Q3_K: (108,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
    GGMLQuantizationType.IQ4_NL: (0,),
    GGMLQuantizationType.IQ4_XS: (0,),
    GGMLQuantizationType.MXFP4: (),
    GGMLQuantizationType.TQ1_0: (52,),
    GGMLQuantizationType.TQ2_0: (64,),
}
