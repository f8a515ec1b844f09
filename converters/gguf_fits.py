"""The searches behind GGUF's block quantizations: which scales, minima and levels ggml finds for groups of values.

Every function works on arrays [n, groups], the n values of a group along the first axis, in float32 and in ggml's
order of operations; see `converters.gguf_quants`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# ggml takes groups below this for zeros.
EPSILON = np.float32(1e-15)

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


class Affine(NamedTuple):
    """A fit of x ~ scale * level + minimum to each group, and what its levels came from: float32 [groups] each."""

    scale: np.ndarray
    minimum: np.ndarray
    inverse: np.ndarray
    origin: np.ndarray


class Trials(NamedTuple):
    """The roundings that `fit_affine` tries: trial i of `steps` + 1 is scaled to the range top + first + delta * i."""

    first: float
    delta: float
    steps: int

    def scaled_tops(self, top: int) -> np.ndarray:
        """What the range of a group becomes in each, float32 [steps + 1]."""
        offsets = np.float32(self.first) + np.float32(self.delta) * np.arange(self.steps + 1, dtype=np.float32)
        return offsets + np.float32(top)


def fit_affine(x: np.ndarray, weights: np.ndarray, top: int, trials: Trials, *, absolute: bool = False) -> Affine:
    """ggml's make_qkx2_quants and make_qkx3_quants: of several trial roundings the one whose least-squares scale and
    minimum fit best.

    Args:
      x, weights: [n, groups].
      top: the largest level; the smallest is 0.
      trials: which roundings.
      absolute: weigh absolute errors instead of squared ones.
    """
    low, high = lowest_of(x), x.max(axis=0)
    low[low > 0] = 0
    sum_w, sum_x = sum_of(weights), sum_of(weights * x)
    # What follows goes over few arrays, and in place: its time is the time that memory takes.
    levels, weighted, work = (np.empty_like(x) for _ in range(3))
    size = np.abs if absolute else np.square

    def round_to_levels(inverse: np.ndarray) -> None:
        np.subtract(x, low, out=levels)
        np.multiply(levels, inverse, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, np.float32(0), np.float32(top), out=levels)

    def error(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        """Overwrites the levels."""
        np.multiply(levels, scale, out=levels)
        np.add(levels, minimum, out=levels)
        np.subtract(levels, x, out=levels)
        size(levels, out=levels)
        return sum_of(np.multiply(levels, weights, out=levels))

    inverse = np.float32(top) / (high - low)
    fit = Affine(1 / inverse, low, inverse, low.copy())
    round_to_levels(inverse)
    best = error(fit.scale, low)
    for scaled_top in trials.scaled_tops(top):
        inverse = scaled_top / (high - low)
        round_to_levels(inverse)
        sum_l = sum_of(np.multiply(weights, levels, out=weighted))
        sum_xl = sum_of(np.multiply(weighted, x, out=work))
        sum_l2 = sum_of(np.multiply(weighted, levels, out=weighted))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = np.flatnonzero(minimum > 0)
        minimum[above] = 0
        scale[above] = sum_xl[above] / sum_l2[above]
        found = error(scale, minimum)
        better = np.flatnonzero((determinant > 0) & (found < best))
        fit.origin[better] = low[better]
        # `low` is the fit's minimum from here on, also for the next trial.
        _take(better, (best, found), (fit.scale, scale), (low, minimum), (fit.inverse, inverse))
    return fit


def levels_of(x: np.ndarray, fit: Affine, top: int) -> np.ndarray:
    """The levels that the search chose, uint8 [n, groups]."""
    return np.clip(nearest_int((x - fit.origin) * fit.inverse), 0, top).astype(np.uint8)


class Linear(NamedTuple):
    """A fit of x ~ scale * level to each group, float32 [groups], and its levels + the lowest, uint8 [n, groups]."""

    scale: np.ndarray
    levels: np.ndarray


def search_linear(x: np.ndarray, weights: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of 19 trial scales of x ~ scale * level, and what the levels came from: float32 [groups] each."""
    largest = largest_of(x)
    weighted_x = weights * x
    levels, work = np.empty_like(x), np.empty_like(x)

    def sums(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.multiply(x, inverse, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, np.float32(-top), np.float32(top - 1), out=levels)
        sum_lx = sum_of(np.multiply(weighted_x, levels, out=work))
        np.multiply(weights, levels, out=work)
        return sum_lx, sum_of(np.multiply(work, levels, out=work))

    inverse = np.float32(-top) / largest
    sum_lx, sum_l2 = sums(inverse)
    scale = np.where(sum_l2 != 0, sum_lx / sum_l2, np.float32(0))
    best = scale * sum_lx
    for scaled_top in linear_trials(top):
        trial = scaled_top / largest
        sum_lx, sum_l2 = sums(trial)
        better = np.flatnonzero((sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2))
        inverse[better] = trial[better]
        scale[better] = sum_lx[better] / sum_l2[better]
        best[better] = scale[better] * sum_lx[better]
    scale[np.abs(largest) < EPSILON] = 0
    return scale, inverse


def linear_trials(top: int) -> np.ndarray:
    """What the largest value of a group becomes in each trial but the first, float32 [18]."""
    steps = np.array([*range(-9, 0), *range(1, 10)], np.float32)
    return -(np.float32(top) + np.float32(0.1) * steps)


class Fits(NamedTuple):
    """The searches that take most of the time: `fit_affine` and `search_linear`, or what does the same."""

    affine: Callable[..., Affine]
    linear: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


NUMPY = Fits(fit_affine, search_linear)


def fit_linear(x: np.ndarray, top: int, weights: np.ndarray, *, fits: Fits = NUMPY) -> Linear:
    """ggml's make_qx_quants: the best of 19 trial scales; levels from -top to top - 1."""
    scale, inverse = fits.linear(x, weights, top)
    return Linear(scale, linear_levels(x, inverse, top))


def linear_levels(x: np.ndarray, inverse: np.ndarray, top: int) -> np.ndarray:
    """The levels + `top` that the search chose, uint8 [n, groups]."""
    levels = (np.clip(nearest_int(x * inverse), -top, top - 1) + top).astype(np.uint8)
    levels[:, np.abs(largest_of(x)) < EPSILON] = 0
    return levels


def fit_by_coordinates(x: np.ndarray, top: int) -> Linear:
    """ggml's make_q3_quants with weights x^2: from the largest value's scale, five rounds of moving level by level."""
    largest = largest_of(x)
    levels = np.clip(nearest_int(x * (np.float32(-top) / largest)), -top, top - 1).astype(np.float32)
    scale = _move_levels(x, x * x, levels, (-top, top - 1))
    zero = np.abs(largest) < EPSILON
    scale[zero] = 0
    chosen = (levels + np.float32(top)).astype(np.uint8)
    chosen[:, zero] = 0
    return Linear(scale, chosen)


def fit_positive(x: np.ndarray, top: int, weights: np.ndarray) -> Linear:
    """ggml's make_qp_quants: x of no negative values; the best of 9 trial scales, then as `fit_by_coordinates`.

    The levels go from 0 to `top`.
    """
    largest = np.maximum(x.max(axis=0), np.float32(0))

    def error(inverse: np.ndarray) -> np.ndarray:
        difference = x - (1 / inverse) * np.minimum(nearest_int(inverse * x), top).astype(np.float32)
        return sum_of(weights * difference * difference)

    inverse = np.float32(top) / largest
    best = error(inverse)
    for step in (*range(-4, 0), *range(1, 5)):
        trial = (np.float32(0.1) * np.float32(step) + np.float32(top)) / largest
        found = error(trial)
        _take(np.flatnonzero(found < best), (best, found), (inverse, trial))
    levels = np.minimum(nearest_int(inverse * x), top).astype(np.float32)
    scale = _move_levels(x, weights, levels, (None, top))
    zero = largest < EPSILON
    scale[zero] = 0
    levels[:, zero] = 0
    return Linear(scale, levels.astype(np.uint8))


def _move_levels(x: np.ndarray, weights: np.ndarray, levels: np.ndarray, limits: tuple[int | None, int]) -> np.ndarray:
    """Up to five rounds in which each level in turn moves, in place, where that improves the fit: the scales."""
    weighted_x = weights * x
    sum_lx, sum_l2 = sum_of(weighted_x * levels), sum_of(weights * levels * levels)
    for _ in range(5):
        before = levels.copy()
        for value, weight, weighted, level in zip(x, weights, weighted_x, levels, strict=True):
            rest_lx, rest_l2 = sum_lx - weighted * level, sum_l2 - weight * level * level
            new = np.clip(nearest_int(value * rest_l2 / rest_lx), *limits).astype(np.float32)
            new_lx, new_l2 = rest_lx + weighted * new, rest_l2 + weight * new * new
            better = (rest_lx > 0) & (new != level) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            _take(np.flatnonzero(better), (level, new), (sum_lx, new_lx), (sum_l2, new_l2))
        if (before == levels).all():
            break
    return np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))


