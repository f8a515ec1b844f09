"""GGUF's quantizers against ggml's: every type on every kind of input, byte for byte.

The default tier compares with stored hashes of libgguf's bytes, the slow tier with libgguf itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from converters import gguf_quants
from converters.gguf_quants import QUANTIZABLE, WEIGHTED, quantize
from gguf_quant_inputs import COLUMNS, INPUTS, TYPES, importance, matrix

WEIGHTED_VECTORS = json.loads((Path(__file__).parent / "vectors/gguf_weighted_quants.json").read_text())
VECTORS = json.loads((Path(__file__).parent / "vectors/gguf_quants.json").read_text())


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


by_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)


def test_every_type_is_among_the_cases() -> None:
    assert set(TYPES) == QUANTIZABLE
    assert {name: list(inputs) for name, inputs in VECTORS.items()} == {kind.name: list(INPUTS) for kind in TYPES}


@by_type
def test_bytes_are_ggmls(kind: GGMLQuantizationType) -> None:
    assert {name: sha256(quantize(matrix(name), kind)) for name in INPUTS} == VECTORS[kind.name]


@pytest.mark.parametrize("kind", sorted(WEIGHTED), ids=lambda kind: kind.name)
def test_weighted_bytes_are_ggmls(kind: GGMLQuantizationType) -> None:
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update(quantize(matrix(name), kind, importance()).tobytes())
    assert digest.hexdigest() == WEIGHTED_VECTORS[kind.name]


def test_types_that_do_without_importance() -> None:
    x, weights = matrix("bell")[:3], importance()
    for kind in QUANTIZABLE - WEIGHTED:
        np.testing.assert_array_equal(quantize(x, kind, weights), quantize(x, kind))


@by_type
def test_chunks_join(kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks, also where the last chunk is a single block."""
    x = matrix("heavy_tailed")[:, :256]
    whole = quantize(x, kind)
    assert whole.shape == (5, 256 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1])
    for values in (256, 512):
        monkeypatch.setattr(gguf_quants, "_CHUNK", values)
        np.testing.assert_array_equal(quantize(x, kind), whole)


@by_type
def test_a_single_block(kind: GGMLQuantizationType) -> None:
    """numpy adds a column by itself in another order than beside others."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    x = matrix("bell").reshape(-1, block)
    alone = np.concatenate([quantize(row[None], kind) for row in x[:9]])
    np.testing.assert_array_equal(alone, quantize(x, kind)[:9])
    assert alone.shape == (9, block_bytes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(dtype: type) -> None:
    x = matrix("bell").astype(dtype)
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q8_0):
        np.testing.assert_array_equal(quantize(x, kind), quantize(x.astype(np.float32), kind))


def test_leading_axes_stay() -> None:
    """Experts: [experts, rows, columns]."""
    x = matrix("bell")[:6]
    found = quantize(x.reshape(2, 3, COLUMNS), GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(found.reshape(6, -1), quantize(x, GGMLQuantizationType.Q6_K))


# float16's largest is 65504, and the types divide the largest value of a group by this to get its scale.
LARGEST_DIVISORS = {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16, "Q4_K": 15 * 63, "Q6_K": 32 * 128, "TQ2_0": 1}


@by_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(kind: GGMLQuantizationType, value: float) -> None:
    x = matrix("bell")
    x[2, 300] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        quantize(x, kind)


@pytest.mark.parametrize(("name", "divisor"), LARGEST_DIVISORS.items())
def test_scales_beyond_float16_are_refused(name: str, divisor: int) -> None:
    kind = GGMLQuantizationType[name]
    x = matrix("bell")
    x[1, 5] = 0.9 * 65504 * divisor
    quantize(x, kind)
    x[1, 5] = 1.2 * 65504 * divisor
    with pytest.raises(FloatingPointError, match="beyond float16"):
        quantize(x, kind)


@pytest.mark.slow
@by_type
def test_against_libgguf(kind: GGMLQuantizationType) -> None:
    """1.5 million values of each of five distributions, and the vectors are libgguf's; the decode error is sane."""
    libgguf = pytest.importorskip("libgguf")
    for name in INPUTS:
        x = matrix(name)
        assert sha256(libgguf.quantize_rows(x, int(kind))) == VECTORS[kind.name][name]
    rng = np.random.default_rng(int(kind))
    shape = (741, 2048)
    samples = {
        "normal": 0.02 * rng.standard_normal(shape),
        "student": 0.02 * rng.standard_t(2, shape).clip(-1e3, 1e3),
        "skewed": rng.exponential(1e-2, shape) - 2e-3,
        "bfloat16": (0.05 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16),
        "subnormal": 1e-40 * rng.standard_normal(shape),
    }
    for name, sample in samples.items():
        x = sample.astype(np.float32)
        np.testing.assert_array_equal(quantize(x, kind), libgguf.quantize_rows(x, int(kind)), err_msg=name)
        if kind in WEIGHTED:
            weights = importance(shape[1])
            theirs = libgguf.quantize_rows(x, int(kind), imatrix=weights)
            np.testing.assert_array_equal(quantize(x, kind, weights), theirs, err_msg=name)
    x = samples["normal"].astype(np.float32)
    decoded = libgguf.dequantize_rows(quantize(x, kind), int(kind), shape[1])
    error = np.sqrt(np.mean(np.square(decoded - x)) / np.mean(np.square(x)))
    bits = 8 * GGML_QUANT_SIZES[kind][1] / GGML_QUANT_SIZES[kind][0]
    print(f"{kind.name}: {bits:.4f} bits, relative rms error {error:.4f}")
    assert error < 3.0 * 2 ** -(bits - 1)
