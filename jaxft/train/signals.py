"""Ctrl-C and SIGTERM as flags that the loop reads between steps: inside a step they would lose donated arrays."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jaxft import console


class Signals:
    """What has arrived.

    Attributes:
      interrupted: Ctrl-C: the run ends after this step.
      terminated: SIGTERM: the run saves a checkpoint and the process ends with status 0.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.terminated = False


@contextlib.contextmanager
def deferred() -> Iterator[Signals]:
    """Notes the first Ctrl-C and SIGTERM; a second one acts at once. Outside the main thread nothing can be noted."""
    found = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: Any) -> None:
        signal.signal(number, previous[signal.Signals(number)])
        if number == signal.SIGINT:
            found.interrupted = True
            console.console.print("stopping after this step (Ctrl-C again to stop at once)")
        else:
            found.terminated = True
            console.console.print("terminated: saving a checkpoint after this step")

    for number in previous:
        signal.signal(number, handler)
    try:
        yield found
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
