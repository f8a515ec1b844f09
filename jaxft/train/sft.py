"""Supervised fine-tuning: rows to packed batches, the SFT loss, and the loop, behind TRL's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

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
      streaming: read, tokenize and pack the training rows as they are needed, for more than memory holds; needs
        max_steps, as nobody knows how many steps an epoch has.
    """

    packing: bool = True
    max_seq_length: int | None = None
    assistant_only_loss: bool = True
    on_overlong: OnOverlong = "error"
    on_bad_row: OnBadRow = "error"
    dataset_text_field: str | None = None
    neftune_noise_alpha: float | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.max_steps < 1:
            raise JaxftError("streaming", "needs max_steps: how long the data is shows only when it was read")


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
        self._response_markers: Markers | None = None
        self._training_rows = train_dataset
        self.eval_dataset = eval_dataset

    @cached_property
    def train_dataset(self) -> Any:
        """What is trained on: {"input_ids", "labels"} of each document, -100 where there is nothing to learn.

        The rows as they were given where they are streamed.
        """
        if self.args.streaming:
            return self._training_rows
        return Documents(self._examples(self._training_rows, "train_dataset"))

    @property
    def response_markers(self) -> Markers | None:
        """Of conversations that were rendered already: only what follows them is learnt."""
        return self._response_markers

    @response_markers.setter
    def response_markers(self, markers: Markers | None) -> None:
        self._response_markers = markers
        for name in ("train_dataset", "_eval_loader"):
            self.__dict__.pop(name, None)  # they were made without

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> trainer.TrainResult:
        """Runs the training; the model holds the new values afterwards, also when the run was interrupted.

        Args:
          resume_from_checkpoint: as the setting of that name, which it takes the place of.
        """
        args = self.args
        if resume_from_checkpoint is not None:
            args = dataclasses.replace(args, resume_from_checkpoint=str(resume_from_checkpoint))
        loader, example = self._training_batches()
        total_steps = args.max_steps if args.max_steps > 0 else len(loader)
        job = self._job(loader, total_steps)
        args.schedule(total_steps)  # refuses a kind that it does not know
        evaluate_at_all = args.eval_strategy != "no" and self.eval_dataset is not None
        if evaluate_at_all:
            _ = self._eval_loader
        prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir or args.resumes)
        self._announce(loader, example, total_steps)
        result = trainer.run(job, args)
        self.model.training = reporting.record(self, result)
        if args.streaming:
            console.console.print(f"train_dataset: {loader.report}", soft_wrap=True)
        return result

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

    def _training_batches(self) -> tuple[Any, Any]:
        """(a loader of the whole run, its first example)."""
        args = self.args
        if args.streaming:
            stream = self._stream()
            return stream, stream.example
        examples = self.train_dataset.examples
        loader = self._loader(examples, epochs=args.num_train_epochs)
        if args.max_steps > 0:
            loader = self._loader(examples, epochs=-(-args.max_steps // loader.steps_per_epoch))
        return loader, examples[0]

    def _stream(self) -> Any:
        """A loader of the training rows that starts them again without end."""
        from jaxft.data.stream import StreamLoader  # imports grain, which is slow

        return StreamLoader(
            self._rows(self._training_rows, "train_dataset"),
            self._required_tokenizer(),
            self._row_settings,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            packing=self.args.packing,
            seed=self.args.seed,
            name="train_dataset",
        )

    def _rows(self, rows: Rows | None, name: str) -> Any:
        """The rows, or what formatting_func makes of them."""
        if rows is None:
            raise JaxftError(name, "is missing")
        return rows if self.formatting_func is None else Formatted(rows, self.formatting_func, name)

    def _examples(self, rows: Rows | None, name: str) -> list[Any]:
        tokenized = tokenize_rows(self._rows(rows, name), self._required_tokenizer(), self._row_settings, name)
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
            self.model.decoder.config.vocab_size,
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


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenized documents as other trainers show them."""

    examples: Sequence[Any]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """{"input_ids", "labels"}, where labels are -100 for what is not learnt."""
        _, tokens, loss_mask = self.examples[index]
        return {"input_ids": tokens.tolist(), "labels": np.where(loss_mask, tokens, -100).tolist()}


@dataclasses.dataclass(frozen=True)
class Formatted:
    """Rows of the texts that a function makes of other rows, whenever they are read."""

    rows: Any
    formatting_func: Callable[[Any], str]
    name: str

    def __iter__(self) -> Iterator[dict[str, str]]:
        for _, row in read_objects(self.rows, self.name):
            yield {"text": self.formatting_func(row)}
