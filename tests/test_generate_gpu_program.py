"""The programs that a GPU runs to generate, lowered here: which kernels read the NF4 base."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft.generation import slots as device
from jaxft.generation.sampling import Sampling
from lowering import h100, kernel_names
from models import decoder_of, with_adapter


def lowered_decode(slots: int, dtype: str = "float32") -> str:
    decoder = with_adapter(decoder_of(quantization="nf4", remat="offload"))
    decoder.model.embed_tokens.dtype = dtype  # activations follow it
    sampling = Sampling(1.0)
    state, results = device.Slots.idle(decoder, slots, 64, sampling), device.Results.empty(slots, 64)
    rest = np.zeros(1, np.int32), np.ones(slots, bool), np.int32(1), np.int32(1)
    traced = device.decode.trace(*nnx.split(decoder), state, results, *rest, sampling=sampling)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("slots", "dtype", "kernel", "launches"),
    [
        pytest.param(1, "float32", "matvec_kernel", 4, marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", "matvec_kernel", 4, marks=pytest.mark.slow),
        pytest.param(3, "bfloat16", "tensor_core_kernel", 4, marks=pytest.mark.slow),
        (64, "bfloat16", "tensor_core_kernel", 4),
    ],
)
def test_decoding_multiplies_by_packed_weights(slots: int, dtype: str, kernel: str, launches: int) -> None:
    with h100():
        counts = kernel_names(lowered_decode(slots, dtype))
    assert counts[kernel] == launches, "of a layer's seven linears, q, k and v share one, and gate and up"
    assert "nf4_dequantize" not in counts
    assert counts["cached_attention"] == 1
    assert counts["prepare_kernel"] == launches, "one before each, of low-rank products and the order of x"


def test_many_rows_decode_first() -> None:
    """Negative control: from 129 on a plain matmul over a decoded weight is faster."""
    with h100():
        counts = kernel_names(lowered_decode(129, "bfloat16"))
    assert counts["nf4_dequantize"] == 7


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the default there is what the tests above show")
def test_a_program_whose_ops_chose_for_a_cpu_has_none() -> None:
    assert not kernel_names(lowered_decode(1))
