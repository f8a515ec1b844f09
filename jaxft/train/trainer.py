"""The training loop: owns the arrays while it runs, logs, evaluates, saves, and gives the arrays back however it ends.

A step is dispatched and runs on the device while the host logs the step before it and lays out the next batch; the host
waits for a step only where somebody is to see its outcome: an evaluation, a checkpoint, a callback.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxft import console
from jaxft.compilation_cache import enable_compilation_cache
from jaxft.errors import JaxftError
from jaxft.files import new_file
from jaxft.models import labels
from jaxft.models.decoded import frozen_for
from jaxft.models.decoder import Decoder
from jaxft.models.remat import AUTO
from jaxft.train import reporting, signals
from jaxft.train.arguments import TrainingArguments
from jaxft.train.checkpoint import Checkpoints, Progress, fingerprint
from jaxft.train.memory import explained_memory, fitting_step
from jaxft.train.metrics import Meter, MetricsLog, plot_loss, read_rows, strict
from jaxft.train.noise import keyed
from jaxft.train.step import LossFunction, make_train_step

Callback = Callable[["TrainState"], Any]
Evaluate = Callable[[Decoder], dict[str, float]]

MAX_SKIPPED = 10  # steps in a row: then it is not the batches that are at fault


@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a callback sees after a step; where it returns True, the run ends.

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
      steps: how many were done, those before a resume included.
      rows: the logged metrics, as in metrics.jsonl.
      interrupted: True when Ctrl-C ended the run early.
      metrics: train_runtime (seconds), train_steps_per_second and train_loss (the mean of those logged), as
        transformers calls them.
    """

    steps: int
    rows: list[dict[str, Any]]
    interrupted: bool
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a trainer gives to the loop.

    Attributes:
      decoder: what is trainable in it was chosen by `lora.attach` or `labels.set_trainable`.
      loss: see `jaxft.train.step`.
      batches: pytrees whose leaves have a leading [A] of micro-batches; equal shapes, so that nothing recompiles. Their
        iterator has `get_state` and `set_state` (see `jaxft.data.iteration`); another one is gone through to resume.
      total_steps: the run ends after so many.
      steps_per_epoch: None where it is not known.
      evaluate: None cannot evaluate.
      callbacks: called after every step.
      facts: JSON-able; what a run that goes on from a checkpoint must share, beside model and settings.
      save_multiple: checkpoints can be made only after a multiple of so many steps.
      key: where the loss takes `jaxft.train.noise.Keyed` micro-batches.
    """

    decoder: Decoder
    loss: LossFunction
    batches: Iterable[Any]
    total_steps: int
    steps_per_epoch: int | None = None
    evaluate: Evaluate | None = None
    callbacks: Sequence[Callback] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    save_multiple: int = 1
    key: jax.Array | None = None


def run(job: Job, args: TrainingArguments, tx: optax.GradientTransformation | None = None) -> TrainResult:
    """Trains the job's decoder in place.

    Args:
      job: what, on what, and how far.
      args: the settings.
      tx: another optimizer than the settings'.

    Raises:
      JaxftError: nothing is trainable, there is no batch, the device's memory is too little, the loss or the gradient
        is not finite, or a checkpoint that does not fit.
      SystemExit: with status 0, after SIGTERM and a checkpoint.
    """
    enable_compilation_cache()
    with contextlib.ExitStack() as stack:
        loop = _Loop(job, args, tx or args.optimizer(job.total_steps), stack)
        return loop.run()


class _Dispatched(NamedTuple):
    """A step whose outcome the host has not looked at."""

    step: int
    batch: Any
    metrics: dict[str, jax.Array]


class _Loop:
    """One run. `stack` closes what it opens, and gives the arrays back to the decoder."""

    def __init__(
        self, job: Job, args: TrainingArguments, tx: optax.GradientTransformation, stack: contextlib.ExitStack
    ) -> None:
        self.job, self.args, self.tx = job, args, tx
        self.output_dir = Path(args.output_dir)
        if args.eval_strategy != "no" and job.evaluate is None:
            raise JaxftError("eval_strategy", "needs an eval_dataset", "Pass one to the trainer")
        if "epoch" in (args.eval_strategy, args.save_strategy) and job.steps_per_epoch is None:
            raise JaxftError("eval_strategy, save_strategy", "the data's length is not known", 'Take "steps"')
        self.graphdef, trainable, self.frozen = labels.split(job.decoder)
        if not jax.tree.leaves(trainable):
            raise JaxftError("train", "nothing in the model is trainable", "Call get_peft_model first")
        self.opt_state = tx.init(trainable)
        self.progress = Progress()
        self.iterator = iter(job.batches)
        facts = fingerprint(job.decoder.config, self.frozen, args, job.facts)
        self.checkpoints = Checkpoints(self.output_dir, facts, args.save_total_limit)
        stack.callback(self.checkpoints.close)
        saved = self.checkpoints.find(args.resume_from_checkpoint)
        if saved is not None:
            trainable = self._resume(saved, trainable)
        # The arrays are donated step by step: work on copies until the first step has made new ones.
        self.trainable = jax.tree.map(lambda leaf: leaf.copy(), trainable)
        stack.callback(lambda: nnx.update(job.decoder, self.trainable))
        self.learning_rates = learning_rates(args, job.total_steps)
        start = self.progress.step
        self.rows = (
            [row for row in read_rows(self.output_dir / "metrics.jsonl") if row["step"] <= start] if start else []
        )
        self.log = MetricsLog(self.output_dir / "metrics.jsonl", resume_at=start)
        stack.callback(self.log.close)
        self.sinks = reporting.open_sinks(args)
        for sink in self.sinks:
            stack.callback(sink.close)
        self.dispatched: collections.deque[_Dispatched] = collections.deque()
        self.meter = Meter(job.decoder, start, job.total_steps)
        self.skipped_in_a_row = 0

    def _resume(self, saved: Path, trainable: Any) -> Any:
        """Goes to where a checkpoint was made; returns what trains."""
        trainable, self.opt_state, self.progress = self.checkpoints.restore(saved, trainable, self.opt_state)
        if hasattr(self.iterator, "set_state"):
            self.iterator.set_state(self.progress.data)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            collections.deque(itertools.islice(self.iterator, self.progress.step), maxlen=0)
        nnx.update(self.job.decoder, trainable)  # what reads the decoder between steps sees these, too
        console.console.print(f"going on from {saved}", soft_wrap=True)
        return trainable

    def run(self) -> TrainResult:
        """All steps that are left."""
        started = time.perf_counter()
        batches = self._compiled(self.iterator)
        total, progress = self.job.total_steps, self.progress
        with signals.deferred() as arrived, console.progress("training", total) as self.advance:
            self.advance(progress.step)
            while progress.step < total and not arrived.interrupted and not self._should_leave(arrived):
                batch = next(batches, None)
                if batch is None:
                    break
                self._step(batch)
                if self._after_step():
                    break
            self._settle()
            if arrived.terminated:
                self._leave()
        self.checkpoints.wait()
        self._load_best()
        return self._result(time.perf_counter() - started, arrived.interrupted)

    def _compiled(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Makes the step; where the remat policy is to be chosen, for the shapes of the first batch."""
        job, args = self.job, self.args
        if job.decoder.remat != AUTO or (first := next(batches, None)) is None:
            self.step = make_train_step(self.graphdef, job.loss, self.tx, remat=job.decoder.remat)
        else:
            arguments = (self.trainable, self.frozen, self.opt_state, self._keyed(first))
            self.step = fitting_step(job.decoder, job.loss, self.tx, arguments, args.memory_budget_gib)
            batches = itertools.chain([first], batches)
        self.frozen = frozen_for(job.decoder, self.frozen)
        return batches

    def _keyed(self, batch: Any) -> Any:
        return batch if self.job.key is None else keyed(batch, self.job.key, self.progress.step)

    def _step(self, batch: Any) -> None:
        given = self._keyed(batch)
        with explained_memory(self.job.decoder, self.tx, given):
            self.trainable, self.opt_state, metrics = self.step(self.trainable, self.frozen, self.opt_state, given)
        for value in metrics.values():
            value.copy_to_host_async()  # begun once the next step is on its way, a copy would wait for that step too
        self.progress.step += 1
        self.meter.count(batch)
        self.dispatched.append(_Dispatched(self.progress.step, batch, metrics))

    def _after_step(self) -> bool:
        """Logs, evaluates, saves and calls back; True ends the run."""
        args, step = self.args, self.progress.step
        evaluates = self._due(args.eval_strategy, args.evaluate_every)
        saves = self._due(args.save_strategy, args.save_steps) and step % self.job.save_multiple == 0
        looks = evaluates or saves or self.job.callbacks
        self._settle(keep=0 if looks else 1)
        ends = False
        if evaluates:
            ends = self._evaluate()
        if saves:
            self._save()
        if self.job.callbacks:
            row = self._last_logged()
            state = TrainState(step, row if row and row["step"] == step else None, self._decoder())
            for callback in self.job.callbacks:
                ends = callback(state) is True or ends
        if evaluates:
            self.meter.restart()
        return ends

    def _due(self, strategy: str, every: int) -> bool:
        interval = {"no": None, "steps": every, "epoch": self.job.steps_per_epoch}[strategy]
        return interval is not None and self.progress.step % interval == 0

    def _decoder(self) -> Decoder:
        return nnx.merge(self.graphdef, self.trainable, self.frozen)

    # What came of the steps.

    def _settle(self, keep: int = 0) -> None:
        """Looks at the outcome of all dispatched steps but the last `keep`, which waits for the device."""
        while len(self.dispatched) > keep:
            done = self.dispatched.popleft()
            metrics = dict(done.metrics)
            if bool(metrics.pop("finite")):
                self.skipped_in_a_row = 0
            else:
                self._not_finite(done)
            if (done.step - 1) % self.args.logging_steps == 0 or done.step == self.job.total_steps:
                updates = done.step - 1 - self.progress.skipped
                row = self.meter.row(done.step, metrics, float(self.learning_rates[updates]))
                self._note(row)
            last = self._last_logged()
            self.advance(note=reporting.note(last) if last else "")

    def _last_logged(self) -> dict[str, Any] | None:
        """The last row of a step; an evaluation's may stand after it."""
        return next((row for row in reversed(self.rows[-2:]) if "loss" in row), None)

    def _note(self, row: dict[str, Any]) -> None:
        row = strict(row)
        self.rows.append(row)
        self.log.write(row)
        for sink in self.sinks:
            sink.log(row)

    def _not_finite(self, done: _Dispatched) -> None:
        """Saves the batch; stops the run, or counts it.

        Raises:
          JaxftError: the run is to stop, or too many steps in a row were left out.
        """
        path = self.output_dir / f"nonfinite-step-{done.step}.npz"
        arrays = {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(done.batch)}
        with new_file(path, overwrite=True) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        loss, norm = float(done.metrics["loss"]), float(done.metrics["grad_norm"])
        what = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}; the batch is in {path}"
        where = f"step {done.step}"
        self.progress.skipped += 1
        self.skipped_in_a_row += 1
        if self.args.on_nonfinite == "stop":
            raise JaxftError(where, what, 'Lower learning_rate, or set on_nonfinite="skip" to leave such batches out')
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise JaxftError(where, f"{what}. It is the {MAX_SKIPPED}th in a row", "Lower learning_rate")
        console.warn(f"{where}: {what}. It was left out")

    def _evaluate(self) -> bool:
        """Evaluates and logs; True where the patience has ended."""
        assert self.job.evaluate is not None
        row = {"step": self.progress.step, **self.job.evaluate(self._decoder())}
        self._note(row)
        self.progress.evaluations.append(strict(row))
        patience = self.args.early_stopping_patience
        if patience is None or evaluations_since_best(self.progress.evaluations, self.args) < patience:
            return False
        console.console.print(f"stopping: {patience} evaluations without a better {self.args.metric_for_best_model}")
        return True

    # Checkpoints.

    def _save(self) -> None:
        get_state = getattr(self.iterator, "get_state", None)
        self.progress.data = get_state() if get_state else None
        best = best_step(self.progress.evaluations, self.args) if self.args.load_best_model_at_end else None
        self.checkpoints.save(self.progress, self.trainable, self.opt_state, best=best)

    def _should_leave(self, arrived: signals.Signals) -> bool:
        return arrived.terminated and self.progress.step % self.job.save_multiple == 0

    def _leave(self) -> None:
        """Saves and ends the process."""
        self._save()
        if not self.checkpoints.wait():
            raise JaxftError(self.output_dir, "no checkpoint could be written before the process ends", "See above")
        path = self.output_dir / f"checkpoint-{self.progress.step}"
        console.console.print(f"saved {path}; resume_from_checkpoint=True goes on from there", soft_wrap=True)
        raise SystemExit(0)

    def _load_best(self) -> None:
        best = best_step(self.progress.evaluations, self.args) if self.args.load_best_model_at_end else None
        if best is None or best == self.progress.step:
            return
        path = self.output_dir / f"checkpoint-{best}"
        self.trainable = self.checkpoints.restore(path, self.trainable, self.opt_state)[0]
        console.console.print(f"loaded the best model, {path}", soft_wrap=True)

    def _result(self, seconds: float, interrupted: bool) -> TrainResult:
        train = [row for row in self.rows if "loss" in row]
        if not train:
            if interrupted:
                return TrainResult(0, [], interrupted=True)
            raise JaxftError("train_dataset", "gave no batch")
        plot_loss(self.rows, self.output_dir / "loss.png")
        console.console.print(reporting.summary(self.rows, seconds, self.progress.skipped))
        console.wrote(self.log.path)
        console.wrote(self.output_dir / "loss.png")
        metrics = {
            "train_runtime": seconds,
            "train_steps_per_second": self.progress.step / seconds,
            "train_loss": float(np.mean([row["loss"] for row in train if row["loss"] is not None])),
        }
        return TrainResult(self.progress.step, self.rows, interrupted, metrics)


