"""Device times from the profiler: how long the kernels of one call are busy, without launches and host clocks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

Interval = tuple[float, float]


def device_milliseconds(
    run: Callable[..., Any],
    argument_sets: Sequence[tuple[Any, ...]],
    *,
    repeats: int = 20,
    donated: tuple[int, ...] = (),
) -> float:
    """The median time for which one call of `run` keeps the device busy, in milliseconds.

    Args:
      run: a jitted function.
      argument_sets: taken in turn. Together larger than the device's cache, they are never found in it.
      repeats: timed calls; as many as there are sets come before them to warm up.
      donated: arguments whose memory `run` reuses for its outputs, in their order; the outputs take their place.

    Returns:
      Of each call the length of the union of its kernels' intervals, then the median. On a CPU, which has no kernels
      to be profiled: the wall time of a synchronized call.
    """
    sets = [list(arguments) for arguments in argument_sets]
    call = _caller(run, sets, donated)
    for i in range(len(sets)):
        jax.block_until_ready(call(i))
    if jax.default_backend() == "cpu":
        return statistics.median(_wall_milliseconds(call, i) for i in range(repeats))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(repeats):
                result = call(i)
            jax.block_until_ready(result)
        intervals = sorted((start, end) for _, start, end in device_events(Path(folder)))
    if not intervals or len(intervals) % repeats:
        raise RuntimeError(f"profile: {len(intervals)} kernels do not divide by {repeats} calls; profile them alone")
    each = len(intervals) // repeats
    return statistics.median(busy(intervals[i : i + each]) for i in range(0, len(intervals), each)) / 1e6


def _caller(run: Callable[..., Any], sets: list[list[Any]], donated: tuple[int, ...]) -> Callable[[int], Any]:
    def call(i: int) -> Any:
        arguments = sets[i % len(sets)]
        result = run(*arguments)
        for position, output in zip(donated, jax.tree.leaves(result), strict=False):
            arguments[position] = output
        return result

    return call


def _wall_milliseconds(call: Callable[[int], Any], i: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(i))
    return (time.perf_counter() - start) * 1e3


def device_events(folder: Path) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) in nanoseconds of all that ran on the first GPU, of a `jax.profiler.trace` in `folder`."""
    (file,) = folder.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if plane.name == "/device:GPU:0":
            for line in plane.lines:
                if (line.name or "").startswith("Stream"):
                    yield from (
                        (event.name, event.start_ns, event.start_ns + event.duration_ns) for event in line.events
                    )


def busy(intervals: Sequence[Interval]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    total, end = 0.0, float("-inf")
    for start, stop in intervals:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
