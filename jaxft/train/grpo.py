"""Group-relative policy optimisation (arXiv:2402.03300) and its relatives, behind TRL's names.

A rollout draws num_generations completions of each of a few prompts with the current weights, reward functions judge
them, and num_iterations optimisation steps follow on it. One model: rollouts run on the weights that train, and the
reference of the KL term is the model with its adapter switched off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from jaxft import console, losses
from jaxft.data.batch import Example, PolicyBatch, lay_out
from jaxft.data.sources import read_objects
from jaxft.errors import JaxftError
from jaxft.files import new_file, prepare_output_dir
from jaxft.generate import Completions, complete
from jaxft.generation.sampling import Sampling
from jaxft.losses.policy import Level, LossType, PolicyLoss, ScaleRewards
from jaxft.models.decoder import Decoder
from jaxft.train import reporting, rewards, trainer
from jaxft.train.arguments import known_names_only
from jaxft.train.metrics import MetricsLog, read_rows
from jaxft.train.rewards import RewardFunction
from jaxft.train.sft import Rows, SFTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxft.api import LanguageModel


_ROW_MULTIPLE = 16  # rows are a multiple of so many tokens
SUMMARY, COMPLETIONS = "rollouts.jsonl", "completions.jsonl"


@known_names_only
@dataclasses.dataclass(frozen=True)
class GRPOConfig(SFTConfig):
    """Settings of a run, spelt as TRL spells them; those of SFTConfig as they are there.

    packing, assistant_only_loss and on_overlong have no meaning here, and LoRA dropout stays off: a ratio of
    probabilities must not see its noise.

    Attributes:
      learning_rate: the highest of the schedule.
      per_device_train_batch_size: completions in a micro-batch; times gradient_accumulation_steps, those of a rollout.
      num_generations: completions of each prompt; divides those of a rollout.
      num_iterations: optimisation steps on each rollout.
      max_completion_length: tokens that a completion has at most.
      temperature: of the drawing; see `jaxft.generate.Sampling`, also for the next four.
      top_k: draw from the k most likely tokens; 0 is all.
      top_p: draw from the most likely tokens that together reach this probability.
      min_p: draw from the tokens that are at least so many times as likely as the most likely one.
      repetition_penalty: make tokens that were there before less likely; 1 is off.
      generation_batch_size: completions that are decoded at once.
      reward_weights: of the reward functions' sum; None weighs each 1.
      scale_rewards: what advantages are divided by; see `jaxft.losses.advantages`.
      loss_type: how tokens are averaged and clipped; see `jaxft.losses.PolicyLoss`, also for the next five.
      importance_sampling_level: ratios of each token, or of whole sequences.
      epsilon: how far below 1 a ratio counts.
      epsilon_high: how far above 1; None is epsilon.
      delta: the highest ratio where the advantage is negative; None has none.
      beta: factor of the KL divergence from the model without its adapter.
      mask_truncated_completions: learn nothing from completions that max_completion_length ended.
      reward_timeout_s: how long a reward function may take for a rollout; None has no limit.
      on_reward_error: what a reward function's failure does: "stop" ends the run, "skip" says so and learns nothing
        from that rollout.
      num_completions_to_print: of each logged rollout.
    """

    learning_rate: float = 1e-6
    per_device_train_batch_size: int = 8
    num_generations: int = 8
    num_iterations: int = 1
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    generation_batch_size: int = 64
    reward_weights: tuple[float, ...] | None = None
    scale_rewards: ScaleRewards = "group"
    loss_type: LossType = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    mask_truncated_completions: bool = False
    reward_timeout_s: float | None = None
    on_reward_error: Literal["stop", "skip"] = "stop"
    num_completions_to_print: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "num_iterations", "max_completion_length"):
            if getattr(self, name) < 1:
                raise JaxftError(name, f"must be at least 1, not {getattr(self, name)}")
        if self.num_generations < 2 or self.completions % self.num_generations:
            raise JaxftError(
                "num_generations",
                f"is {self.num_generations}: it must be at least 2, and divide the {self.completions} completions of a "
                "rollout (per_device_train_batch_size x gradient_accumulation_steps)",
            )
        for name in ("neftune_noise_alpha", "dataset_text_field", "streaming"):
            if getattr(self, name):
                raise JaxftError(name, "has no meaning for GRPO", "Leave it out")
        if self.eval_strategy != "no":
            raise JaxftError("eval_strategy", "GRPO evaluates nothing; the rewards are logged", "Leave it out")
        self.loss()  # checks its settings
        self.sampling()

    @property
    def completions(self) -> int:
        """Completions of a rollout."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def loss(self) -> PolicyLoss:
        """The loss that these settings describe."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(PolicyLoss)}
        return PolicyLoss(**shared)

    def sampling(self) -> Sampling:
        """How these settings draw tokens."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


