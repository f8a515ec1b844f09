"""`jaxft demo`: the whole path on a real model, on a CPU, in minutes.

SmolLM2-135M-Instruct comes out of a package, is loaded in NF4, learns to reverse lists of words (a verifiable task of
reasoning-gym, which the model cannot do), is measured on held-out lists before and after, and goes out as a PEFT
adapter, a merged Hugging Face checkpoint and a GGUF file. It uses the public API only, so it doubles as an example.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft import console
from jaxft.api import FastLanguageModel, LanguageModel
from jaxft.errors import JaxftError
from jaxft.fetch import SMOLLM2, fetch
from jaxft.files import new_file, prepare_output_dir
from jaxft.train.sft import SFTConfig, SFTTrainer

TASK = "word_sequence_reversal"
PROMPT = "Reverse this list of words, answer with the list only: {words}"
TRAIN_SEED, HELD_OUT_SEED = 100_000, 900_000  # item i is drawn from seed + i, so the two never meet


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much the demo does; the defaults fit a 2-core CPU.

    Attributes:
      train_items: lists to learn from, each seen once.
      held_out_items: lists to measure on.
      max_seq_length: tokens in a packed row.
    """

    train_items: int = 560
    held_out_items: int = 200
    max_seq_length: int = 512


@dataclasses.dataclass(frozen=True)
class Score:
    """One measurement on the held-out items.

    Attributes:
      loss: nats per answer token.
      accuracy: share of answers that are exactly right.
      standard_error: of the accuracy.
      answers: the model's texts.
    """

    loss: float
    accuracy: float
    standard_error: float
    answers: list[str]


@dataclasses.dataclass(frozen=True)
class Task:
    """Items of reasoning-gym's generator, which also scores answers."""

    items: list[dict[str, Any]]
    dataset: Any

    @classmethod
    def make(cls, seed: int, size: int, without: Sequence[str] = ()) -> Task:
        """`size` items, less those whose words are in `without`.

        Raises:
          JaxftError: reasoning-gym is not installed.
        """
        try:
            import reasoning_gym
        except ImportError as error:
            raise JaxftError("jaxft demo", "needs reasoning-gym", "Install it: pip install 'jaxft[demo]'") from error
        dataset = reasoning_gym.create_dataset(TASK, seed=seed, size=size, min_words=3, max_words=5)
        items = [item for item in dataset if _words(item) not in set(without)]
        return cls(items, dataset)

    def rows(self) -> list[dict[str, Any]]:
        """The items as message rows."""
        return [
            {
                "messages": [
                    {"role": "user", "content": PROMPT.format(words=_words(item))},
                    {"role": "assistant", "content": item["answer"]},
                ]
            }
            for item in self.items
        ]

    def score(self, answers: Sequence[str]) -> tuple[float, float]:
        """Share of exactly right answers, and its standard error."""
        right = sum(self.dataset.score_answer(a, i) == 1.0 for a, i in zip(answers, self.items, strict=True))
        share = right / len(self.items)
        return share, math.sqrt(share * (1 - share) / len(self.items))


def _words(item: dict[str, Any]) -> str:
    return ", ".join(item["metadata"]["words"])