def fit_iq4(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """ggml's search of quantize_row_iq4_nl_impl: scales of x ~ scale * (one of _IQ4_VALUES), float32 [groups]. No
    weights: x^2."""
    largest = largest_of(x)
    weights = x * x if weights is None else weights

    def sums(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = _IQ4_VALUES[nearest_iq4(x * inverse)]
        weighted = weights * values
        return sum_of(weighted * x), sum_of(weighted * values)

    sum_qx, sum_q2 = sums(1 / (-largest / _IQ4_VALUES[0]))
    scale = np.where(sum_q2 > 0, sum_qx / sum_q2, np.float32(0))
    best = scale * sum_qx
    for step in range(-7, 8):
        sum_qx, sum_q2 = sums((np.float32(step) + _IQ4_VALUES[0]) / largest)
        better = np.flatnonzero((sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2))
        scale[better] = sum_qx[better] / sum_q2[better]
        best[better] = scale[better] * sum_qx[better]
    scale[np.abs(largest) < EPSILON] = 0
    return scale


# The index of the nearest value, by floor(2 x): all midpoints of neighbours are multiples of a half.
_IQ4_NEAREST = np.searchsorted(_IQ4_VALUES[1:] + _IQ4_VALUES[:-1], np.arange(-256, 256), side="right").astype(np.uint8)


def nearest_iq4(x: np.ndarray) -> np.ndarray:
    """Indices into _IQ4_VALUES, uint8; the upper one of two that are as near."""
    doubled = np.clip(np.floor(x + x), np.float32(-256), np.float32(255))
    return _IQ4_NEAREST.take(doubled.astype(np.int64) + 256, mode="clip")


def _take(where: np.ndarray, *pairs: tuple[np.ndarray, np.ndarray]) -> None:
    """Replaces, at some indices, the first of each pair by the second; np.copyto with a mask takes twice as long."""
    for kept, new in pairs:
        kept[where] = new[where]


def groups_of(blocks: np.ndarray, n: int) -> np.ndarray:
    """[blocks, size] -> [n, groups]: the values of each group of n neighbours along the first axis."""
    return np.ascontiguousarray(blocks.reshape(-1, n).T)


def in_blocks(groups: np.ndarray) -> np.ndarray:
    """[n, groups] -> [blocks, 256]."""
    return groups.T.reshape(-1, 256)


def sum_of(x: np.ndarray) -> np.ndarray:
    """Sums over the first axis, one value after the other; numpy would add a single column in pairs."""
    return np.add.reduce(x, axis=0) if x.shape[1] > 1 else np.add.accumulate(x, axis=0)[-1]


def lowest_of(x: np.ndarray) -> np.ndarray:
    """The smallest value of each column; of zeros the first, whose sign ggml keeps."""
    low = x.min(axis=0)
    zero = np.flatnonzero(low == 0)
    low[zero] = _at(x[:, zero], x[:, zero].argmin(axis=0))
    return low


def largest_of(x: np.ndarray) -> np.ndarray:
    """The first value of each column whose absolute value is the column's largest; never -0."""
    high, low = x.max(axis=0), x.min(axis=0)
    largest = np.where(high > -low, high, low)
    tied = np.flatnonzero(high == -low)
    largest[tied] = _at(x[:, tied], np.abs(x[:, tied]).argmax(axis=0))
    return largest + np.float32(0)


def _at(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One value of each column."""
    return np.take_along_axis(x, rows[None], axis=0)[0]


def reciprocal(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 for 0."""
    return np.where(x != 0, 1 / x, np.float32(0))


def nearest_int(x: np.ndarray) -> np.ndarray:
    """ggml's nearest_int: half to even, by the bits of x + 1.5 * 2^23. int32; what is not finite gives no error."""
    bits = (x + np.float32(12582912)).view(np.int32)
    bits &= 0x7FFFFF
    bits -= 0x400000
    return bits