def learning_rates(args: TrainingArguments, total_steps: int) -> np.ndarray:
    """float32 [total_steps], of each update.

    All at once: the device would compute a step's own only after the steps that it was already given.
    """
    schedule = args.schedule(total_steps)
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(total_steps)))


def best_step(evaluations: Sequence[Mapping[str, Any]], args: TrainingArguments) -> int | None:
    """The step of the best evaluation by metric_for_best_model, the first of equal ones; None without any.

    Raises:
      JaxftError: evaluation gives no such metric.
    """
    best: tuple[float, int] | None = None
    for row in evaluations:
        score = _score(row, args)
        if score is not None and (best is None or score > best[0]):
            best = (score, row["step"])
    return None if best is None else best[1]


def evaluations_since_best(evaluations: Sequence[Mapping[str, Any]], args: TrainingArguments) -> int:
    """How many evaluations came after the last one that was better than all before by the threshold."""
    best: float | None = None
    since = 0
    for row in evaluations:
        score = _score(row, args)
        if score is not None and (best is None or score > best + args.early_stopping_threshold):
            best, since = score, 0
        else:
            since += 1
    return since


def _score(row: Mapping[str, Any], args: TrainingArguments) -> float | None:
    """The metric, turned so that more is better; None where it is not finite."""
    name = args.metric_for_best_model
    name = name if name in row or name.startswith("eval_") else f"eval_{name}"
    if name not in row:
        known = ", ".join(sorted(set(row) - {"step"}))
        raise JaxftError("metric_for_best_model", f"evaluation gives no {name!r}", f"There are: {known}")
    greater = not name.endswith("loss") if args.greater_is_better is None else args.greater_is_better
    return None if row[name] is None else (row[name] if greater else -row[name])
