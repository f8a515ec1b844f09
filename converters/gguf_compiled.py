"""The longest searches of `converters.gguf_fits` as XLA programs for one core of a CPU: bit for bit, in a quarter of
the time.

XLA's results could differ from numpy's in two ways.

It rounds a * b + c once where the processor can. So a zero is added to each product first, and XLA does not know it to
be one: whether or not it makes one operation of those two, what comes out is the rounded product.

It takes numbers below 2^-126 for zeros. So the programs also say which groups are in doubt, because they might have met
such numbers, and numpy searches those again. Of weights around 0.02 that is one group in 50,000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from converters import gguf_fits
from converters.gguf_fits import EPSILON, Affine, Fits, Trials, linear_trials

# Values that a program works on: their arrays stay in a core's cache. Groups beyond a power of two keep rows from being
# multiples of 4 KiB apart, whose addresses have the same few places in the first cache: a quarter quicker.
_PIECE, _GROUPS_BEYOND = 1 << 16, 16
# A third quicker than 256, XLA's own choice: sums are chains of additions that wait for each other.
_OPTIONS = {"xla_cpu_prefer_vector_width": 512}

# What is smaller raises doubt; `_affine` and `_linear` say why these suffice.
_SMALL, _SMALL_SUM, _SMALL_WEIGHT = 2.0**-26, 2.0**-50, 2.0**-52


def fit_affine(x: np.ndarray, weights: np.ndarray, top: int, trials: Trials, *, absolute: bool = False) -> Affine:
    """See `gguf_fits.fit_affine`."""
    program = partial(_affine, top=top, trials=trials, absolute=absolute)
    fallback = partial(gguf_fits.fit_affine, top=top, trials=trials, absolute=absolute)
    return Affine(*_by_pieces(program, fallback, x, weights))


def search_linear(x: np.ndarray, weights: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """See `gguf_fits.search_linear`."""
    scale, inverse = _by_pieces(partial(_linear, top=top), partial(gguf_fits.search_linear, top=top), x, weights)
    return scale, inverse


COMPILED = Fits(fit_affine, search_linear)


def _by_pieces(
    program: Callable[..., tuple[tuple[jax.Array, ...], jax.Array]],
    fallback: Callable[..., tuple[np.ndarray, ...]],
    x: np.ndarray,
    weights: np.ndarray,
) -> list[np.ndarray]:
    """What a program finds for [n, groups], some groups at a time; and the fallback for those that it doubts."""
    size = _PIECE // len(x) + _GROUPS_BEYOND
    pieces = []
    for start in range(0, x.shape[1], size):
        piece = _columns((x, weights), slice(start, start + size))
        n_groups = piece[0].shape[1]
        if n_groups < size // 2:  # numpy is as quick
            pieces.append(fallback(*piece))
            continue
        found, doubt = program(np.float32(0), *(_padded(array, size) for array in piece))
        found = [np.array(array)[:n_groups] for array in found]
        again = np.flatnonzero(np.asarray(doubt)[:n_groups])
        if len(again):
            for array, exact in zip(found, fallback(*_columns(piece, again)), strict=True):
                array[again] = exact
        pieces.append(found)
    return [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]


def _columns(arrays: Iterable[np.ndarray], where: slice | np.ndarray) -> list[np.ndarray]:
    """Row by row in memory, as numpy adds in another order where it is column by column."""
    return [np.ascontiguousarray(array[:, where]) for array in arrays]


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    """With groups of zeros, as every other size would be another program."""
    missing = size - x.shape[1]
    return np.pad(x, ((0, 0), (0, missing))) if missing else x


class _Groups(NamedTuple):
    """What is searched, float32: the zero of this module's docstring, values [n, groups], and both by rows."""

    zero: jax.Array
    x: jax.Array
    rows: list[jax.Array]
    weights: list[jax.Array]

    def total(self, terms: Iterable[jax.Array]) -> jax.Array:
        """One term after the other, each rounded by itself."""
        return reduce(jnp.add, map(self.rounded, terms))

    def rounded(self, product: jax.Array) -> jax.Array:
        return product + self.zero

    def affine_levels(self, inverse: jax.Array, low: jax.Array, top: int) -> list[jax.Array]:
        levels = jnp.round((self.x - low[None]) * inverse[None])
        return list(jnp.clip(levels, np.float32(0), np.float32(top)))

    def linear_levels(self, inverse: jax.Array, top: int) -> list[jax.Array]:
        return list(jnp.clip(jnp.round(self.x * inverse[None]), np.float32(-top), np.float32(top - 1)))

    def error(self, levels: list[jax.Array], scale: jax.Array, minimum: jax.Array, absolute: bool) -> jax.Array:
        differences = [self.rounded(scale * q) + minimum - v for q, v in zip(levels, self.rows, strict=True)]
        sizes = [jnp.abs(d) if absolute else d * d for d in differences]
        return self.total(w * size for w, size in zip(self.weights, sizes, strict=True))