class Prompt(NamedTuple):
    """A row: its name, what the data set holds as its prompt, the prompt's tokens, and its other columns."""

    where: str
    prompt: Any
    tokens: list[int]
    columns: dict[str, Any]


class Rollout(NamedTuple):
    """Completions of a few prompts, N in all: their texts as reward functions see them, and what these said.

    rewards is float64 [N, functions], or None where one failed and the run goes on.
    """

    prompts: list[Prompt]
    drawn: Completions
    texts: list[str]
    rewards: np.ndarray | None


class GRPOTrainer:
    """Trains a `LanguageModel` on rows with a "prompt", a string or messages, by what reward functions make of answers.

    Args:
      model: from `FastLanguageModel`; its decoder is trained in place.
      reward_funcs: one or several. Each is called once a rollout with keyword arguments that are lists of as many
        entries as there are completions: prompts, completions (texts, or [{"role": "assistant", "content": text}] where
        the prompt is messages), completion_ids, and the data set's other columns. It returns a number for each.
      args: the settings.
      train_dataset: rows, or a .jsonl or .json file of them.
      tokenizer: None takes the model's.
      callbacks: called with a `jaxft.train.trainer.TrainState` after every step.

    A run leaves, beside what `jaxft.train.trainer.run` does, rollouts.jsonl (rewards, lengths, what was counted),
    completions.jsonl (every completion with its rewards) and curves.png.

    Raises:
      JaxftError: rows without a prompt, with a column too few or a prompt too long; a reward function that asks for a
        column that is not there, or that fails, under on_reward_error="stop".
    """

    def __init__(
        self,
        model: LanguageModel,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: GRPOConfig = GRPOConfig(),
        train_dataset: Rows | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[trainer.Callback] = (),
    ) -> None:
        self.model = model
        self.args = args
        self.functions = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
        self.tokenizer: Any = tokenizer or model.tokenizer
        self.callbacks = callbacks
        if self.tokenizer is None:
            raise JaxftError("tokenizer", "the model has none", "Pass one to GRPOTrainer")
        if args.beta and not model.lora_config:
            what = "compares with the model without its adapter, and there is none"
            raise JaxftError("beta", what, "Call get_peft_model first, or set beta=0")
        self._weights = np.asarray(args.reward_weights or [1.0] * len(self.functions))
        if len(self._weights) != len(self.functions):
            raise JaxftError("reward_weights", f"has {len(self._weights)} for {len(self.functions)} reward functions")
        if train_dataset is None:
            raise JaxftError("train_dataset", "is missing")
        self.prompts = self._read(train_dataset)
        rewards.check_columns(self.functions, list(self.prompts[0].columns))
        longest = max(len(prompt.tokens) for prompt in self.prompts) + args.max_completion_length
        self._row_length = -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE
        self.known_ids = 1 + max(self.tokenizer.get_vocab().values())
        self._decoder: Decoder = model.decoder

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> trainer.TrainResult:
        """Runs the training; the model holds the new values afterwards, also when the run was interrupted.

        Args:
          resume_from_checkpoint: as the setting of that name, which it takes the place of.
        """
        args = self.args
        if resume_from_checkpoint is not None:
            args = dataclasses.replace(args, resume_from_checkpoint=str(resume_from_checkpoint))
        output_dir = prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir or args.resumes)
        rollouts_per_epoch = math.ceil(len(self.prompts) * args.num_generations / args.completions)
        total_steps = args.max_steps
        if total_steps <= 0:
            total_steps = args.num_train_epochs * rollouts_per_epoch * args.num_iterations
        self._decoder = self.model.decoder
        rollouts = _Rollouts(self, total_steps)
        job = trainer.Job(
            self.model.decoder,
            partial(losses.policy, settings=args.loss()),
            rollouts,
            total_steps,
            rollouts_per_epoch * args.num_iterations,
            callbacks=[self._remember, *self.callbacks],
            facts={
                "adapter": self.model.lora_config,
                "base model": Path(self.model.name).name,
                "prompts": self._digest,
            },
            save_multiple=args.num_iterations,
        )
        try:
            result = trainer.run(job, args)
            self.model.training = reporting.record(self, result)
        finally:
            rollouts.close()
        plot_curves(result.rows, rollouts.rows, output_dir / "curves.png")
        return result

    def rollout(self, decoder: Decoder, prompts: Sequence[Prompt], seed: int) -> Rollout:
        """Draws num_generations completions of each prompt and has them judged."""
        args = self.args
        drawn = complete(
            decoder,
            [prompt.tokens for prompt in prompts],
            max_new_tokens=args.max_completion_length,
            num_return_sequences=args.num_generations,
            eos_token_ids=self.model.eos_token_ids(),
            sampling=args.sampling(),
            seed=seed,
            batch_size=args.generation_batch_size,
            compact=True,
        )
        texts = [str(text) for text in self.tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)]
        repeated = [prompt for prompt in prompts for _ in range(args.num_generations)]
        return Rollout(repeated, drawn, texts, self._judge(repeated, drawn, texts))

    def batch(self, rollout: Rollout) -> PolicyBatch:
        """A rollout as [A, B, T], a completion a row; T holds any completion of any prompt, so nothing recompiles."""
        args, drawn = self.args, rollout.drawn
        examples = []
        for prompt, tokens in zip(rollout.prompts, drawn.tokens, strict=True):
            ids = np.asarray([*prompt.tokens, *tokens], np.int32)
            examples.append(Example(prompt.where, ids, np.arange(len(ids)) >= len(prompt.tokens)))
        text = lay_out(examples, [[i] for i in range(len(examples))], self._row_length).one_document_a_row()
        # With one step on each rollout, that step's policy is the rollout's own.
        old = _placed(drawn, text.loss_mask) if args.num_iterations > 1 else None
        if args.mask_truncated_completions:
            text.loss_mask[~np.asarray(drawn.finished)] = 0
        shape = (args.gradient_accumulation_steps, args.per_device_train_batch_size)
        batch = PolicyBatch(text, np.ones((len(examples), 1), np.float32), self._advantages(rollout)[:, None], old)
        return jax.tree.map(lambda x: x.reshape(*shape, x.shape[-1]), batch)

    def _remember(self, state: trainer.TrainState) -> None:
        """A callback: the next rollout, which comes before the next step, runs on these weights."""
        self._decoder = state.decoder

    @property
    def _digest(self) -> str:
        """Of the prompts, in their order."""
        return hashlib.sha256(repr([prompt.tokens for prompt in self.prompts]).encode()).hexdigest()[:16]

    def prompts_of(self, rollout: int) -> list[Prompt]:
        """The prompts of a rollout, counted from 0: epoch after epoch, each shuffled by (seed, epoch)."""
        each = self.args.completions // self.args.num_generations
        found = []
        for place in range(rollout * each, (rollout + 1) * each):
            epoch, place = divmod(place, len(self.prompts))
            order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.prompts))
            found.append(self.prompts[order[place]])
        return found

    def next_rollout(self, number: int) -> Rollout:
        """The rollout of that number, counted from 0, with the weights of the last step."""
        return self.rollout(self._decoder, self.prompts_of(number), seed=self.args.seed + number)

    def _judge(self, prompts: Sequence[Prompt], drawn: Completions, texts: Sequence[str]) -> np.ndarray | None:
        """float64 [N, functions]; None where a function failed and that is to be skipped."""
        arguments: dict[str, list[Any]] = {
            **{name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns},
            "prompts": [prompt.prompt for prompt in prompts],
            "completions": [_as_completion(p.prompt, text) for p, text in zip(prompts, texts, strict=True)],
            "completion_ids": drawn.tokens,
        }
        rows = [prompt.where for prompt in prompts]
        try:
            found = [rewards.call(f, arguments, rows, self.args.reward_timeout_s) for f in self.functions]
        except JaxftError as error:
            if self.args.on_reward_error == "stop":
                raise
            console.warn(f"{error}. Nothing is learnt from this rollout")
            return None
        return np.stack(found, axis=1)

    def totals(self, rollout: Rollout) -> np.ndarray | None:
        """The weighted rewards, float64 [prompts, num_generations]."""
        if rollout.rewards is None:
            return None
        return (rollout.rewards @ self._weights).reshape(-1, self.args.num_generations)

    def _advantages(self, rollout: Rollout) -> np.ndarray:
        """float32 [N]; 0 where no reward is known."""
        totals = self.totals(rollout)
        if totals is None:
            return np.zeros(len(rollout.texts), np.float32)
        return losses.advantages(totals, self.args.scale_rewards).ravel()

    def _read(self, rows: Rows) -> list[Prompt]:
        prompts: list[Prompt] = []
        for where, row in read_objects(rows, "train_dataset"):
            if not isinstance(row, Mapping) or "prompt" not in row:
                raise JaxftError(where, "has no 'prompt'", 'Expected {"prompt": ..., and the columns of your rewards}')
            columns = {str(name): value for name, value in row.items() if name != "prompt"}
            missing = set(prompts[0].columns if prompts else columns) - set(columns)
            if missing:
                raise JaxftError(where, f"has no {' and no '.join(map(repr, sorted(missing)))}, as the first row has")
            tokens = self._tokens(row["prompt"], where)
            room = (self.args.max_seq_length or self.model.max_seq_length) - self.args.max_completion_length
            if len(tokens) > room:
                what = f"its prompt has {len(tokens)} tokens; max_seq_length leaves {room} beside the completion"
                raise JaxftError(where, what, "Raise max_seq_length, lower max_completion_length, or leave it out")
            prompts.append(Prompt(where, row["prompt"], tokens, columns))
        return prompts

    def _tokens(self, prompt: Any, where: str) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if not isinstance(prompt, list) or not prompt:
            raise JaxftError(where, "'prompt' is neither a string nor a list of messages")
        if not self.tokenizer.chat_template:
            raise JaxftError(where, "has messages, but the tokenizer has no chat template", "Give prompts as strings")
        return list(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def _placed(drawn: Completions, loss_mask: np.ndarray) -> np.ndarray:
    """The rollout's log-probabilities where the completions' tokens are targets: float32 [N, T], 0 elsewhere."""
    result = np.zeros(loss_mask.shape, np.float32)
    values = np.asarray(drawn.log_probs)
    for i, tokens in enumerate(drawn.tokens):
        result[i, loss_mask[i] != 0] = values[i, : len(tokens)]
    return result


def _as_completion(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


class _Rollouts:
    """The batches of a run, each rollout's num_iterations times, and the logs of the rollouts.

    An iterator of its own kind: a batch depends on the weights of the step before it. Its state is a number, so it can
    go on only where a rollout ends.
    """

    def __init__(self, owner: GRPOTrainer, total_steps: int) -> None:
        self.owner = owner
        self.args = owner.args
        self.names = [rewards.name_of(f) for f in owner.functions]
        self.rows: list[dict[str, Any]] = []
        self._total = total_steps
        self._step = 0
        self._batch: PolicyBatch | None = None
        self._summary: MetricsLog | None = None
        self._completions: MetricsLog | None = None

    def __iter__(self) -> _Rollouts:
        return self

    def __next__(self) -> PolicyBatch:
        if self._step == self._total:
            raise StopIteration
        if self._batch is None or self._step % self.args.num_iterations == 0:
            rollout = self.owner.next_rollout(self._step // self.args.num_iterations)
            self.write(self._step + 1, rollout, self.owner.totals(rollout))
            self._batch = self.owner.batch(rollout)
        self._step += 1
        return self._batch

    def get_state(self) -> dict[str, int]:
        """How many batches were taken."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on after so many batches."""
        self._step = state["step"]
        self.rows = [row for row in read_rows(Path(self.args.output_dir) / SUMMARY) if row["step"] <= self._step]

    def _open(self) -> tuple[MetricsLog, MetricsLog]:
        """The logs; what they hold of rollouts that come again goes."""
        if self._summary is None or self._completions is None:
            folder = Path(self.args.output_dir)
            self._summary = MetricsLog(folder / SUMMARY, resume_at=self._step)
            self._completions = MetricsLog(folder / COMPLETIONS, resume_at=self._step)
        return self._summary, self._completions

    def write(self, step: int, rollout: Rollout, totals: np.ndarray | None) -> None:
        """Notes the rollout whose first optimisation step is `step`."""
        summary, completions = self._open()
        row = {"step": step, **self._statistics(rollout, totals)}
        self.rows.append(row)
        summary.write(row)
        samples = [
            (prompt.where, text, None if totals is None else float(totals.flat[i]))
            for i, (prompt, text) in enumerate(zip(rollout.prompts, rollout.texts, strict=True))
        ]
        for where, text, reward in samples:
            completions.write({"step": step, "row": where, "completion": text, "reward": reward})
        shown = samples[: self.args.num_completions_to_print]
        if shown and (len(self.rows) - 1) % self.args.logging_steps == 0:
            console.console.print(console.table(f"step {step}", ("row", "completion", "reward"), shown))

    def close(self) -> None:
        """Closes the files."""
        for log in (self._summary, self._completions):
            if log is not None:
                log.close()

    def _statistics(self, rollout: Rollout, totals: np.ndarray | None) -> dict[str, Any]:
        lengths = [len(tokens) for tokens in rollout.drawn.tokens]
        found: dict[str, Any] = {
            "completions/mean_length": float(np.mean(lengths)),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": 1 - float(np.mean(rollout.drawn.finished)),
            "completions/unknown_ids": sum(t >= self.owner.known_ids for ts in rollout.drawn.tokens for t in ts),
            "generation/utilisation": rollout.drawn.utilisation,
        }
        if totals is None or rollout.rewards is None:
            return {**found, "reward": None}
        spread = totals.std(axis=1)
        found |= {"reward": float(totals.mean()), "reward_std": float(spread.mean())}
        found["frac_reward_zero_std"] = float(np.mean(spread == 0))  # groups that teach nothing
        means = rollout.rewards.mean(axis=0)
        return found | {f"rewards/{name}": float(mean) for name, mean in zip(self.names, means, strict=True)}


def plot_curves(steps: Sequence[dict[str, Any]], rollouts: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws reward and length of the rollouts, entropy and KL of the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = [("reward", rollouts), ("completions/mean_length", rollouts), ("entropy", steps), ("kl", steps)]
    for axes, (name, rows) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="." if len(points) < 60 else None)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    with new_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    console.wrote(path)
