"""The training loop: owns the arrays while it runs, shows progress, logs, and gives the arrays back however it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
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
from jaxft.compilation_cache import enable_compilation_cache
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.models.remat import AUTO
from jaxft.plan import GIB, plan
from jaxft.train import auto_remat
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


def _fitting_step(
    decoder: Decoder, loss: LossFunction, tx: optax.GradientTransformation, arguments: Any, budget_gib: float | None
) -> Any:
    """The compiled step of the fastest policy that fits, which becomes the decoder's."""

    def compile_step(policy: str) -> Any:
        decoder.remat = policy
        step: Any = make_train_step(labels.split(decoder)[0], loss, tx, remat=policy)
        return step.lower(*arguments).compile()

    budget = auto_remat.device_budget() if budget_gib is None else int(budget_gib * GIB)
    if budget is None:
        return compile_step("none")
    rows, length = _shape(arguments[-1])
    decision = auto_remat.choose(decoder, tx, compile_step, rows=rows, length=length, budget=budget)
    console.console.print(decision.table)
    return decision.step


def _shape(batch: Any) -> tuple[int, int]:
    """(rows, tokens a row) of a micro-batch: its first leaf is the tokens, [A, B, T]."""
    _, rows, length = jax.tree.leaves(batch)[0].shape
    return rows, length


@contextlib.contextmanager
def _explained_memory(decoder: Decoder, tx: optax.GradientTransformation, batch: Any) -> Iterator[None]:
    """Says of a step that the device's memory was too little for what takes most of it, and what to change.

    Raises:
      JaxftError: in place of the device's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rows, length = _shape(batch)
        found = plan(decoder, tx, rows=rows, length=length)
        part, size = max(found.per_step().items(), key=lambda item: item[1])
        raise JaxftError(
            f"a step of {rows} x {length} tokens",
            f"ran out of device memory: of the planned {found.peak / GIB:.1f} GiB the largest part that grows with "
            f"the step is {part.replace('_', ' ')}, {size / GIB:.1f} GiB (remat {decoder.remat!r})",
            _REMEDIES[part],
        ) from error


_REMEDIES = {
    "kept": 'use_gradient_checkpointing="auto" or "offload" keeps less on the device',
    "working_set": "Lower per_device_train_batch_size or max_seq_length, or take tiles: offload,tile=2048",
    "loss": "Lower per_device_train_batch_size or max_seq_length",
    "gradients": "Lower r, or train fewer modules",
    "optimizer": 'optim="adamw_8bit" takes a quarter',
}


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
    memory_budget_gib: float | None = None,
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
      memory_budget_gib: where the decoder's policy is "auto": what the device may give; None is what it has.

    Raises:
      JaxftError: nothing is trainable, there is no batch, or the device's memory is too little.
    """
    enable_compilation_cache()
    graphdef, trainable, frozen = labels.split(decoder)
    if not jax.tree.leaves(trainable):
        raise JaxftError("train", "nothing in the model is trainable", "Call get_peft_model first")
    # The arrays are donated step by step: work on copies until the first step has made new ones.
    trainable = jax.tree.map(lambda leaf: leaf.copy(), trainable)
    kinds = set(jax.tree.leaves(labels.labels(trainable)))
    tx = optax.partition(dict.fromkeys(kinds, tx), labels.labels)
    opt_state = tx.init(trainable)
    batches = iter(batches)
    if decoder.remat == AUTO and (first := next(batches, None)) is not None:
        step_function = _fitting_step(decoder, loss, tx, (trainable, frozen, opt_state, first), memory_budget_gib)
        batches = itertools.chain([first], batches)
    else:
        step_function = make_train_step(graphdef, loss, tx, remat=decoder.remat)
    log = MetricsLog(output_dir / "metrics.jsonl")
    rows: list[dict[str, Any]] = []
    step, clock = 0, _Clock()
    try:
        with _deferred_interrupt() as interrupted, console.progress("training", total_steps) as advance:
            for batch in batches:
                if step == total_steps or interrupted():
                    break
                with _explained_memory(decoder, tx, batch):
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