class _Affine(NamedTuple):
    """See `Affine`."""

    scale: jax.Array
    minimum: jax.Array
    inverse: jax.Array
    origin: jax.Array


class _Tried(NamedTuple):
    """A fit and its error, infinite where it is none."""

    fit: _Affine
    error: jax.Array

    def or_better(self, other: _Tried) -> _Tried:
        better = other.error < self.error
        return jax.tree.map(lambda old, new: jnp.where(better, new, old), self, other)


# In both programs a trial is compared with the best one when the next one begins. XLA computes an error again for each
# of the things that a comparison chooses, unless the error comes from the step before.


@partial(jax.jit, static_argnames=("top", "trials", "absolute"), compiler_options=_OPTIONS)
def _affine(
    zero: jax.Array, x: jax.Array, weights: jax.Array, *, top: int, trials: Trials, absolute: bool
) -> tuple[_Affine, jax.Array]:
    """The fit, and which groups are in doubt.

    Of the others all values, weights, scales and minima are at least 2^-26, or 0. So scale * level + minimum, and what
    that differs from a value by, are multiples of 2^-49; the square of it times a weight is 0 or at least 2^-124. Sums
    of weights and levels are 0 or at least 2^-26, and those of products with values are multiples of 2^-75. So products
    of two sums are 0 or at least 2^-101, and their differences multiples of 2^-124.
    """
    g = _Groups(zero, x, list(x), list(weights))
    low, high = reduce(_lower, g.rows), reduce(jnp.maximum, g.rows)
    low = jnp.where(low > 0, np.float32(0), low)
    sum_w, sum_x = g.total(g.weights), g.total(w * v for w, v in zip(g.weights, g.rows, strict=True))

    def step(state: tuple[_Tried, _Tried, jax.Array], scaled_top: jax.Array):
        best, last, doubt = state
        best = best.or_better(last)
        low = best.fit.minimum  # ggml's, too, follows the best fit
        inverse = scaled_top / (high - low)
        levels = g.affine_levels(inverse, low, top)
        weighted = [w * q for w, q in zip(g.weights, levels, strict=True)]
        sum_l = g.total(weighted)
        sum_xl = g.total(p * v for p, v in zip(weighted, g.rows, strict=True))
        sum_l2 = g.total(p * q for p, q in zip(weighted, levels, strict=True))
        determinant = g.rounded(sum_w * sum_l2) - g.rounded(sum_l * sum_l)
        scale = (g.rounded(sum_w * sum_xl) - g.rounded(sum_x * sum_l)) / determinant
        minimum = (g.rounded(sum_l2 * sum_x) - g.rounded(sum_l * sum_xl)) / determinant
        doubt |= jnp.abs(minimum) < _SMALL
        scale = jnp.where(minimum > 0, sum_xl / sum_l2, scale)
        minimum = jnp.where(minimum > 0, np.float32(0), minimum)
        doubt |= jnp.abs(scale) < _SMALL
        error = jnp.where(determinant > 0, g.error(levels, scale, minimum, absolute), np.float32(np.inf))
        return (best, _Tried(_Affine(scale, minimum, inverse, low), error), doubt), None

    inverse = np.float32(top) / (high - low)
    first = _Affine(1 / g.rounded(inverse), low, inverse, low)  # rounded, or XLA would make one division of the two
    tried = _Tried(first, g.error(g.affine_levels(inverse, low, top), first.scale, low, absolute))
    doubt = _any_small(_SMALL, (*g.rows, *g.weights, first.scale))
    (best, last, doubt), _ = jax.lax.scan(step, (tried, tried, doubt), jnp.asarray(trials.scaled_tops(top)))
    return best.or_better(last).fit, doubt


