"""Programs for an H100, made on a machine that has none: which kernels are in them."""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Inside, ops choose and programs are lowered for an H100."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def lowered_text(function: Callable[..., Any], *arguments: Any) -> str:
    """StableHLO of `function` for an H100; arguments may be ShapeDtypeStructs."""
    with h100():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernel_names(text: str) -> collections.Counter[str]:
    """How often each Triton kernel is called in a lowered program, a loop's body counted once."""
    calls = [line for line in text.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line]
    names = [re.search(r'name = "(\w+)"', line) for line in calls]
    return collections.Counter(name.group(1) for name in names if name)
