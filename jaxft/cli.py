"""`jaxft sft`, `dpo`, `grpo`, `eval`, `generate`, `plan`, `demo`: the Python API's own dataclasses as flags.

A YAML file given by ``--config`` holds the same names as the flags (``learning_rate: 1e-3``); flags win over it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from json import dumps as to_json
from math import exp
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxft import demo as demo_module
from jaxft.api import (
    FastLanguageModel,
    LanguageModel,
    SaveMethod,
    check_gguf_quantizations,
    checkpoint_config,
    supported_models,
)
from jaxft.compilation_cache import enable_compilation_cache
from jaxft.console import console, run_command, table
from jaxft.errors import JaxftError
from jaxft.generation.sampling import GenerationConfig
from jaxft.lora import LoraConfig
from jaxft.models.remat import parse_remat
from jaxft.optim import Optimizer, optimizer
from jaxft.plan import abstract_model
from jaxft.plan import plan as memory_plan
from jaxft.train import evaluation
from jaxft.train.arguments import ALIASES, TrainingArguments
from jaxft.train.dpo import DPOConfig, DPOTrainer
from jaxft.train.grpo import GRPOConfig, GRPOTrainer
from jaxft.train.sft import SFTConfig, SFTTrainer


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded.

    Attributes:
      model_name: a folder (Hugging Face, Orbax or a PEFT adapter), a .gguf file, or a name on the hub.
      dtype: of activations and of what is not quantized; None is bfloat16 on a GPU and float32 on a CPU.
      load_in_4bit: keep the linears of the layers in NF4.
    """

    model_name: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    load_in_4bit: bool = True

    def load(self) -> LanguageModel:
        """The model with its tokenizer."""
        return FastLanguageModel.from_pretrained(self.model_name, dtype=self.dtype, load_in_4bit=self.load_in_4bit)[0]


@dataclasses.dataclass(frozen=True)
class AdapterConfig(LoraConfig):
    """The adapter that is trained.

    Attributes:
      r: rank.
      lora_alpha: numerator of the scale.
      lora_dropout: probability of dropping a value of the adapter's input in training.
      target_modules: names of the linears to adapt, one regular expression for paths, or all-linear.
      use_rslora: scale by 1/sqrt(r) instead of 1/r.
      use_dora: the magnitude of each row of the adapted weight trains by itself.
      bias: which biases train as well: none, all, or lora_only, those of adapted modules.
      modules_to_save: names of modules that train whole: embed_tokens, lm_head, norms.
      exclude_modules: names of modules not to adapt.
      layers_to_transform: numbers of the layers to adapt; None is all.
      rank_pattern: r of some modules, by a regular expression for the end of a path.
      alpha_pattern: lora_alpha of some modules, likewise.
      init_lora_weights: what the factors start from: True, gaussian, pissa, pissa_niter_N, olora or loftq.
      ensure_weight_tying: a head that is the embedding stays so where the embedding trains whole.
      use_gradient_checkpointing: what a layer keeps for its backward pass: auto, none, full, offload, or names.
      random_state: seed of the initial values.
    """

    use_gradient_checkpointing: str = "offload"
    random_state: int = 3407


def sft(
    model: ModelConfig,
    data: Path,
    lora: AdapterConfig = AdapterConfig(),
    train: SFTConfig = SFTConfig(),
    eval_data: Path | None = None,
    save: tuple[SaveMethod, ...] = (),
    gguf: tuple[str, ...] = (),
) -> None:
    """Fine-tune a model with LoRA or QLoRA on a file of rows.

    Args:
      model: the model.
      data: a .jsonl or .json file of messages, prompt/completion or text rows.
      lora: the adapter.
      train: the run.
      eval_data: the same for evaluations during the run; see eval_strategy.
      save: merged checkpoints to write beside the adapter.
      gguf: quantizations of GGUF files to write, for example q8_0.
    """
    check_gguf_quantizations(gguf)
    language_model = model.load()
    FastLanguageModel.get_peft_model(language_model, **dataclasses.asdict(lora))
    SFTTrainer(language_model, train_dataset=data, args=train, eval_dataset=eval_data).train()
    output_dir = Path(train.output_dir)
    overwrite = may_replace(train)
    language_model.save_pretrained(output_dir / "adapter", overwrite=overwrite)
    for method in save:
        language_model.save_pretrained_merged(output_dir / method, save_method=method, overwrite=overwrite)
    if gguf:
        language_model.save_pretrained_gguf(output_dir / "gguf", quantization_method=gguf, overwrite=overwrite)


