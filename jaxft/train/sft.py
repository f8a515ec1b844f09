"""Supervised fine-tuning: rows to packed batches, the SFT loss, and the loop, behind TRL's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft import console, losses, optim
from jaxft.data.batch import Batch, Example
from jaxft.data.chat import preview
from jaxft.data.examples import OnBadRow, OnOverlong, RowSettings, tokenize_rows
from jaxft.data.loader import BatchLoader
from jaxft.data.sources import Source
from jaxft.data.turns import Markers
from jaxft.errors import JaxftError
from jaxft.files import prepare_output_dir
from jaxft.optim import Optimizer, Scheduler
from jaxft.train import trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxft.api import LanguageModel

Rows = str | Path | Iterable[Any] | Source


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Settings of a supervised run, spelt as TRL spells them.

    Attributes:
      output_dir: gets metrics.jsonl and loss.png; must be empty or not exist.
      overwrite_output_dir: write into a folder that is not empty.
      per_device_train_batch_size: rows in a micro-batch.
      gradient_accumulation_steps: micro-batches in a step.
      num_train_epochs: how often the data set is gone through; ignored when max_steps is positive.
      max_steps: end after so many steps, starting the data set again where needed.
      learning_rate: the highest of the schedule.
      lr_scheduler_type: what the learning rate does after the warm-up.
      warmup_steps: steps over which it rises from 0.
      warmup_ratio: the same as a share of all steps, rounded up; ignored when warmup_steps is not 0.
      optim: AdamW with float32 moments (adamw_torch) or 8-bit ones (adamw_8bit).
      weight_decay: of AdamW.
      adam_beta1: decay of AdamW's mean of the gradients.
      adam_beta2: decay of AdamW's mean of their squares.
      adam_epsilon: added to AdamW's denominator.
      max_grad_norm: clip gradients by their global norm; 0 does not clip.
      logging_steps: log every so many steps.
      seed: of the order of the rows and of dropout.
      packing: several documents in a row, which never see each other.
      max_seq_length: tokens in a row; None takes the model's.
      assistant_only_loss: learn the assistant's turns only.
      on_overlong: what becomes of rows over max_seq_length.
      on_bad_row: what becomes of rows that cannot be read, have no known form or nothing to learn from.
      dataset_text_field: the key of plain text, which then decides before any other form; None recognises forms.
      memory_budget_gib: what use_gradient_checkpointing="auto" may use of the device; None is what it has.
    """

    output_dir: str = "outputs"
    overwrite_output_dir: bool = False
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 1
    max_steps: int = -1
    learning_rate: float = 2e-4
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
    seed: int = 3407
    packing: bool = True
    max_seq_length: int | None = None
    assistant_only_loss: bool = True
    on_overlong: OnOverlong = "error"
    on_bad_row: OnBadRow = "error"
    dataset_text_field: str | None = None
    memory_budget_gib: float | None = None

    def __post_init__(self) -> None:
        if self.logging_steps < 1:
            raise JaxftError("logging_steps", f"must be at least 1, not {self.logging_steps}")


class _Micro(NamedTuple):
    """A micro-batch with the key of its dropout."""

    batch: Any
    dropout_key: jax.Array


