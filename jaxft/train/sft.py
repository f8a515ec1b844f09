"""Supervised fine-tuning: rows to packed batches, the SFT loss, and the loop, behind TRL's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxft import console, losses
from jaxft.data.batch import Example
from jaxft.data.chat import preview
from jaxft.data.examples import OnBadRow, OnOverlong, RowSettings, tokenize_rows
from jaxft.data.loader import BatchLoader
from jaxft.data.sources import Source, read_objects
from jaxft.data.turns import Markers
from jaxft.errors import JaxftError
from jaxft.files import prepare_output_dir
from jaxft.models.decoder import Decoder
from jaxft.train import evaluation, reporting, trainer
from jaxft.train.arguments import TrainingArguments, known_names_only, translated
from jaxft.train.noise import noisy_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxft.api import LanguageModel

Rows = str | Path | Iterable[Any] | Source


@known_names_only
@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainingArguments):
    """Settings of a supervised run, spelt as TRL spells them; the others are `TrainingArguments`'.

    Attributes:
      packing: several documents in a row, which never see each other.
      max_seq_length: tokens in a row; None takes the model's.
      assistant_only_loss: learn the assistant's turns only.
      on_overlong: what becomes of rows over max_seq_length.
      on_bad_row: what becomes of rows that cannot be read, have no known form or nothing to learn from.
      dataset_text_field: the key of plain text, which then decides before any other form; None recognises forms.
      neftune_noise_alpha: of the noise on the embeddings, 5 to 15 as a rule; None adds none.
    """

    packing: bool = True
    max_seq_length: int | None = None
    assistant_only_loss: bool = True
    on_overlong: OnOverlong = "error"
    on_bad_row: OnBadRow = "error"
    dataset_text_field: str | None = None
    neftune_noise_alpha: float | None = None


class SFTTrainer:
    """Fine-tunes a `LanguageModel` on rows of text.

    Args:
      model: from `FastLanguageModel`; its decoder is trained in place.
      tokenizer: None takes the model's.
      train_dataset: rows, or a file of them; see `jaxft.data.formats`.
      args: the settings.
      eval_dataset: rows for `evaluate`, and for evaluations during the run.
      callbacks: called with a `jaxft.train.trainer.TrainState` after every step; True ends the run.
      processing_class: TRL's newer name of `tokenizer`.
      formatting_func: makes a text of each row.
      data_collator: is not used: batches are laid out by `jaxft.data.loader`.
      settings: more settings by name, in place of those of `args`, as older trainers took them.

    Raises:
      JaxftError: rows that cannot be read or tokenized (named by file and row), a data set with nothing to learn.
    """

    args: SFTConfig

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Rows | None = None,
        args: SFTConfig = SFTConfig(),
        eval_dataset: Rows | None = None,
        callbacks: Sequence[trainer.Callback] = (),
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        data_collator: Any = None,
        **settings: Any,
    ) -> None:
        if data_collator is not None:
            console.console.print("data_collator has no effect: batches are laid out by jaxft", soft_wrap=True)
        self.model = model
        self.args = dataclasses.replace(args, **translated(type(args), settings))
        self.tokenizer = tokenizer or processing_class or model.tokenizer
        self.callbacks = callbacks
        self.formatting_func = formatting_func
        self.response_markers: Markers | None = None  # of conversations that were rendered already
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> trainer.TrainResult:
        """Runs the training; the model holds the new values afterwards, also when the run was interrupted.

        Args:
          resume_from_checkpoint: as the setting of that name, which it takes the place of.
        """
        args = self.args
        if resume_from_checkpoint is not None:
            args = dataclasses.replace(args, resume_from_checkpoint=str(resume_from_checkpoint))
        examples = self._examples(self.train_dataset, "train_dataset")
        loader = self._loader(examples, epochs=args.num_train_epochs)
        if args.max_steps > 0:
            loader = self._loader(examples, epochs=-(-args.max_steps // loader.steps_per_epoch))
        total_steps = args.max_steps if args.max_steps > 0 else len(loader)
        job = self._job(loader, total_steps)
        args.schedule(total_steps)  # refuses a kind that it does not know
        evaluate_at_all = args.eval_strategy != "no" and self.eval_dataset is not None
        if evaluate_at_all:
            _ = self._eval_loader
        prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir or args.resumes)
        self._announce(loader, examples[0], total_steps)
        return trainer.run(job, args)

    def evaluate(self, dataset: Rows | None = None) -> dict[str, float]:
        """{"eval_loss": nats per target token, "eval_tokens": target tokens} of `dataset` (or eval_dataset)."""
        loader = self._eval_loader if dataset is None else self._make_eval_loader(dataset)
        return self._evaluated(self.model.decoder, loader)

    def _evaluated(self, decoder: Decoder, loader: Any) -> dict[str, float]:
        found = evaluation.mean_loss(decoder, loader, self._loss_function)
        return {"eval_loss": found["eval_loss"], "eval_tokens": found["eval_weight"]}

    @cached_property
    def _eval_loader(self) -> Any:
        return self._make_eval_loader(self.eval_dataset)

    def _make_eval_loader(self, rows: Rows | None) -> Any:
        size = self.args.per_device_eval_batch_size
        return self._loader(self._examples(rows, "eval_dataset"), epochs=1, batch_size=size, accumulation=1)

    def _job(self, loader: Any, total_steps: int) -> trainer.Job:
        lora_config = self.model.lora_config
        dropout = bool(lora_config and lora_config.lora_dropout)
        loss, key = self._loss_function, None
        if dropout or self.args.neftune_noise_alpha:
            alpha = self.args.neftune_noise_alpha
            loss = partial(noisy_loss, loss=loss, dropout=dropout, neftune_noise_alpha=alpha)
            key = jax.random.key(self.args.seed)
        evaluates = self.eval_dataset is not None
        return trainer.Job(
            self.model.decoder,
            loss,
            loader,
            total_steps,
            loader.steps_per_epoch,
            evaluate=(lambda decoder: self._evaluated(decoder, self._eval_loader)) if evaluates else None,
            callbacks=self.callbacks,
            facts={"adapter": lora_config, "base model": Path(self.model.name).name},
            key=key,
        )

    def _examples(self, rows: Rows | None, name: str) -> list[Any]:
        if rows is None:
            raise JaxftError(name, "is missing")
        if self.formatting_func is not None:
            rows = [{"text": self.formatting_func(row)} for _, row in read_objects(rows, name)]
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

    def _loader(
        self, examples: Sequence[Any], epochs: int, batch_size: int | None = None, accumulation: int | None = None
    ) -> Any:
        args = self.args
        return BatchLoader(
            examples,
            batch_size=batch_size or args.per_device_train_batch_size,
            accumulation=accumulation or args.gradient_accumulation_steps,
            max_seq_length=self._max_seq_length,
            packing=args.packing,
            seed=args.seed,
            epochs=epochs,
        )

    @property
    def _loss_function(self) -> Any:
        """(decoder, batch, dropout_key) -> (sum, weight, metrics)."""
        return losses.sft

    def _announce(self, loader: Any, example: Example, total_steps: int) -> None:
        console.console.print(reporting.start_table(self.model.decoder, self.args, loader, total_steps))
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
