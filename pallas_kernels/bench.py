"""`python -m pallas_kernels.bench`: every op x case x implementation on this machine's device.

Times are wall times around a synchronized call, the median of `REPEATS` after a warm-up: good for comparing
implementations of one op that run for longer than a launch takes, not for stating a kernel's own time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.op import OPS, Case, Op

REPEATS = 20


class Row(NamedTuple):
    """One measurement: milliseconds a call, and the bytes of arguments and results over that time."""

    op: str
    case: str
    implementation: str
    milliseconds: float
    gigabytes_per_second: float


def rows(dtype: Any = jnp.float32) -> Iterator[Row]:
    """Measures everything that runs on this platform; what an implementation refuses is left out."""
    for op in OPS.values():
        for case in op.cases:
            for name in op.implementations:
                row = measure(op, case, name, dtype)
                if row is not None:
                    yield row


def measure(op: Op, case: Case, implementation: str, dtype: Any) -> Row | None:
    """Times the forward pass of one implementation, or gives None where it refuses the case."""
    arguments = case.make(np.random.default_rng(0), dtype)
    if op.implementations[implementation].refuses(jax.default_backend(), **arguments):
        return None
    arrays = {name: value for name, value in arguments.items() if isinstance(value, (jax.Array, np.ndarray))}
    static = {name: value for name, value in arguments.items() if name not in arrays}
    run = jax.jit(functools.partial(op, implementation=implementation, **static))
    seconds = [_seconds(run, arrays) for _ in range(REPEATS + 1)][1:]
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((arrays, run(**arrays))))
    median = statistics.median(seconds)
    return Row(op.name, case.name, implementation, median * 1e3, moved / median / 1e9)


def _seconds(run: Any, arrays: dict[str, Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(**arrays))
    return time.perf_counter() - start


def main() -> None:
    """Prints a row as soon as it is measured."""
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, median of {REPEATS} calls after a warm-up, float32")
    print(f"{'op':22}{'case':34}{'implementation':16}{'ms':>9}{'GB/s':>9}")
    for row in rows():
        print(
            f"{row.op:22}{row.case:34.33}{row.implementation:16}{row.milliseconds:9.3f}{row.gigabytes_per_second:9.2f}"
        )


if __name__ == "__main__":
    main()