def run(output_dir: Path, *, overwrite: bool = False, budget: Budget = Budget()) -> dict[str, Any]:
    """Runs the demo and returns what it also writes to results.json.

    Raises:
      JaxftError: `output_dir` is not empty and not to be overwritten, or the model cannot be fetched.
    """
    started = time.perf_counter()
    output_dir = prepare_output_dir(output_dir, overwrite=overwrite)
    held_out = Task.make(HELD_OUT_SEED, budget.held_out_items)
    train = Task.make(TRAIN_SEED, budget.train_items, without=[_words(item) for item in held_out.items])

    model, tokenizer = FastLanguageModel.from_pretrained(fetch(SMOLLM2), budget.max_seq_length, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=False)
    settings = SFTConfig(
        output_dir=str(output_dir / "run"),
        overwrite_output_dir=overwrite,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        warmup_ratio=0.1,
    )
    trainer = SFTTrainer(model, tokenizer, train.rows(), settings, eval_dataset=held_out.rows())
    before = measure(model, trainer, held_out)
    trainer.train()
    after = measure(model, trainer, held_out)

    outputs = export(model, output_dir, overwrite=overwrite)
    results = {
        "task": TASK,
        "train_items": len(train.items),
        "held_out_items": len(held_out.items),
        **{f"{name}_{when}": getattr(score, name) for when, score in (("before", before), ("after", after))
           for name in ("loss", "accuracy", "standard_error")},
        "outputs": {name: str(path) for name, path in outputs.items()},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    with new_file(output_dir / "results.json", overwrite=True) as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    plot(output_dir / "run" / "metrics.jsonl", before, after, output_dir / "demo.png")
    report(held_out, before, after, outputs, results["seconds"])
    return results


def measure(model: LanguageModel, trainer: SFTTrainer, task: Task) -> Score:
    """Held-out loss, and the accuracy of greedy answers."""
    loss = trainer.evaluate()["eval_loss"]
    with console.console.status(f"answering {len(task.items)} held-out questions"):
        prompts = [row["messages"][0]["content"] for row in task.rows()]
        answers = model.answer(prompts, max_new_tokens=20, batch_size=100)
    accuracy, error = task.score(answers)
    return Score(loss, accuracy, error, answers)


def export(model: LanguageModel, output_dir: Path, *, overwrite: bool) -> dict[str, Path]:
    """Writes the three outputs."""
    return {
        "adapter": model.save_pretrained(output_dir / "adapter", overwrite=overwrite),
        "merged": model.save_pretrained_merged(output_dir / "merged", overwrite=overwrite),
        "gguf": model.save_pretrained_gguf(output_dir / "gguf", quantization_method="q8_0", overwrite=overwrite)[0],
    }


def plot(metrics: Path, before: Score, after: Score, path: Path) -> None:
    """The training loss beside the two accuracies, as a PNG."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(9, 4), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    curve.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker=".")
    curve.set(xlabel="step", ylabel="training loss (nats per answer token)", ylim=(0, None))
    curve.grid(alpha=0.3)
    scores = (before, after)
    bars.bar(("before", "after"), [100 * s.accuracy for s in scores], yerr=[100 * s.standard_error for s in scores],
             capsize=6, color=("tab:gray", "tab:green"))  # fmt: skip
    bars.set(ylabel="held-out lists reversed exactly (%)", ylim=(0, 100))
    with new_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    console.wrote(path)


def report(task: Task, before: Score, after: Score, outputs: dict[str, Path], seconds: float) -> None:
    """Prints what was learnt, two answers, and how to use what was written."""
    show = console.console.print
    show(console.table(
        f"{len(task.items)} held-out lists",
        ("", "loss (nats/token)", "exactly right"),
        [
            (when, f"{s.loss:.3f}", f"{s.accuracy:.1%} +- {s.standard_error:.1%}")
            for when, s in (("before", before), ("after", after))
        ],
    ))  # fmt: skip
    show(console.table(
        "two of them",
        ("words", "before", "after", "right answer"),
        [(_words(task.items[i]), before.answers[i], after.answers[i], task.items[i]["answer"]) for i in (0, 1)],
    ))  # fmt: skip
    show("what was written, and how to use it:")
    uses = {
        "adapter": "jaxft generate --model-name {} --prompt '...', or peft's PeftModel.from_pretrained",
        "merged": "AutoModelForCausalLM.from_pretrained('{}') in transformers",
        "gguf": "llama-cli -m {} in llama.cpp",
    }
    for name, path in outputs.items():
        show(f"  {name} ({console.size(console.tree_bytes(path))}): {uses[name].format(path)}", soft_wrap=True)
    show(f"the demo took {seconds:.0f} s")
