"""What a person sees of a run: the table at its start, a line while it goes, a summary, and other programs' logs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from jaxft import console
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.models.remat import AUTO
from jaxft.plan import GIB, plan
from jaxft.train.arguments import MAY_CHANGE, TrainingArguments, jsonable


def start_table(decoder: Decoder, args: TrainingArguments, loader: Any, total_steps: int) -> Any:
    """Everything that was derived from the settings, the model and the data."""
    accumulation, rows = loader.shape
    length = loader.max_seq_length
    epoch = loader.steps_per_epoch
    facts = {
        "steps": f"{total_steps:,}" + (f", {total_steps / epoch:.3g} epochs of {epoch:,}" if epoch else ""),
        "rows x tokens a step": f"{accumulation} x {rows} x {length} = {accumulation * rows * length:,} tokens",
        "one epoch": str(loader.report),
        "trainable parameters": trainable_share(decoder),
        "optimizer": _optimizer(args, total_steps),
        "remat": decoder.remat,
        "predicted memory": _memory(decoder, args, rows, length),
        "evaluation": _when(args.eval_strategy, args.evaluate_every),
        "checkpoints": _when(args.save_strategy, args.save_steps),
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
    }
    return console.table("fine-tuning", ("what", "value"), facts.items())


def trainable_share(decoder: Decoder) -> str:
    """'1,234 of 5,678 (21.73 %)'; a quantized weight counts as the values that it stands for."""
    _, trainable, frozen = labels.split(decoder)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    stacks = jax.tree.leaves(frozen, is_leaf=lambda x: hasattr(x, "dequantize"))
    rest = sum(_values(value, decoder.config.num_hidden_layers) for value in stacks)
    return f"{trained:,} of {trained + rest:,} ({trained / (trained + rest):.2%})"


def _values(value: Any, layers: int) -> int:
    return layers * value.shape[0] * value.shape[1] if hasattr(value, "dequantize") else value.size


def _optimizer(args: TrainingArguments, total_steps: int) -> str:
    rate = f"{args.learning_rate:g}"
    if args.embedding_learning_rate is not None:
        rate += f" ({args.embedding_learning_rate:g} for embedding and head)"
    return f"{args.optim}, {args.lr_scheduler_type} from {rate}, {args.warmup(total_steps)} steps of warm-up"


def _memory(decoder: Decoder, args: TrainingArguments, rows: int, length: int) -> str:
    if decoder.remat == AUTO:
        return "of the policy that is chosen at the first step"
    found = plan(decoder, args.optimizer(1), rows=rows, length=length)
    return f"{found.peak / GIB:.2f} GiB on a GPU, {found.host / GIB:.2f} GiB in host memory"


def _when(strategy: str, every: int) -> str:
    return {"no": "none", "epoch": "after every epoch"}.get(strategy, f"every {every:,} steps")


def note(row: Mapping[str, Any]) -> str:
    """What stands beside the progress bar."""
    parts = [
        f"loss {_shown(row['loss'])}",
        f"lr {row['learning_rate']:.2e}",
        f"grad norm {_shown(row['grad_norm'])}",
        f"{row['tokens/s']:,.0f} tokens/s",
        f"{row['peak_memory_gib']:.1f} GiB",
    ]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    if row["eta_s"] is not None:
        minutes, seconds = divmod(round(row["eta_s"]), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return "  ".join(parts)


def summary(rows: Sequence[Mapping[str, Any]], seconds: float, skipped: int) -> Any:
    """The outcome of a run as a table."""
    train = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if row.get("eval_loss") is not None]
    timed = train[1:] or train  # the first has the compilation in it
    rates = sorted(row["tokens/s"] for row in timed)
    facts: dict[str, Any] = {
        "steps": train[-1]["step"],
        "time": f"{seconds:,.0f} s",
        "loss": f"{_shown(train[0]['loss'])} -> {_shown(train[-1]['loss'])}",
        "tokens/s without padding (median)": f"{rates[len(rates) // 2]:,.0f}",
        "peak memory": f"{train[-1]['peak_memory_gib']:.2f} GiB",
    }
    if evaluated:
        best = min(evaluated, key=lambda row: row["eval_loss"])
        facts["eval loss"] = f"{evaluated[-1]['eval_loss']:.4f}, best {best['eval_loss']:.4f} at step {best['step']}"
    if skipped:
        facts["batches left out"] = skipped
    return console.table("the run", ("what", "value"), facts.items())


def record(trainer: Any, result: Any) -> dict[str, Any]:
    """What a model card says of a run: {"trainer", "settings", "figures"}, plain values.

    Args:
      trainer: has `args`; of its settings those are told that change what is learnt.
      result: a `jaxft.train.trainer.TrainResult`.
    """
    train = [row for row in result.rows if row.get("loss") is not None]
    evaluated = [row["eval_loss"] for row in result.rows if row.get("eval_loss") is not None]
    figures: dict[str, Any] = {"steps": result.steps}
    if train:
        figures |= {"loss at the start": train[0]["loss"], "loss at the end": train[-1]["loss"]}
    if evaluated:
        figures["eval loss at the end"] = evaluated[-1]
    settings = {name: value for name, value in jsonable(trainer.args).items() if name not in MAY_CHANGE}
    return {"trainer": type(trainer).__name__, "settings": settings, "figures": figures}


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


@runtime_checkable
class Sink(Protocol):
    """Another log beside metrics.jsonl."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes a row of numbers with its "step"."""
        ...

    def close(self) -> None:
        """Ends the log."""
        ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, args: TrainingArguments) -> None:
        self._writer = importlib.import_module("tensorboard.summary").Writer(str(Path(args.output_dir) / "tensorboard"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes each number as a scalar."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Tracker:
    """W&B, and trackio, which has its calls."""

    def __init__(self, module: str, args: TrainingArguments) -> None:
        self._module = importlib.import_module(module)
        name = args.run_name or Path(args.output_dir).name
        self._module.init(project="jaxft", name=name, config=jsonable(args))

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends the row."""
        self._module.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Ends the run there."""
        self._module.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}


SINKS = ("tensorboard", "wandb", "trackio")


def open_sinks(args: TrainingArguments) -> list[Sink]:
    """The logs that report_to names; "all" are those that are installed.

    Raises:
      JaxftError: an unknown name, or a program that is not installed.
    """
    wanted = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to)
    if "all" in wanted:
        wanted = [name for name in SINKS if importlib.util.find_spec(name)]
    names = [name for name in wanted if name != "none"]
    for name in names:
        if name not in SINKS:
            raise JaxftError("report_to", f"{name!r} is not known", f"Choose none, all, {', '.join(SINKS)}")
        if importlib.util.find_spec(name) is None:
            raise JaxftError("report_to", f"{name} is not installed", f"Install it: pip install {name}")
    return [TensorBoard(args) if name == "tensorboard" else Tracker(name, args) for name in names]