class SFTTrainer:
    """Fine-tunes a `LanguageModel` on rows of text.

    Args:
      model: from `FastLanguageModel`; its decoder is trained in place.
      tokenizer: None takes the model's.
      train_dataset: rows, or a .jsonl or .json file of them; see `jaxft.data.formats`.
      args: the settings.
      eval_dataset: rows for `evaluate`.
      callbacks: called with a `jaxft.train.trainer.TrainState` after every step.

    Raises:
      JaxftError: rows that cannot be read or tokenized (named by file and row), a data set with nothing to learn.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Rows | None = None,
        args: SFTConfig = SFTConfig(),
        eval_dataset: Rows | None = None,
        callbacks: Sequence[trainer.Callback] = (),
    ) -> None:
        self.model = model
        self.args = args
        self.tokenizer = tokenizer or model.tokenizer
        self.callbacks = callbacks
        self.response_markers: Markers | None = None  # of conversations that were rendered already
        self._train_dataset = train_dataset
        self._eval_dataset = eval_dataset

    def train(self) -> trainer.TrainResult:
        """Runs the training; the model holds the new values afterwards, also when the run was interrupted."""
        args = self.args
        output_dir = prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir)
        examples = self._examples(self._train_dataset, "train_dataset")
        loader = self._loader(examples, epochs=args.num_train_epochs)
        if args.max_steps > 0:
            loader = self._loader(examples, epochs=-(-args.max_steps // loader.steps_per_epoch))
        total_steps = args.max_steps if args.max_steps > 0 else len(loader)
        schedule = optim.schedule(
            args.lr_scheduler_type, args.learning_rate, total_steps=total_steps, warmup_steps=self._warmup(total_steps)
        )
        tx = optim.optimizer(
            args.optim,
            schedule,
            b1=args.adam_beta1,
            b2=args.adam_beta2,
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
        )
        self._announce(loader, examples[0], total_steps)
        loss, batches = self._loss(loader)
        return trainer.run(
            self.model.decoder,
            loss,
            tx,
            batches,
            total_steps=total_steps,
            schedule=schedule,
            output_dir=output_dir,
            logging_steps=args.logging_steps,
            callbacks=self.callbacks,
            memory_budget_gib=args.memory_budget_gib,
        )

    def evaluate(self, dataset: Rows | None = None) -> dict[str, float]:
        """{"eval_loss": nats per target token, "eval_tokens": target tokens} of `dataset` (or eval_dataset)."""
        rows = self._eval_dataset if dataset is None else dataset
        loader = self._loader(self._examples(rows, "eval_dataset"), epochs=1)
        graphdef, params = nnx.split(self.model.decoder)
        total = weight = 0.0
        for batch in console.track(loader, "evaluating", len(loader)):
            loss, count = _evaluate(graphdef, params, batch)
            total, weight = total + float(loss), weight + float(count)
        return {"eval_loss": total / weight, "eval_tokens": weight}

    def _examples(self, rows: Rows | None, name: str) -> list[Example]:
        if rows is None:
            raise JaxftError(name, "is missing")
        tokenized = tokenize_rows(rows, self._required_tokenizer(), self._row_settings, name)
        check_vocabulary(tokenized.examples, self.model.decoder.config.vocab_size)
        console.console.print(f"{name}: {tokenized}", soft_wrap=True)
        return tokenized.examples

    def _required_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise JaxftError("tokenizer", "the model has none", "Pass one to SFTTrainer")
        return self.tokenizer

    @property
    def _row_settings(self) -> RowSettings:
        args = self.args
        return RowSettings(
            self._max_seq_length,
            args.assistant_only_loss,
            args.on_overlong,
            args.on_bad_row,
            args.dataset_text_field,
            self.response_markers,
        )

    @property
    def _max_seq_length(self) -> int:
        return self.args.max_seq_length or self.model.max_seq_length

    def _loader(self, examples: Sequence[Example], epochs: int) -> BatchLoader:
        args = self.args
        return BatchLoader(
            examples,
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            max_seq_length=self._max_seq_length,
            packing=args.packing,
            seed=args.seed,
            epochs=epochs,
        )

    def _warmup(self, total_steps: int) -> int:
        return self.args.warmup_steps or math.ceil(self.args.warmup_ratio * total_steps)

    def _loss(self, loader: BatchLoader | Any) -> tuple[Any, Iterable[Any]]:
        """The loss, and the batches that it takes: with a key for each micro-batch where there is dropout."""
        if not (self.model.lora_config and self.model.lora_config.lora_dropout):
            return self._loss_function, loader
        key = jax.random.key(self.args.seed)

        def with_keys() -> Iterator[_Micro]:
            for step, batch in enumerate(loader):
                yield _Micro(batch, jax.random.split(jax.random.fold_in(key, step), loader.shape[0]))

        loss = self._loss_function
        return (lambda decoder, micro: loss(decoder, micro.batch, dropout_key=micro.dropout_key)), with_keys()

    @property
    def _loss_function(self) -> Any:
        """(decoder, batch, dropout_key) -> (sum, weight, metrics)."""
        return losses.sft

    def _announce(self, loader: BatchLoader | Any, example: Example, total_steps: int) -> None:
        accumulation, rows = loader.shape
        trainable = self.model.trainable_parameters()
        facts = {
            "steps": total_steps,
            "rows x tokens a step": f"{accumulation} x {rows} x {loader.max_seq_length}",
            "one epoch": str(loader.report),
            "trainable parameters": f"{trainable:,}",
            "remat": self.model.decoder.remat,
            "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        }
        console.console.print(console.table("fine-tuning", ("what", "value"), facts.items()))
        console.console.print(
            "first row, trained tokens coloured:", preview(example, self._required_tokenizer()), soft_wrap=True
        )


def check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    """A token without an embedding would make every loss NaN."""
    for example in examples:
        if example.tokens.max() >= vocab_size:
            raise JaxftError(
                example.where,
                f"has the token id {example.tokens.max()}, and the model has only {vocab_size} embeddings",
                "Use the tokenizer that belongs to the model",
            )


@partial(jax.jit, static_argnames="graphdef")
def _evaluate(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Loss sum and weight of a batch [A, B, T]."""
    decoder = nnx.merge(graphdef, params)

    def one(carry: tuple[jax.Array, jax.Array], micro: Batch) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, weight, _ = losses.sft(decoder, micro)
        return (carry[0] + total, carry[1] + weight), None

    return jax.lax.scan(one, (jnp.float32(0), jnp.float32(0)), batch)[0]
