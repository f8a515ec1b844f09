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

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.gguf_fits import (
    EPSILON,
    NUMPY,
    Affine,
    Fits,
    Trials,
    fit_by_coordinates,
    fit_iq4,
    fit_linear,
    fit_positive,
    groups_of,
    in_blocks,
    largest_of,
    levels_of,
    linear_levels,
    lowest_of,
    nearest_int,
    nearest_iq4,
    reciprocal,
    sum_of,
)  # fmt: skip

# Values that are worked on at a time: with more, the arrays leave the core's cache; with fewer, Python takes longer.
_CHUNK = 1 << 18

Quantize = Callable[[np.ndarray, GGMLQuantizationType, np.ndarray | None], np.ndarray]

# ggml's trial roundings of K-quants, and those of every affine type where importance is given.
_Q2_TRIALS, _Q4_TRIALS, _Q5_TRIALS = Trials(-0.5, 0.1, 15), Trials(-1.0, 0.1, 20), Trials(-0.5, 0.1, 15)
_WEIGHTED_TRIALS = Trials(-0.9, 0.05, 36)


def quantize(
    matrix: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None = None, *, fits: Fits = NUMPY
) -> np.ndarray:
    """The matrix in a quantized type.

    Args:
      matrix: [..., columns] of float32, float16 or bfloat16; columns a multiple of the type's block.
      kind: a type of `QUANTIZABLE`.
      importance: float32 [columns]: the mean squares of what each column is multiplied by, which weigh its rounding
        errors. Types not in `WEIGHTED` do without.
      fits: how the longest searches are made.

    Returns:
      uint8 [..., bytes of a row].

    Raises:
      FloatingPointError: a value is not finite, or a block's float16 scale would not be.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = matrix.reshape(-1, matrix.shape[-1])
    quantized = np.empty((len(rows), rows.shape[1] // block * block_bytes), np.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        quantized[start : start + step] = _quantize_rows(some, kind, importance, fits).reshape(len(some), -1)
    return quantized.reshape(*matrix.shape[:-1], -1)


def _quantize_rows(
    rows: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None, fits: Fits
) -> np.ndarray:
    """uint8 [blocks, bytes of a block]."""
    rows = rows.astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise FloatingPointError("a value is not finite")
    blocks = rows.reshape(-1, GGML_QUANT_SIZES[kind][0])
    # Divisions by the scale 0 of a constant group are sorted out where their results would be used.
    with np.errstate(all="ignore"):
        if importance is None or kind not in WEIGHTED:
            quantized = _QUANTIZERS[kind](blocks, None, fits)
        else:
            quantized = _QUANTIZERS[kind](blocks, Importance.of(rows, importance, blocks.shape[1]), fits)
    for offset in _SCALES[kind]:
        if not np.isfinite(np.ascontiguousarray(quantized[:, offset : offset + 2]).view(np.float16)).all():
            raise FloatingPointError("a scale is beyond float16")
    return quantized


class Importance(NamedTuple):
    """What weighs rounding errors: float32 [blocks, size], and the mean square of each block's row, [blocks]."""

    values: np.ndarray
    row_mean: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, importance: np.ndarray, size: int) -> Importance:
        """Of rows [rows, columns] and importance [columns], in blocks of `size`."""
        values = np.tile(importance.astype(np.float32).reshape(-1, size), (len(rows), 1))
        means = sum_of(np.ascontiguousarray(np.square(rows).T)) / np.float32(rows.shape[1])
        return cls(values, np.repeat(means, rows.shape[1] // size))

    def weights(self, blocks: np.ndarray, n: int, mean: np.ndarray) -> np.ndarray:
        """importance * sqrt(mean + x^2), [n, groups], with a mean square for each block."""
        mean = np.repeat(mean, blocks.shape[1] // n)
        return groups_of(self.values, n) * np.sqrt(mean + np.square(groups_of(blocks, n)))


def _mean_square(blocks: np.ndarray, factor: float = 1) -> np.ndarray:
    """Of each block, times a power of two."""
    return np.float32(factor) * sum_of(np.ascontiguousarray(np.square(blocks).T)) / np.float32(blocks.shape[1])


def _q8_0(blocks: np.ndarray, *_: object) -> np.ndarray:
    x = groups_of(blocks, 32)
    d = np.abs(x).max(axis=0) / np.float32(127)
    scaled = x * reciprocal(d)
    # Half away from zero, as C's roundf; adding 0.5 itself would round the number just below 0.5 up as well.
    levels = _truncate(scaled + np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), scaled))
    return np.concatenate([_bytes(d.astype(np.float16)), levels.T.view(np.uint8)], axis=1)


def _symmetric(blocks: np.ndarray, importance: Importance | None, fits: Fits, *, bits: int) -> np.ndarray:
    """Q4_0 and Q5_0: the largest value becomes the lowest level."""
    x, half = groups_of(blocks, 32), 2 ** (bits - 1)
    if importance is None:
        d = largest_of(x) / np.float32(-half)
        levels = _truncate(x * reciprocal(d) + np.float32(half + 0.5))
        levels = np.minimum(levels, np.int8(2 * half - 1)).view(np.uint8)
    else:
        d, levels = fit_linear(x, half, importance.weights(blocks, 32, importance.row_mean), fits=fits)
    return np.concatenate([_bytes(d.astype(np.float16)), *_nibbles(levels, bits)], axis=1)


def _with_minimum(blocks: np.ndarray, importance: Importance | None, fits: Fits, *, bits: int) -> np.ndarray:
    """Q4_1 and Q5_1: levels from the smallest value up."""
    x, top = groups_of(blocks, 32), 2**bits - 1
    if importance is None:
        low = lowest_of(x)
        d = (x.max(axis=0) - low + np.float32(0)) / np.float32(top)  # + 0: no -0 from zeros of both signs
        levels = _truncate((x - low) * reciprocal(d) + np.float32(0.5))
        levels = np.minimum(levels, np.int8(top)).view(np.uint8)
    else:
        fit = fits.affine(x, importance.weights(blocks, 32, importance.row_mean), top, _WEIGHTED_TRIALS)
        d, low, levels = fit.scale + np.float32(0), fit.minimum, levels_of(x, fit, top)  # + 0: as above
    halves = (_bytes(part.astype(np.float16)) for part in (d, low))
    return np.concatenate([*halves, *_nibbles(levels, bits)], axis=1)


def _nibbles(levels: np.ndarray, bits: int) -> list[np.ndarray]:
    """[32, blocks] levels as a block's last fields: with five bits, the fifth ones before the nibbles."""
    levels = levels.T.reshape(-1, 1, 2, 16)
    fifth = [_pack((levels >> 4).reshape(-1, 4, 8, 1))] if bits == 5 else []
    return [*fifth, _pack(levels & 15)]


def _q2_k(blocks: np.ndarray, importance: Importance | None, fits: Fits) -> np.ndarray:
    x = groups_of(blocks, 16)
    if importance is None:
        fit = fits.affine(x, np.abs(x), 3, _Q2_TRIALS, absolute=True)
        scale, minimum = _shared_scale(fit.scale, 15, 16), _shared_scale(-fit.minimum, 15, 16)
    else:
        weights = importance.weights(blocks, 16, _mean_square(blocks))
        fit = fits.affine(x, weights, 3, _WEIGHTED_TRIALS)
        scale, minimum = (_weighted_scale(values, 15, 16, weights) for values in (fit.scale, -fit.minimum))
    levels = _requantize_affine(x, fit, scale, minimum, 3)
    packed = (scale[1] | minimum[1] << 4).astype(np.uint8)
    return np.concatenate([packed, _pack(levels.reshape(-1, 2, 4, 32)), _bytes(scale[0]), _bytes(minimum[0])], axis=1)


def _q3_k(blocks: np.ndarray, importance: Importance | None, fits: Fits) -> np.ndarray:
    x = groups_of(blocks, 16)
    if importance is None:
        fit = fit_by_coordinates(x, 4)
        inverse, scales = _signed_scales(fit.scale, -32, 31)
        codes = np.where(np.isfinite(inverse)[:, None], scales + 32, 0).astype(np.uint8)
        d = np.where(np.isfinite(inverse), 1 / inverse, np.float32(0)).astype(np.float16)
    else:
        weights = importance.weights(blocks, 16, _mean_square(blocks, 2))
        fit = fit_linear(x, 4, weights, fits=fits)
        shared = fit_linear(groups_of(fit.scale, 16), 32, groups_of(sum_of(weights), 16))
        d, codes = shared.scale.astype(np.float16), np.ascontiguousarray(shared.levels.T)
    levels = _requantize_linear(x, lambda zero: fit.levels[:, zero], d, codes.astype(np.int32) - 32, 4)
    high_bits, low_bits = _pack((levels >> 2).reshape(-1, 1, 8, 32)), _pack((levels & 3).reshape(-1, 2, 4, 32))
    packed = [codes[:, :8] & 15 | (codes[:, 8:] & 15) << 4, _pack((codes >> 4).reshape(-1, 1, 4, 4))]
    return np.concatenate([high_bits, low_bits, *packed, _bytes(d)], axis=1)


def _q4_k(blocks: np.ndarray, importance: Importance | None, fits: Fits) -> np.ndarray:
    header, levels = _k_scales_and_levels(blocks, importance, fits, 15, _Q4_TRIALS)
    return np.concatenate([header, _pack(levels.reshape(-1, 4, 2, 32))], axis=1)


def _q5_k(blocks: np.ndarray, importance: Importance | None, fits: Fits) -> np.ndarray:
    header, levels = _k_scales_and_levels(blocks, importance, fits, 31, _Q5_TRIALS)
    fifth_bits = _pack((levels >> 4).reshape(-1, 1, 8, 32))
    return np.concatenate([header, fifth_bits, _pack((levels & 15).reshape(-1, 4, 2, 32))], axis=1)


def _k_scales_and_levels(
    blocks: np.ndarray, importance: Importance | None, fits: Fits, top: int, trials: Trials
) -> tuple[np.ndarray, np.ndarray]:
    """What Q4_K and Q5_K share: float16 d and d_min with eight 6-bit scales and minima, uint8 [blocks, 16]; levels."""
    x = groups_of(blocks, 32)
    if importance is None:
        fit = fits.affine(x, np.sqrt(sum_of(x * x) / np.float32(32)) + np.abs(x), top, trials)
        scale, minimum = _shared_scale(fit.scale, 63, 8), _shared_scale(-fit.minimum, 63, 8)
    else:
        weights = importance.weights(blocks, 32, _mean_square(blocks, 2))
        fit = fits.affine(x, weights, top, _WEIGHTED_TRIALS)
        scale, minimum = (_weighted_scale(values, 63, 8, weights) for values in (fit.scale, -fit.minimum))
    levels = _requantize_affine(x, fit, scale, minimum, top)
    (d, scales), (d_min, minima) = scale, minimum
    packed = [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
    ]
    return np.concatenate([_bytes(d), _bytes(d_min), *packed], axis=1), levels


def _q6_k(blocks: np.ndarray, importance: Importance | None, fits: Fits) -> np.ndarray:
    x = groups_of(blocks, 16)
    scale, origin = fits.linear(x, x * x if importance is None else groups_of(importance.values, 16), 32)
    inverse, scales = _signed_scales(scale, -128, 127)
    d = (1 / inverse).astype(np.float16)
    levels = _requantize_linear(x, lambda zero: linear_levels(x[:, zero], origin[zero], 32), d, scales, 32)
    halves = levels.reshape(-1, 2, 4, 32)
    low = _pack((halves & 15).reshape(-1, 2, 2, 2, 32).swapaxes(2, 3).reshape(-1, 4, 2, 32))
    parts = [low, _pack(halves >> 4), scales.astype(np.int8).view(np.uint8), _bytes(d)]
    quantized = np.concatenate(parts, axis=1)
    quantized[np.abs(scale).reshape(-1, 16).max(axis=1) < EPSILON] = 0
    return quantized


def _iq4_scales(blocks: np.ndarray, importance: Importance | None) -> np.ndarray:
    """float32, one for 32 values."""
    weights = None if importance is None else importance.weights(blocks, 32, _mean_square(blocks, 2))
    return fit_iq4(groups_of(blocks, 32), weights)


def _iq4_nl(blocks: np.ndarray, importance: Importance | None, _: Fits) -> np.ndarray:
    scale = _iq4_scales(blocks, importance)
    inverse = reciprocal(scale)
    levels = nearest_iq4(blocks * inverse[:, None])
    return np.concatenate([_bytes(scale.astype(np.float16)), _pack(levels.reshape(-1, 1, 2, 16))], axis=1)


def _iq4_xs(blocks: np.ndarray, importance: Importance | None, _: Fits) -> np.ndarray:
    scales = _iq4_scales(blocks, importance).reshape(-1, 8)
    d = -largest_of(scales.T) / np.float32(32)
    inverse = reciprocal(d)
    codes = np.clip(nearest_int(inverse[:, None] * scales), -32, 31)
    group_d = d[:, None] * codes.astype(np.float32)
    group_inverse = reciprocal(group_d)
    levels = nearest_iq4(blocks.reshape(-1, 8, 32) * group_inverse[:, :, None])
    codes = (codes + 32).astype(np.uint8)
    high = _pack((codes >> 4).reshape(-1, 2, 4, 1))
    low = _pack((codes & 15).reshape(-1, 4, 2, 1))
    return np.concatenate([_bytes(d.astype(np.float16)), high, low, _pack(levels.reshape(-1, 8, 2, 16))], axis=1)


def _weighted_scale(values: np.ndarray, top: int, n_groups: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_shared_scale`, by a search that weighs each group by the sum of its `weights` [n, groups]."""
    fit = fit_positive(groups_of(values, n_groups), top, groups_of(sum_of(weights), n_groups))
    return fit.scale.astype(np.float16), np.ascontiguousarray(fit.levels.T)


def _shared_scale(values: np.ndarray, top: int, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups' values as multiples 0 .. top of one float16 a block: float16 [blocks], uint8 [blocks, n_groups]."""
    values = values.reshape(-1, n_groups)
    largest = np.maximum(values.max(axis=1), np.float32(0))
    inverse = np.where(largest > 0, np.float32(top) / largest, np.float32(0))
    codes = nearest_int(inverse[:, None] * values).astype(np.uint8)
    return (largest / np.float32(top)).astype(np.float16), np.minimum(codes, np.uint8(top))


def _signed_scales(values: np.ndarray, bottom: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups' values as integers, the largest of a block as `bottom`: 1 / scale [blocks], int32 [blocks, 16]."""
    values = values.reshape(-1, 16)
    inverse = np.float32(bottom) / largest_of(values.T)
    return inverse, np.clip(nearest_int(inverse[:, None] * values), bottom, top)


def _requantize_affine(
    x: np.ndarray,
    fit: Affine,
    scale: tuple[np.ndarray, np.ndarray],
    minimum: tuple[np.ndarray, np.ndarray],
    top: int,
) -> np.ndarray:
    """Levels for the scales and minima as they are stored, uint8 [blocks, 256]; the search's where the scale is 0."""
    (d, codes), (d_min, min_codes) = scale, minimum
    group_d = (d.astype(np.float32)[:, None] * codes.astype(np.float32)).reshape(-1)
    group_min = (d_min.astype(np.float32)[:, None] * min_codes.astype(np.float32)).reshape(-1)
    levels = np.clip(nearest_int((x + group_min) / group_d), 0, top).astype(np.uint8)
    zero = np.flatnonzero(group_d == 0)
    levels[:, zero] = levels_of(x[:, zero], Affine(*(part[zero] for part in fit)), top)
    return in_blocks(levels)


def _requantize_linear(
    x: np.ndarray, searched: Callable[[np.ndarray], np.ndarray], d: np.ndarray, codes: np.ndarray, top: int
) -> np.ndarray:
    """Levels + `top` for the scales as they are stored, uint8 [blocks, 256]; those `searched` where the scale is 0."""
    group_d = (d.astype(np.float32)[:, None] * codes.astype(np.float32)).reshape(-1)
    levels = (np.clip(nearest_int(x / group_d), -top, top - 1) + top).astype(np.uint8)
    zero = np.flatnonzero(group_d == 0)
    levels[:, zero] = searched(zero)
    return in_blocks(levels)


def _truncate(x: np.ndarray) -> np.ndarray:
    """C's conversion to int8 on x86, by way of int32, also of the infinite values that vanishing scales give."""
    return x.astype(np.int32).astype(np.int8)


def _pack(parts: np.ndarray) -> np.ndarray:
    """uint8 [blocks, a, k, b] -> [blocks, a * b]: the k parts share a byte, the first in its lowest 8 / k bits."""
    k = parts.shape[2]
    shifts = np.arange(0, 8, 8 // k, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(parts), -1)


def _bytes(halves: np.ndarray) -> np.ndarray:
    """float16 [blocks] -> uint8 [blocks, 2]."""
    return halves[:, None].view(np.uint8)


def _by_gguf(kind: GGMLQuantizationType) -> Callable[..., np.ndarray]:
    return lambda blocks, *_: gguf.quants.quantize(blocks, kind)


_QUANTIZERS: dict[GGMLQuantizationType, Callable[..., np.ndarray]] = {
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
# Types whose search an importance matrix weighs.
WEIGHTED = QUANTIZABLE - {
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.MXFP4,
    GGMLQuantizationType.TQ1_0,
    GGMLQuantizationType.TQ2_0,
}

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
