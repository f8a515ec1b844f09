"""The compiled searches against numpy's, bit for bit: on every kind of input, and on numbers that XLA takes for zeros.

The slow tier compares with libgguf itself, on a hundred times as many values.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters import gguf_compiled, gguf_encode
from converters.gguf_compiled import COMPILED
from converters.gguf_encode import Matrix, write_data
from converters.gguf_fits import NUMPY, Fits, Trials
from converters.gguf_quants import WEIGHTED, quantize
from converters.gguf_workers import worth_compiling
from gguf_quant_inputs import COLUMNS, INPUTS, importance, matrix

TRIALS = Trials(-1.0, 0.1, 20)
Q4_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
K_QUANTS = [GGMLQuantizationType[name] for name in ("Q2_K", "Q4_K", "Q5_K", "Q6_K")]
SEARCHED = sorted(WEIGHTED - {GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.IQ4_XS})


def name_of(kind: GGMLQuantizationType) -> str:
    return kind.name


def every_input() -> np.ndarray:
    """All of them, and enough for a program and a half."""
    rows = np.concatenate([matrix(name) for name in INPUTS])
    return np.resize(rows, (gguf_compiled._PIECE // COLUMNS * 3 // 2, COLUMNS))


def random_groups(n: int, seed: int = 0) -> np.ndarray:
    """Of a program's size, such as weights are: no group is in doubt."""
    return (np.random.default_rng(seed).standard_normal((n, gguf_compiled._PIECE // n)) / 50).astype(np.float32)


def searches(fits: Fits) -> list[Callable[[np.ndarray], tuple[np.ndarray, ...]]]:
    """As Q4_K and Q6_K make them, but for the weights."""
    return [lambda x: fits.affine(x, np.abs(x), 15, TRIALS), lambda x: fits.linear(x, x * x, 32)]


@pytest.mark.parametrize("kind", K_QUANTS, ids=name_of)
def test_bytes_are_numpys(kind: GGMLQuantizationType) -> None:
    x = every_input()
    np.testing.assert_array_equal(quantize(x, kind, fits=COMPILED), quantize(x, kind))


@pytest.mark.parametrize("kind", SEARCHED, ids=name_of)
def test_weighted_bytes_are_numpys(kind: GGMLQuantizationType) -> None:
    x, weights = every_input(), importance()
    np.testing.assert_array_equal(quantize(x, kind, weights, fits=COMPILED), quantize(x, kind, weights))


def test_programs_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above do not pass because numpy did all of it."""
    x = random_groups(16)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("numpy was asked")

    expected = [search(x) for search in searches(NUMPY)]
    monkeypatch.setattr(gguf_compiled.gguf_fits, "search_linear", refuse)
    monkeypatch.setattr(gguf_compiled.gguf_fits, "fit_affine", refuse)
    for search, found in zip(searches(COMPILED), expected, strict=True):
        np.testing.assert_array_equal(search(x), found)
    x[3, 5] = 1e-30
    for search in searches(COMPILED):
        with pytest.raises(AssertionError, match="numpy was asked"):
            search(x)


@pytest.mark.parametrize("value", [1e-12, 1e-20, 1e-40, -1e-45])
def test_where_xla_would_round_to_zero(value: float) -> None:
    """Small values among ordinary ones, and groups of nothing else."""
    x = random_groups(32)
    x[7, ::3], x[:, 5::50] = value, value * np.arange(32)[:, None]
    with np.errstate(all="ignore"):
        for weights in (np.abs(x), np.where(np.abs(x) > 0.01, np.float32(value) ** 2, np.float32(1))):
            affine = [fits.affine(x, weights, 15, TRIALS) for fits in (COMPILED, NUMPY)]
            np.testing.assert_array_equal(*affine)
            np.testing.assert_array_equal(*(fits.linear(x, weights, 32) for fits in (COMPILED, NUMPY)))


def test_doubt_is_needed() -> None:
    """Without it such groups would come out wrong: the control of the test above."""
    x = random_groups(16) * np.float32(1e-13)
    (scale, _), doubt = gguf_compiled._linear(np.float32(0), x, x * x, top=32)
    assert np.asarray(doubt).all()
    assert (np.asarray(scale) != NUMPY.linear(x, x * x, 32)[0]).any()


def test_a_process_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is one core."""
    monkeypatch.setattr(gguf_encode, "n_workers", lambda _: 1)
    monkeypatch.setattr(gguf_encode, "worth_compiling", lambda *_: True)
    x, file = random_groups(16).reshape(-1, COLUMNS), io.BytesIO()
    write_data([(file, Matrix(x, kind, None, "x")) for kind in (Q4_K, Q6_K)], 0)
    assert file.getvalue() == b"".join(quantize(x, kind).tobytes() for kind in (Q4_K, Q6_K))


def test_when_processes_compile() -> None:
    """Not for small models, and not many: each takes 300 MB."""
    assert [worth_compiling(n, 2) for n in (0, 50_000_000, 135_000_000, 8_000_000_000)] == [False, False, True, True]
    assert [worth_compiling(8_000_000_000, n) for n in (1, 8, 16)] == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("kind", K_QUANTS, ids=name_of)
@pytest.mark.parametrize("scale", ["even", "of_each_group", "of_each_value"])
def test_millions_of_values_have_ggmls_bytes(kind: GGMLQuantizationType, scale: str) -> None:
    libgguf = pytest.importorskip("libgguf")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1 << 10, 4096)) / 50).astype(np.float32)
    if scale != "even":
        shape = (1 << 10, 4096 // 32, 1 if scale == "of_each_group" else 32)
        x = (x.reshape(1 << 10, -1, 32) * 10.0 ** rng.uniform(-8, 2, shape)).astype(np.float32).reshape(x.shape)
    for weights in (None, importance(4096)):
        expected = libgguf.quantize_rows(x, int(kind), imatrix=weights)
        np.testing.assert_array_equal(quantize(x, kind, weights, fits=COMPILED), expected)
