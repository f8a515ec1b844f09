"""float32 matrices on which GGUF quantizers are compared: every kind of block that has a branch of its own.

Made by exact arithmetic on a frozen stream of uniform numbers, so that stored hashes hold on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType

COLUMNS = 512

TYPES = [
    GGMLQuantizationType[name]
    for name in (
        *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"),
    )
]


def _uniform(rows: int, seed: int) -> np.ndarray:
    """In (-1, 1)."""
    return 2 * np.random.RandomState(seed).random_sample((rows, COLUMNS)) - 1


def _bell(rows: int, seed: int) -> np.ndarray:
    """Near a standard normal: the sum of three uniforms has variance 1."""
    return _uniform(rows, seed) + _uniform(rows, seed + 1000) + _uniform(rows, seed + 2000)


def _heavy_tailed(rows: int, seed: int) -> np.ndarray:
    return 0.01 * _uniform(rows, seed) / (abs(_uniform(rows, seed + 1000)) + 1e-3)


def _one_outlier(rows: int, seed: int) -> np.ndarray:
    """One large value in each row, so that most groups of its block round to scale 0."""
    x = 1e-4 * _bell(rows, seed)
    x[np.arange(rows), np.arange(rows) * 37 % COLUMNS] = 3
    return x


def _sparse(rows: int, seed: int) -> np.ndarray:
    """Whole groups of zeros beside ordinary ones, and zeros within them."""
    x = _bell(rows, seed) * (_uniform(rows, seed + 3000) > 0.5)
    return x * np.repeat(_uniform(rows, seed + 4000)[:, : COLUMNS // 32] > 0, 32, axis=1)


def _growing(rows: int, seed: int) -> np.ndarray:
    """Groups of 16 whose sizes span eight powers of ten, as scales of one block."""
    return _bell(rows, seed) * np.repeat(10.0 ** -(np.arange(COLUMNS // 16) % 9), 16)


INPUTS: dict[str, Callable[[], np.ndarray]] = {
    "bell": lambda: 0.02 * _bell(7, 1),
    "uniform": lambda: _uniform(3, 2),
    "positive": lambda: abs(_bell(3, 3)) + 0.5,
    "negative": lambda: -abs(_bell(3, 4)) - 0.5,
    "shifted": lambda: 10 + 0.01 * _bell(3, 5),
    "heavy_tailed": lambda: _heavy_tailed(5, 6),
    "one_outlier": lambda: _one_outlier(3, 7),
    "sparse": lambda: _sparse(5, 8),
    "growing": lambda: _growing(3, 9),
    "two_values": lambda: np.where(_uniform(3, 10) > 0, 0.25, -0.25),
    "few_levels": lambda: np.round(8 * _uniform(3, 11)) / 16,
    "half_levels": lambda: np.round(63 * _uniform(3, 12)) / 2,
    "zero": lambda: np.zeros((1, COLUMNS)),
    "negative_zero": lambda: np.full((1, COLUMNS), -0.0),
    "constant": lambda: np.full((3, COLUMNS), 0.5),
    "negative_constant": lambda: np.full((1, COLUMNS), -0.3),
    "huge": lambda: 2e4 * _uniform(3, 13),
    "small": lambda: 1e-7 * _bell(3, 14),
    "tiny": lambda: 1e-13 * _bell(3, 15),
    "below_epsilon": lambda: 1e-20 * _bell(3, 16),
    "vanishing": lambda: 1e-30 * _bell(3, 17),
}


def matrix(name: str) -> np.ndarray:
    """The input of that name, float32 [rows, COLUMNS]."""
    return INPUTS[name]().astype(np.float32)


def importance(columns: int = COLUMNS) -> np.ndarray:
    """Mean squares of each column's inputs, float32 [columns]: heavy-tailed, and every ninth is zero."""
    values = np.exp(2 * np.random.default_rng(9).standard_normal(columns)).astype(np.float32)
    values[::9] = 0
    return values
