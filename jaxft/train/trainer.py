"""The training loop: owns the arrays while it runs, shows progress, logs, and gives the arrays back however it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxft import console
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.train.metrics import MetricsLog, plot_loss
from jaxft.train.step import LossFunction, make_train_step

Callback = Callable[["TrainState"], None]


@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a callback sees after a step.

    Attributes:
      step: steps done so far.
      metrics: the row that was logged for this step; None between logged steps.
      decoder: the model with the current arrays, which are valid until the callback returns.
    """

    step: int
    metrics: dict[str, Any] | None
    decoder: Decoder


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
      steps: how many were done.
      rows: the logged metrics, as in metrics.jsonl.
      interrupted: True when Ctrl-C ended the run early.
    """

    steps: int
    rows: list[dict[str, Any]]
    interrupted: bool


def run(
    decoder: Decoder,
    loss: LossFunction,
    tx: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    total_steps: int,
    schedule: optax.Schedule,
    output_dir: Path,
    logging_steps: int = 1,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Trains `decoder` in place over `batches`, at most `total_steps` of them.

    Args:
      decoder: what is trainable in it was chosen by `lora.attach` or `labels.set_trainable`.
      loss: see `jaxft.train.step`.
      tx: the optimizer.
      batches: pytrees whose leaves have a leading [A] of micro-batches; equal shapes, so that nothing recompiles.
      schedule: learning rate by step, for the log (the optimizer has its own copy).
      output_dir: gets metrics.jsonl and loss.png.
      logging_steps: log every so many steps, the first and the last always.
      callbacks: called after every step.

    Raises:
      JaxftError: nothing is trainable, or there is no batch.
    """
    graphdef, trainable, frozen = labels.split(decoder)
    if not jax.tree.leaves(trainable):
        raise JaxftError("train", "nothing in the model is trainable", "Call get_peft_model first")
    # The arrays are donated step by step: work on copies until the first step has made new ones.
    trainable = jax.tree.map(lambda leaf: leaf.copy(), trainable)
    kinds = set(jax.tree.leaves(labels.labels(trainable)))
    tx = optax.partition(dict.fromkeys(kinds, tx), labels.labels)
    opt_state = tx.init(trainable)
    step_function = make_train_step(graphdef, loss, tx, remat=decoder.remat)
    log = MetricsLog(output_dir / "metrics.jsonl")
    rows: list[dict[str, Any]] = []
    step, clock = 0, _Clock()
    try:
        with _deferred_interrupt() as interrupted, console.progress("training", total_steps) as advance:
            for batch in batches:
                if step == total_steps or interrupted():
                    break
                trainable, opt_state, metrics = step_function(trainable, frozen, opt_state, batch)
                row = None
                if step % logging_steps == 0 or step + 1 == total_steps:
                    row = clock.row(step + 1, metrics, float(np.asarray(schedule(step))))
                    rows.append(row)
                    log.write(row)
                step += 1
                advance(note=_note(rows[-1]))
                state = TrainState(step, row, nnx.merge(graphdef, trainable, frozen))
                for callback in callbacks:
                    callback(state)
    finally:
        nnx.update(decoder, trainable)
        log.close()
    if not rows:
        if interrupted():
            return TrainResult(0, rows, interrupted=True)
        raise JaxftError("train_dataset", "gave no batch")
    plot_loss(rows, output_dir / "loss.png")
    console.wrote(log.path)
    console.wrote(output_dir / "loss.png")
    return TrainResult(step, rows, interrupted())


class _Clock:
    """Turns device metrics into a log row with rates; the first row's time includes compilation."""

    def __init__(self) -> None:
        self._time = time.perf_counter()
        self._step = 0

    def row(self, step: int, metrics: dict[str, jax.Array], learning_rate: float) -> dict[str, Any]:
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        now = time.perf_counter()
        step_time = (now - self._time) / (step - self._step)
        self._time, self._step = now, step
        return {
            "step": step,
            **values,
            "learning_rate": learning_rate,
            "step_time_s": step_time,
            "tokens/s": values.get("tokens", 0.0) / step_time,
        }


def _note(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.4f}  {row['tokens/s']:,.0f} tokens/s"


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, because an interrupt inside a step would lose donated arrays."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(signum: int, frame: Any) -> None:
        flag.set()
        signal.signal(signal.SIGINT, previous)  # a second Ctrl-C acts at once
        console.console.print("stopping after this step (Ctrl-C again to stop at once)")

    signal.signal(signal.SIGINT, handler)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
