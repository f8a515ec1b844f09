"""Settings that every trainer has, spelt as transformers and TRL spell them; unknown names are refused."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import optax

from jaxft import console, optim
from jaxft.errors import JaxftError
from jaxft.optim import Optimizer, Scheduler

Strategy = Literal["no", "steps", "epoch"]
ReportTo = Literal["none", "all", "tensorboard", "wandb", "trackio"]
T = TypeVar("T")

ALIASES = {"max_length": "max_seq_length", "evaluation_strategy": "eval_strategy"}

_DTYPE = "the dtype is from_pretrained's"
_REMAT = "use_gradient_checkpointing is get_peft_model's"
_DATA = "rows are read and tokenized in this process"
# Settings of other trainers that change nothing here, so that their notebooks run; each with the reason, which is said.
WITHOUT_EFFECT = {
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "tf32": _DTYPE,
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "gradient_checkpointing": _REMAT,
    "gradient_checkpointing_kwargs": _REMAT,
    "dataset_num_proc": _DATA,
    "dataloader_num_workers": _DATA,
    "dataloader_pin_memory": _DATA,
    "dataset_kwargs": _DATA,
    "remove_unused_columns": "only the columns that a row's form names are read",
    "group_by_length": "packing leaves no padding to save",
    "padding_free": "packing leaves no padding",
    "packing_strategy": "rows are packed by best fit",
    "torch_compile": "every step is compiled",
    "use_cpu": "JAX_PLATFORMS=cpu chooses the CPU",
    "disable_tqdm": "progress is shown in terminals and notebooks only",
    "logging_first_step": "the first step is always logged",
    "save_safetensors": "adapters and merged models are always safetensors",
    "ddp_find_unused_parameters": "there is no DDP",
}


# Settings that a run which is resumed may have otherwise: they do not change what is learnt.
MAY_CHANGE = frozenset(
    [
        "output_dir",
        "overwrite_output_dir",
        "per_device_eval_batch_size",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "early_stopping_patience",
        "early_stopping_threshold",
        "on_nonfinite",
        "report_to",
        "run_name",
        "memory_budget_gib",
        "num_completions_to_print",
        "reward_timeout_s",
        "on_reward_error",
    ]
)


def known_names_only(cls: type[T]) -> type[T]:
    """Decorator of a dataclass of settings: other trainers' names are taken or explained, unknown ones refused.

    Raises:
      JaxftError: from the class, for a name that it does not have, with the nearest one that it has.
    """
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **translated(cls, settings))

    cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def translated(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` under the names that the dataclass has; see `known_names_only`."""
    names = [field.name for field in dataclasses.fields(cls)]
    found: dict[str, Any] = {}
    for given, value in settings.items():
        name = given if given in names else ALIASES.get(given, given)
        if name in names:
            if name in found:
                alias = next(other for other in settings if ALIASES.get(other) == name)
                raise JaxftError(alias, f"is another name of {name}, which is given too", "Give one of them")
            found[name] = value
        elif given in WITHOUT_EFFECT:
            console.console.print(f"{given} has no effect: {WITHOUT_EFFECT[given]}", soft_wrap=True)
        else:
            raise JaxftError(given, f"is no setting of {cls.__name__}", nearest(given, [*names, *ALIASES]))
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """'Did you mean ...?' with the nearest known name, or where to look."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"The nearest there is: {close[0]}" if close else ""


def jsonable(value: Any) -> Any:
    """A tree of plain values as it reads after JSON: dataclasses as objects, tuples as lists, the rest as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): jsonable(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(x) for x in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


@known_names_only
@dataclasses.dataclass(frozen=True)
class TrainingArguments:
    """Settings of a run.

    Attributes:
      output_dir: gets metrics.jsonl, loss.png and the checkpoints; must be empty or not exist.
      overwrite_output_dir: write into a folder that is not empty.
      per_device_train_batch_size: rows in a micro-batch.
      per_device_eval_batch_size: rows of a batch when evaluating; None is as in training.
      gradient_accumulation_steps: micro-batches in a step.
      num_train_epochs: how often the data set is gone through; ignored when max_steps is positive.
      max_steps: end after so many steps, starting the data set again where needed.
      learning_rate: the highest of the schedule.
      embedding_learning_rate: the same of embedding and head, where they train; None is learning_rate.
      lr_scheduler_type: what the learning rate does after the warm-up.
      warmup_steps: steps over which it rises from 0.
      warmup_ratio: the same as a share of all steps, rounded up; ignored when warmup_steps is not 0.
      optim: see `jaxft.optim`; adamw_torch has float32 moments, adamw_8bit 8-bit ones.
      weight_decay: of AdamW and Lion.
      adam_beta1: decay of the mean of the gradients.
      adam_beta2: decay of the mean of their squares.
      adam_epsilon: added to AdamW's denominator.
      max_grad_norm: clip gradients by their global norm; 0 does not clip.
      logging_steps: log every so many steps.
      eval_strategy: when eval_dataset is evaluated during the run.
      eval_steps: every so many steps, with eval_strategy "steps"; None is logging_steps.
      save_strategy: when a checkpoint is written, beside the one on SIGTERM.
      save_steps: every so many steps, with save_strategy "steps".
      save_total_limit: keep so many checkpoints, the latest and, with load_best_model_at_end, the best; None keeps all.
      resume_from_checkpoint: "true" continues from the last checkpoint in output_dir where there is one, a path from
        that one.
      load_best_model_at_end: end with the values of the best evaluated checkpoint.
      metric_for_best_model: what "best" is about: eval_loss, or another value that evaluation gives.
      greater_is_better: None: False for losses, otherwise True.
      early_stopping_patience: stop after so many evaluations without a better one; None does not.
      early_stopping_threshold: a better one is better by more than this.
      on_nonfinite: what a loss or gradient that is not finite does: "stop" ends the run, "skip" leaves that batch out.
        Either way the batch is saved and the weights stay as they were.
      seed: of the order of the rows, of dropout and of noise.
      report_to: other logs beside metrics.jsonl.
      run_name: the run's name there; None is output_dir.
      memory_budget_gib: what use_gradient_checkpointing="auto" may use of the device; None is what it has.
    """

    output_dir: str = "outputs"
    overwrite_output_dir: bool = False
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 1
    max_steps: int = -1
    learning_rate: float = 2e-4
    embedding_learning_rate: float | None = None
    lr_scheduler_type: Scheduler = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    optim: Optimizer = "adamw_torch"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    logging_steps: int = 1
    eval_strategy: Strategy = "no"
    eval_steps: int | None = None
    save_strategy: Strategy = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    resume_from_checkpoint: str | bool | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    seed: int = 3407
    report_to: ReportTo | tuple[ReportTo, ...] = "none"
    run_name: str | None = None
    memory_budget_gib: float | None = None

    def __post_init__(self) -> None:
        for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JaxftError(name, f"must be at least 1, not {value}")
        for name, choices in (("eval_strategy", Strategy), ("save_strategy", Strategy)):
            if getattr(self, name) not in choices.__args__:
                known = ", ".join(choices.__args__)
                raise JaxftError(name, f"{getattr(self, name)!r} is not known", f"Choose one of {known}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise JaxftError("on_nonfinite", f"{self.on_nonfinite!r} is not known", "Choose stop or skip")
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise JaxftError("early_stopping_patience", "needs evaluations", "Set eval_strategy")
        if self.load_best_model_at_end:
            self._check_best()

    def _check_best(self) -> None:
        """The best model can be loaded only where what was evaluated was saved, too."""
        where = "load_best_model_at_end"
        if self.eval_strategy == "no" or self.eval_strategy != self.save_strategy:
            what = f"needs equal strategies; eval_strategy is {self.eval_strategy!r}, save_strategy"
            raise JaxftError(where, f"{what} {self.save_strategy!r}", 'Set both to "steps" or both to "epoch"')
        if self.eval_strategy == "steps" and self.evaluate_every % self.save_steps:
            what = f"needs a checkpoint of every evaluation: eval_steps is {self.evaluate_every}"
            raise JaxftError(where, f"{what}, save_steps {self.save_steps}", "Make eval_steps a multiple of save_steps")

    @property
    def resumes(self) -> bool:
        """Whether the run is to go on from a checkpoint, where there is one."""
        return str(self.resume_from_checkpoint).lower() not in ("none", "false")

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations, with eval_strategy "steps"."""
        return self.eval_steps or self.logging_steps

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)

    def schedule(self, total_steps: int, learning_rate: float | None = None) -> optax.Schedule:
        """Learning rate by step, up to `learning_rate` or the settings' own."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        return optim.schedule(
            self.lr_scheduler_type, rate, total_steps=total_steps, warmup_steps=self.warmup(total_steps)
        )

    def optimizer(self, total_steps: int) -> optax.GradientTransformation:
        """The optimizer, for any trainable tree of a decoder; embedding and head may have a learning rate of their own.

        Gradients are clipped by the norm of all of them.
        """
        shared = {
            "b1": self.adam_beta1,
            "b2": self.adam_beta2,
            "eps": self.adam_epsilon,
            "weight_decay": self.weight_decay,
            "max_grad_norm": None,
        }
        rates = (self.learning_rate, self.embedding_learning_rate)
        update, embedding = (
            None if rate is None else optim.optimizer(self.optim, self.schedule(total_steps, rate), **shared)
            for rate in rates
        )
        assert update is not None
        return optim.by_kind(update, embedding, max_grad_norm=self.max_grad_norm)
