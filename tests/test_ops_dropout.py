"""What tests/test_ops.py does not show of dropout: that its masks are random, and one generator's everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from pallas_kernels import LoraWeights, dropout, dropout_low_rank, lora_qkv

SEED = dropout.seed(jax.random.key(3))


def test_threefry_is_jaxs_own_with_its_number_of_rounds() -> None:
    counters = jax.random.bits(jax.random.key(1), (50,), jnp.uint32)
    expected = threefry_2x32(SEED, counters)
    words = (counters[:25].astype(jnp.int32), counters[25:].astype(jnp.int32))
    got = dropout.threefry_2x32(tuple(SEED.astype(jnp.int32)), words, rounds=20)
    np.testing.assert_array_equal(jnp.concatenate(got).astype(jnp.uint32), expected)


def test_a_mask_is_as_if_drawn() -> None:
    rows, columns, rate = 512, 4096, 0.05
    mask = np.asarray(dropout.keep_mask(SEED, (rows, columns), rate))
    std = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - (1 - rate)) < 4 * std / mask.size**0.5
    assert mask.mean(axis=0).std() == pytest.approx(std / rows**0.5, rel=0.05)
    assert mask.mean(axis=1).std() == pytest.approx(std / columns**0.5, rel=0.1)
    quarters = mask.reshape(rows, 4, -1).swapaxes(0, 1).reshape(4, -1)
    other = np.asarray(dropout.keep_mask(dropout.seed(jax.random.key(4)), (rows, columns), rate))
    rolled = [np.roll(mask, 1, axis).ravel() for axis in (0, 1)]
    for pair in ((quarters[0], quarters[1]), (quarters[0], quarters[3]), (mask.ravel(), other.ravel())):
        assert abs(np.corrcoef(*pair)[0, 1]) < 4 / len(pair[0]) ** 0.5
    assert all(abs(np.corrcoef(mask.ravel(), one)[0, 1]) < 4 / mask.size**0.5 for one in rolled)


def test_a_mask_does_not_depend_on_how_many_rows_there_are() -> None:
    longer = dropout.keep_mask(SEED, (9, 22), 0.5)
    np.testing.assert_array_equal(dropout.keep_mask(SEED, (4, 22), 0.5), longer[:4])


def test_a_rate_of_zero_drops_nothing() -> None:
    x, A = jnp.ones((3, 10)), jnp.ones((1, 2, 10))
    np.testing.assert_array_equal(dropout_low_rank(x, A, SEED[None], rate=0.0), jnp.full((1, 3, 2), 10.0))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_drop(shape: tuple[int, int], implementation: str) -> None:
    x, A = jnp.ones(shape), jnp.ones((1, 2, shape[1]))
    run = lambda x, A: dropout_low_rank(x, A, SEED[None], rate=0.5, implementation=implementation)  # noqa: E731
    out, pull_back = jax.vjp(run, x, A)
    d_x, d_A = pull_back(out)
    for got, expected in ((out, (1, shape[0], 2)), (d_x, x.shape), (d_A, A.shape)):
        np.testing.assert_array_equal(got, jnp.zeros(expected))


def test_what_does_not_fit_is_refused() -> None:
    x, A = jnp.ones((3, 10)), jnp.ones((2, 1, 10))
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), not 1.0"):
        dropout_low_rank(x, A, jnp.zeros((2, 2), jnp.uint32), rate=1.0)
    with pytest.raises(ValueError, match=r"seeds \(1, 2\) are not"):
        dropout_low_rank(x, A, SEED[None], rate=0.5)
    linear = LoraWeights(jnp.ones((4, 10)), None, jnp.ones((1, 10)), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="each of q, k, v with an adapter has a dropout_key, or none"):
        lora_qkv(x, linear._replace(dropout_key=jax.random.key(0)), linear, linear, dropout=0.5)
