"""`python -m benchmarks.grpo_learning --model SmolLM2.gguf`: GRPO teaches a task of reasoning-gym, seed by seed.

SmolLM2-135M-Instruct continues questions after sums and differences of two numbers of one or two digits; a completion
is rewarded if the last number in it is the answer. For each seed one JSON line: the share of right greedy answers to
held-out questions before, after, and of the saved adapter loaded again; the same of drawn answers; each rollout's mean
reward. `--shuffle` is the negative control: the rewards of a rollout in a random order. `--size small` is what a CPU
does in minutes: numbers of one digit, and small rollouts.

A machine without reasoning-gym can read the problems (`--problems FILE`) that another wrote (`--write-problems FILE`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import FastLanguageModel, GRPOConfig, GRPOTrainer, LanguageModel
from jaxft.fetch import SMOLLM2, fetch
from jaxft.train.rewards import RewardFunction

TASK = "chain_sum"
CHOICES = ("max_steps", "learning_rate", "temperature")  # settings that may be given otherwise
SETTINGS = GRPOConfig(
    per_device_train_batch_size=256,
    num_generations=16,
    generation_batch_size=256,
    max_completion_length=12,
    max_seq_length=64,
    max_steps=200,
    learning_rate=2e-4,
    warmup_steps=5,
    lr_scheduler_type="constant_with_warmup",
    save_strategy="no",
    num_completions_to_print=0,
)


class Size(NamedTuple):
    """A run: how many digits the numbers have at most, how many problems there are, and settings."""

    max_digits: int
    train: int
    held_out: int
    settings: GRPOConfig


SIZES = {
    "full": Size(2, 2048, 256, SETTINGS),
    "small": Size(
        1,
        120,
        40,
        dataclasses.replace(
            SETTINGS,
            per_device_train_batch_size=32,
            num_generations=8,
            generation_batch_size=64,
            max_completion_length=6,
            max_steps=12,
            learning_rate=3e-4,
            temperature=0.7,
            warmup_steps=2,
        ),
    ),
}

Row = dict[str, Any]


class Problems(NamedTuple):
    """Rows {"prompt": text, "answer": text}; no question is in both."""

    train: list[Row]
    held_out: list[Row]

    @classmethod
    def make(cls, size: Size) -> Problems:
        """Out of reasoning-gym's generator, without repetitions."""
        import reasoning_gym

        numbers = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": size.max_digits}
        items = reasoning_gym.create_dataset(TASK, seed=0, size=10 * (size.train + size.held_out), **numbers)
        answers = {item["question"]: item["answer"] for item in items}
        rows = [{"prompt": f"{q}\nAnswer:", "answer": a} for q, a in answers.items()]
        assert len(rows) >= size.train + size.held_out
        return cls(rows[size.held_out :][: size.train], rows[: size.held_out])


def is_right(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 where the last number in a completion is the answer."""
    numbers = (re.findall(r"-?\d+", text) for text in completions)
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer, strict=True)]


def shuffled(reward: RewardFunction, seed: int) -> RewardFunction:
    """The negative control: a function's rewards in a random order."""
    rng = np.random.default_rng(seed)

    def is_right_somewhere(**arguments: Any) -> list[float]:
        return rng.permutation(reward(**arguments)).tolist()

    return is_right_somewhere


def accuracy(model: LanguageModel, rows: Sequence[Row], settings: GRPOConfig, **drawing: Any) -> float:
    """The share of right answers: greedy ones, or drawn."""
    texts = model.answer(
        [row["prompt"] for row in rows],
        chat=False,
        max_new_tokens=settings.max_completion_length,
        batch_size=settings.generation_batch_size,
        **drawing,
    )
    return float(np.mean(is_right(texts, [row["answer"] for row in rows])))


def learn(path: Path, problems: Problems, settings: GRPOConfig, *, shuffle: bool = False) -> dict[str, Any]:
    """One run; what it found. `settings.output_dir` gets the run, and the adapter beside it."""
    started = time.perf_counter()
    load: dict[str, Any] = {"max_seq_length": settings.max_seq_length, "load_in_4bit": False}
    model, _ = FastLanguageModel.from_pretrained(path, **load)
    model = FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=32, random_state=settings.seed, use_gradient_checkpointing=False
    )

    def measured(model: LanguageModel, when: str) -> dict[str, float]:
        drawings: dict[str, dict[str, Any]] = {"": {}, "drawn_": {"do_sample": True}}
        return {f"{kind}{when}": accuracy(model, problems.held_out, settings, **how) for kind, how in drawings.items()}

    found: dict[str, Any] = measured(model, "before")
    reward = shuffled(is_right, settings.seed) if shuffle else is_right
    result = GRPOTrainer(model, reward, settings, problems.train).train()
    found |= measured(model, "after")
    adapter = model.save_pretrained(Path(settings.output_dir) / "adapter")
    reloaded, _ = FastLanguageModel.from_pretrained(adapter, **load)
    found |= measured(reloaded, "reloaded")
    lines = (Path(settings.output_dir) / "rollouts.jsonl").read_text().splitlines()
    return found | {
        "steps": result.steps,
        "train_s": round(result.metrics["train_runtime"], 1),
        "seconds": round(time.perf_counter() - started, 1),
        "rewards": [round(json.loads(line)["reward"], 3) for line in lines],
    }


def main() -> None:
    arguments = parse_arguments()
    size = SIZES[arguments.size]
    chosen = {name: getattr(arguments, name) for name in CHOICES if getattr(arguments, name) is not None}
    problems = Problems(**json.loads(arguments.problems.read_text())) if arguments.problems else Problems.make(size)
    if arguments.write_problems:
        arguments.write_problems.write_text(json.dumps(problems._asdict()))
        return
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            settings = dataclasses.replace(size.settings, output_dir=folder, seed=seed, **chosen)
            found = learn(arguments.model or fetch(SMOLLM2), problems, settings, shuffle=arguments.shuffle)
        record = {"kind": "grpo_learning", "task": TASK, "size": arguments.size, **chosen, "seed": seed}
        record |= {"shuffle": arguments.shuffle, **found}
        print(json.dumps(record | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.grpo_learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a GGUF file or folder of SmolLM2-135M-Instruct; fetched if not given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=SIZES, default="full")
    for name in CHOICES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(getattr(SETTINGS, name)))
    parser.add_argument("--shuffle", action="store_true", help="negative control: rewards in a random order")
    parser.add_argument("--problems", type=Path, help="read them from this file")
    parser.add_argument("--write-problems", type=Path, help="write them to this file, and do nothing else")
    return parser.parse_args()


if __name__ == "__main__":
    main()