def dpo(
    model: ModelConfig,
    data: Path,
    lora: AdapterConfig = AdapterConfig(),
    train: DPOConfig = DPOConfig(),
) -> None:
    """Train an adapter on preferences: rows of prompt, chosen and rejected.

    Args:
      model: the model.
      data: a file of rows.
      lora: the adapter.
      train: the run.
    """
    language_model = model.load()
    FastLanguageModel.get_peft_model(language_model, **dataclasses.asdict(lora))
    DPOTrainer(language_model, train_dataset=data, args=train).train()
    language_model.save_pretrained(Path(train.output_dir) / "adapter", overwrite=may_replace(train))


def grpo(
    model: ModelConfig,
    task: str | None = None,
    task_size: int = 500,
    answers: Path | None = None,
    lora: AdapterConfig = AdapterConfig(),
    train: GRPOConfig = GRPOConfig(),
) -> None:
    """Train an adapter on the rewards of a verifiable task.

    Args:
      model: the model.
      task: one of reasoning-gym's generators, which scores the answers.
      task_size: so many of its items.
      answers: a file of rows of question and answer; right is the same text.
      lora: the adapter.
      train: the run.
    """
    rows, reward = evaluation.rewarded(questions_of(task, task_size, answers, train.seed))
    language_model = model.load()
    FastLanguageModel.get_peft_model(language_model, **dataclasses.asdict(lora))
    GRPOTrainer(language_model, reward, train, rows).train()
    language_model.save_pretrained(Path(train.output_dir) / "adapter", overwrite=may_replace(train))


def questions_of(task: str | None, task_size: int, answers: Path | None, seed: int) -> list[evaluation.Question]:
    """Those of a task and those of a file, where they are given.

    Raises:
      JaxftError: neither is given, or see `evaluation.task_questions` and `evaluation.file_questions`.
    """
    if task is None and answers is None:
        raise JaxftError("task", "there are no questions", "Give --task or --answers")
    questions = evaluation.task_questions(task, task_size, seed) if task else []
    return questions + (evaluation.file_questions(answers) if answers else [])


def may_replace(args: TrainingArguments) -> bool:
    """Whether what a run of these settings left before may be replaced."""
    return args.overwrite_output_dir or args.resumes