@partial(jax.jit, static_argnames="top", compiler_options=_OPTIONS)
def _linear(
    zero: jax.Array, x: jax.Array, weights: jax.Array, *, top: int
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Scale and inverse, and which groups are in doubt.

    Of the others all values are 0 or at least 2^-26 and all weights 0 or at least 2^-52, so that products of both with
    levels are at least 2^-78. The levels of a group all have their values' signs or all the others, so nothing cancels.
    Scales are at least 2^-26 and sums 2^-50, so what is compared is at least 2^-126.
    """
    g = _Groups(zero, x, list(x), list(weights))
    weighted_x = [w * v for w, v in zip(g.weights, g.rows, strict=True)]
    largest, size = jnp.zeros_like(x[0]), jnp.zeros_like(x[0])
    for v in g.rows:
        largest, size = jnp.where(jnp.abs(v) > size, v, largest), jnp.maximum(jnp.abs(v), size)

    def tried(inverse: jax.Array) -> tuple[jax.Array, ...]:
        levels = g.linear_levels(inverse, top)
        sum_lx = g.total(p * q for p, q in zip(weighted_x, levels, strict=True))
        return inverse, sum_lx, g.total(w * q * q for w, q in zip(g.weights, levels, strict=True))

    def better_of(best: tuple[jax.Array, ...], last: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        inverse, scale, gain, doubt = best
        trial, sum_lx, sum_l2 = last
        better = (sum_l2 > 0) & (sum_lx * sum_lx > gain * sum_l2)
        new = sum_lx / sum_l2
        doubt |= (jnp.abs(new) < _SMALL) | (jnp.abs(sum_lx) < _SMALL_SUM) | (sum_l2 < _SMALL_SUM)
        pairs = ((trial, inverse), (new, scale), (new * sum_lx, gain))
        return *(jnp.where(better, new, old) for new, old in pairs), doubt

    def step(state: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]], scaled_top: jax.Array):
        return (better_of(*state), tried(scaled_top / largest)), None

    first = inverse, sum_lx, sum_l2 = tried(np.float32(-top) / largest)
    scale = jnp.where(sum_l2 != 0, sum_lx / sum_l2, np.float32(0))
    best = (inverse, scale, scale * sum_lx, _any_small(_SMALL, g.rows) | _any_small(_SMALL_WEIGHT, g.weights))
    state, _ = jax.lax.scan(step, (best, first), jnp.asarray(linear_trials(top)))
    inverse, scale, _, doubt = better_of(*state)
    return (jnp.where(size < EPSILON, np.float32(0), scale), inverse), doubt


def _any_small(limit: float, rows: Iterable[jax.Array]) -> jax.Array:
    """Where one of the rows is below the limit, but not 0: by its bits, as XLA compares the smallest as zeros."""
    bits = [jax.lax.bitcast_convert_type(jnp.abs(row), jnp.int32) for row in rows]
    return reduce(jnp.logical_or, ((row > 0) & (row < np.float32(limit).view(np.int32)) for row in bits))


def _lower(low: jax.Array, x: jax.Array) -> jax.Array:
    """Of equal ones the former, as zeros have signs."""
    return jnp.where(x < low, x, low)
