"""Processes that quantize beside each other: threads would wait for Python's lock, so short are numpy's loops here.

Each runs this module and has a thread here that sends it rows and takes back bytes. Where it has much to do, it imports
jax and compiles the longest searches (`converters.gguf_compiled`). They are ordinary programs instead of
`multiprocessing`'s, which would run the caller's script a second time. A process ends when its socket is closed, so
also when this one dies in whatever way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np
from gguf import GGMLQuantizationType

from converters.gguf_fits import NUMPY, Fits
from converters.gguf_quants import quantize
from jaxft.errors import JaxftError

# Neither numpy's own threads are wanted nor XLA's; and glibc keeps freed arrays, which otherwise costs a fifth of the
# time.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 29),
    "JAX_PLATFORMS": "cpu",
    "NPROC": "1",
}
T = TypeVar("T")
Result = TypeVar("Result")

# So many values take a second or so, several times as long as a process takes to start.
_MIN_VALUES = 1 << 23
_MOST = 32  # each takes about 50 MB
# So many take numpy four seconds, and jax and its compiler two. Each that compiles takes 300 MB, so there are few.
_MIN_COMPILED_VALUES = 1 << 25
_MOST_COMPILED = 8


def n_workers(n_values: int) -> int:
    """How many processes quantize that many values soonest; 1 where starting others does not pay."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(n_cores, _MOST, n_values // _MIN_VALUES))


def worth_compiling(n_values: int, n: int) -> bool:
    """Whether `n` processes are done sooner if they compile their searches, and memory allows it."""
    return n <= _MOST_COMPILED and n_values // n >= _MIN_COMPILED_VALUES


class Workers:
    """While it is entered, `n` processes wait for rows; `compiled`: they compile their searches."""

    def __init__(self, n: int, *, compiled: bool = False) -> None:
        self._n = n
        self._compiled = compiled

    def __enter__(self) -> Workers:
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes: list[_Process] = []
        self._threads = ThreadPoolExecutor(self._n)
        for _ in range(self._n):
            self._processes.append(_Process(self._compiled))
            self._idle.put(self._processes[-1])
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def map(self, function: Callable[[T], Result], items: Iterable[T]) -> Iterator[Result]:
        """function(item) of each in order, in a thread for each process; only a few items are taken in advance."""
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self._threads.submit(function, item))
            if len(pending) > 2 * self._n:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def quantize(
        self, matrix: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """`gguf_quants.quantize` in a process that is idle.

        Raises:
          JaxftError: the process was ended from outside.
        """
        process = self._idle.get()
        try:
            return process.quantize(matrix, kind, importance)
        finally:
            self._idle.put(process)


class _Process:
    """One of them, seen from here."""

    def __init__(self, compiled: bool) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "converters.gguf_workers", str(theirs.fileno()), str(int(compiled))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                start_new_session=True,  # Ctrl-C is for this process, which ends them
            )

    def quantize(self, matrix: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None) -> np.ndarray:
        try:
            self._connection.send((matrix.shape, matrix.dtype, int(kind), importance))
            self._connection.send_bytes(np.ascontiguousarray(matrix).reshape(-1).view(np.uint8).data)
            failure = self._connection.recv()
            if failure is None:
                return np.frombuffer(self._connection.recv_bytes(), np.uint8).reshape(*matrix.shape[:-1], -1)
        except (EOFError, OSError) as error:  # OSError: in the middle of a message
            status = self._process.wait()
            raise JaxftError(
                "quantizing", f"a process for it ended with status {status}", "Is there enough memory?"
            ) from error
        raise failure

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


def _serve(connection: Connection, fits: Fits) -> None:
    """Quantizes what comes until the other end is closed."""
    with contextlib.suppress(EOFError, OSError):  # OSError: in the middle of a message
        while True:
            shape, dtype, kind, importance = connection.recv()
            matrix = np.frombuffer(connection.recv_bytes(), dtype).reshape(shape)
            try:
                quantized = quantize(matrix, GGMLQuantizationType(kind), importance, fits=fits)
            except Exception as error:  # for whoever asked
                connection.send(error)
            else:
                connection.send(None)
                connection.send_bytes(quantized.reshape(-1).data)


def _compiled_fits() -> Fits:
    from converters.gguf_compiled import COMPILED  # here, as it imports jax

    return COMPILED


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), _compiled_fits() if int(sys.argv[2]) else NUMPY)
