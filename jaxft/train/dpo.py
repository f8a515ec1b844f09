"""Preference training: DPO and its relatives on rows of prompt, chosen and rejected, behind TRL's names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft import console, losses
from jaxft.data.batch import PairBatch, Pairs
from jaxft.data.examples import check_vocabulary
from jaxft.data.preference import Pair, PairLoader, read_pairs
from jaxft.errors import JaxftError
from jaxft.losses.preference import LossType, PreferenceLoss, reference_log_probs
from jaxft.models.decoder import Decoder
from jaxft.train import evaluation, trainer
from jaxft.train.arguments import known_names_only
from jaxft.train.sft import Rows, SFTConfig, SFTTrainer


@known_names_only
@dataclasses.dataclass(frozen=True)
class DPOConfig(SFTConfig):
    """Settings of a preference run, spelt as TRL spells them; those of SFTConfig as they are there.

    Attributes:
      learning_rate: the highest of the schedule.
      max_seq_length: tokens in a row, which holds whole pairs, that is, prompt and completion twice.
      packing: several pairs in a row; without it per_device_train_batch_size is the number of pairs.
      beta: how far from the reference; see `jaxft.losses.PreferenceLoss`, also for the next four.
      loss_type: sigmoid, robust, hinge and ipo compare with a reference, the model with its adapter switched off;
        simpo, cpo and orpo have none.
      label_smoothing: the share of pairs whose preference is taken to be wrong.
      simpo_gamma: SimPO's target margin.
      cpo_alpha: CPO's factor of the negative log-likelihood.
      precompute_ref_log_probs: run the reference once before the training instead of in every step. Without an adapter
        it is the model as it starts.
    """

    learning_rate: float = 5e-6
    beta: float = 0.1
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    precompute_ref_log_probs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neftune_noise_alpha:
            raise JaxftError("neftune_noise_alpha", "would add noise to the reference, too", "Leave it out")
        if self.streaming:
            raise JaxftError("streaming", "is not for preferences: the pairs are read as a whole", "Leave it out")
        self.loss()  # checks its settings

    def loss(self) -> PreferenceLoss:
        """The loss that these settings describe."""
        return PreferenceLoss(self.loss_type, self.beta, self.label_smoothing, self.simpo_gamma, self.cpo_alpha)


class DPOTrainer(SFTTrainer):
    """Trains a `LanguageModel` on preference rows: {"prompt", "chosen", "rejected"}, strings or lists of messages.

    Arguments, and what it raises, are SFTTrainer's. Beside the loss it logs, for each pair, rewards/chosen,
    rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen and logps/rejected.
    """

    args: DPOConfig

    def __init__(self, model: Any, tokenizer: Any = None, train_dataset: Rows | None = None,
                 args: DPOConfig = DPOConfig(), **others: Any) -> None:  # fmt: skip
        super().__init__(model, tokenizer, train_dataset, args, **others)
        if args.loss().needs_reference and not (model.lora_config or args.precompute_ref_log_probs):
            raise JaxftError(
                "DPOTrainer",
                f"{args.loss_type!r} compares with the model without its adapter, and there is none",
                "Call get_peft_model first, or set precompute_ref_log_probs=True",
            )

    def evaluate(self, dataset: Rows | None = None) -> dict[str, float]:
        """The mean loss of `dataset`'s (or eval_dataset's) pairs and the metrics that training logs, as "eval_..."."""
        return super().evaluate(dataset)

    def _evaluated(self, decoder: Decoder, loader: Any) -> dict[str, float]:
        return evaluation.mean_loss(decoder, loader, self._loss_function)

    def _examples(self, rows: Rows | None, name: str) -> list[Pair]:
        if rows is None:
            raise JaxftError(name, "is missing")
        pairs, report = read_pairs(
            rows,
            self._required_tokenizer(),
            max_seq_length=self._max_seq_length,
            on_overlong=self.args.on_overlong,
            name=name,
        )
        for document in itertools.chain.from_iterable(pairs):
            check_vocabulary(document, self.model.decoder.config.vocab_size)
        console.console.print(f"{name}: {report}", soft_wrap=True)
        return pairs

    def _loader(
        self, examples: Sequence[Pair], epochs: int, batch_size: int | None = None, accumulation: int | None = None
    ) -> PairLoader:
        args = self.args
        return PairLoader(
            examples,
            batch_size=batch_size or args.per_device_train_batch_size,
            accumulation=accumulation or args.gradient_accumulation_steps,
            max_seq_length=self._max_seq_length,
            packing=args.packing,
            seed=args.seed,
            epochs=epochs,
        )

    def _job(self, loader: PairLoader, total_steps: int) -> trainer.Job:
        if self.args.precompute_ref_log_probs and self.args.loss().needs_reference:
            loader.reference = precompute(self.model.decoder, loader)
        return super()._job(loader, total_steps)

    @cached_property
    def _loss_function(self) -> Any:
        return partial(losses.preference, settings=self.args.loss())

    def _announce(self, loader: PairLoader, example: Pair, total_steps: int) -> None:
        super()._announce(loader, example.chosen, total_steps)


def precompute(decoder: Any, loader: PairLoader) -> Pairs:
    """The log-probabilities of the loader's pairs under the decoder without its adapters, float32 [pairs] each."""
    graphdef, params = nnx.split(decoder)
    found = np.zeros((2, len(loader.pairs)), np.float32)
    steps = range(loader.steps_per_epoch)
    for step in console.track(steps, "reference log-probabilities", len(steps)):
        places = loader.indices(step)
        values = np.stack(jax.device_get(_reference(graphdef, params, loader[step])))
        found[:, places[places >= 0]] = values[:, places >= 0]
    return Pairs(*found)


@partial(jax.jit, static_argnames="graphdef")
def _reference(graphdef: nnx.GraphDef, params: nnx.State, batch: PairBatch) -> Pairs:
    """Of a batch [A, B, ...]: [A, B, P] each."""
    return jax.lax.map(lambda micro: reference_log_probs(nnx.merge(graphdef, params), micro), batch)