def evaluate(
    model: ModelConfig,
    data: Path | None = None,
    task: str | None = None,
    task_size: int = 100,
    answers: Path | None = None,
    max_seq_length: int = 2048,
    stride: int | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Print a model's perplexity of a text or data set, or how many answers to a verifiable task are exactly right.

    Args:
      model: a base model, an adapter or a merged model.
      data: a .txt file, read as one text, or a file of rows, of which the trained tokens count.
      task: one of reasoning-gym's generators, which scores the answers.
      task_size: so many of its items.
      answers: a file of rows of question and answer; right is the same text.
      max_seq_length: tokens of a window of a text, and at most of a row.
      stride: tokens from one window of a text to the next; None is half a window.
      max_new_tokens: at most so many for each answer.
      seed: of the task's items.
      json: print one JSON line.
    """
    if data is None and task is None and answers is None:
        raise JaxftError("jaxft eval", "has nothing to evaluate", "Give --data, --task or --answers")
    language_model = model.load()
    found: dict[str, Any] = {}
    if data is not None and data.suffix == ".txt":
        text = read_text(data)
        window = evaluation.text_perplexity(
            language_model, text, str(data), window=max_seq_length, stride=stride or max(max_seq_length // 2, 1)
        )
        found |= window._asdict()
    elif data is not None:
        args = SFTConfig(max_seq_length=max_seq_length)
        rows = SFTTrainer(language_model, args=args).evaluate(data)
        found |= {"perplexity": exp(rows["eval_loss"]), "loss": rows["eval_loss"], "tokens": int(rows["eval_tokens"])}
    if task or answers:
        questions = questions_of(task, task_size, answers, seed)
        score = evaluation.accuracy(language_model, questions, max_new_tokens=max_new_tokens)
        found |= {name: value for name, value in score._asdict().items() if name != "answers"}
    if json:
        print(to_json(found))
    else:
        console.print(table(model.model_name, ("what", "value"), found.items()))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
      JaxftError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise JaxftError(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise JaxftError(path, f"is not UTF-8: {error}") from error


def generate(
    model: ModelConfig,
    prompt: tuple[str, ...],
    settings: GenerationConfig = GenerationConfig(),
    chat: bool = True,
    stream: bool = False,
) -> None:
    """Print a model's answers to one or more prompts.

    Args:
      model: the model, or an adapter of it.
      prompt: one text for each answer.
      settings: how they are made.
      chat: put each prompt into the tokenizer's chat template as the user's turn.
      stream: print the answer to a single prompt while it is made.
    """
    if stream and len(prompt) > 1:
        raise JaxftError("stream", "prints one answer while it is made", "Give one prompt")
    language_model = model.load()
    answers = language_model.answer(
        prompt,
        chat=chat,
        **dataclasses.asdict(settings),
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if stream else None,
    )
    for text in [""] if stream else answers:
        print(text)


def plan(
    model: str,
    batch: int = 2,
    seq: int = 2048,
    quantization: Literal["nf4", "none"] = "nf4",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    r: int = 16,
    optim: Optimizer = "adamw_8bit",
    remat: str = "offload",
    json: bool = False,
) -> None:
    """Print what a LoRA step would need of a GPU's memory, part by part; needs no GPU and reads no weights.

    Args:
      model: a folder, file or hub name of a checkpoint; only its configuration is used.
      batch: rows of a micro-batch.
      seq: tokens a row.
      quantization: of the linears of the layers.
      dtype: of activations and of what is not quantized.
      r: rank of the adapters, on all linears.
      optim: the optimizer.
      remat: the policy, as of use_gradient_checkpointing.
      json: print bytes as one JSON line instead of a table.
    """
    decoder = abstract_model(
        checkpoint_config(model), dtype, LoraConfig(r=r), None if quantization == "none" else quantization
    )
    found = memory_plan(decoder, optimizer(optim, 1e-4), rows=batch, length=seq, remat=parse_remat(remat))
    if json:
        print(to_json({**found._asdict(), "peak": found.peak}))
    else:
        console.print(table(f"{model}: {batch} x {seq} tokens, remat {remat}", ("part", "GiB"), found.rows()))


def models(markdown: bool = False) -> None:
    """List the supported architectures, and what of each was compared with whom.

    Args:
      markdown: print the table of the README.
    """
    titles, rows, text = supported_models()
    if markdown:
        print(text)
    else:
        console.print(table("supported architectures", titles, rows))


def demo(output_dir: Path = Path("demo_output"), overwrite: bool = True) -> None:
    """Fine-tune a packaged 135M model on a verifiable task, measure it before and after, and export it.

    Args:
      output_dir: gets the adapter, the merged checkpoint, the GGUF file, the metrics and the plot.
      overwrite: replace what an earlier demo wrote there.
    """
    demo_module.run(output_dir, overwrite=overwrite)


COMMANDS = {
    "sft": sft, "dpo": dpo, "grpo": grpo, "eval": evaluate, "generate": generate, "plan": plan, "models": models,
    "demo": demo,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2 for any problem in what the user gave)."""
    return run_command(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> None:
    enable_compilation_cache()
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=[renamed(argument) for argument in expand_config(argv)],
        prog="jaxft",
        description="Fine-tune language models in JAX: exact LoRA and QLoRA, and everything around it. "
        "With --config FILE, a YAML file fills in flags that are not given.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )


def renamed(argument: str) -> str:
    """A flag of another trainer under our name; anything else as it is."""
    flag, *value = argument.split("=", 1)
    name = flag.removeprefix("--").replace("-", "_")
    if not flag.startswith("--") or name not in ALIASES:
        return argument
    return "=".join([f"--{ALIASES[name].replace('_', '-')}", *value])


def expand_config(argv: list[str]) -> list[str]:
    """Replaces ``--config FILE`` by the flags that the YAML file spells, in front of the others, which win."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        known, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise JaxftError("--config", "needs a file") from error
    return [*rest[:1], *config_flags(known.config), *rest[1:]] if known.config else rest


def config_flags(path: Path) -> list[str]:
    """The flags behind a YAML mapping of names to values; lists become several values, null leaves the default.

    Raises:
      JaxftError: a file that is missing, is not YAML, or is not a flat mapping.
    """
    import yaml

    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JaxftError(path, f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JaxftError(path, f"is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise JaxftError(path, "must be a mapping of setting names to values")
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            raise JaxftError(f"{path}, {name}", "is a mapping; settings are flat, as the command's flags are")
        if value is not None:
            flags += [f"--{str(name).replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return flags
