"""The benchmark runs what an implementation can run, and leaves out what it refuses."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import OPS
from pallas_kernels.bench import measure


def test_a_case_is_timed():
    op = OPS["rms_norm"]
    row = measure(op, op.cases[0], "xla", jnp.float32)
    assert row is not None
    assert row.milliseconds > 0
    assert row.gigabytes_per_second > 0


def test_a_refused_case_is_left_out():
    op = OPS["nf4_dequantize"]
    refused = [case for case in op.cases if case.name == "partial blocks"]
    assert [measure(op, case, "pallas", jnp.float32) for case in refused] == [None]
