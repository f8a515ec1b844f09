"""The only file that touches Pallas' Triton names, so that another backend is a second file and not a rewrite."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Deprecated upstream since jax 0.11; ours because it runs from Ampere up and needs no CUDA toolkit.
warnings.filterwarnings("ignore", message=".*Pallas.*Triton.*deprecated", category=DeprecationWarning)

load = triton.load
store = triton.store
program_id = pl.program_id
ds = pl.ds


def call(
    kernel: Callable[..., None], *arguments: jax.Array, out: jax.ShapeDtypeStruct, grid: tuple[int, ...], num_warps: int
) -> jax.Array:
    """Runs a kernel over a grid: compiled by Triton on a GPU, interpreted on a CPU (for tests).

    The platform is the one that the program is lowered for, so a program for a GPU can be lowered where there is none.
    """
    # Always with parameters: they, and not the platform, are what selects Triton in every jax version.
    parameters: Any = triton.CompilerParams(num_warps=num_warps)
    run = functools.partial(pl.pallas_call, kernel, out_shape=out, grid=grid)
    return jax.lax.platform_dependent(*arguments, cpu=run(interpret=True), default=run(compiler_params=parameters))
