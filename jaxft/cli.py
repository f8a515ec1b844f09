"""`jaxft sft`, `jaxft generate`, `jaxft plan`, `jaxft demo`: the Python API's own dataclasses as flags.

A YAML file given by ``--config`` holds the same names as the flags (``learning_rate: 1e-3``); flags win over it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from json import dumps as to_json
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
from jaxft.lora import LoraConfig
from jaxft.models.remat import parse_remat
from jaxft.optim import Optimizer, optimizer
from jaxft.plan import abstract_model
from jaxft.plan import plan as memory_plan
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
      target_modules: names of the linears to adapt.
      use_rslora: scale by 1/sqrt(r) instead of 1/r.
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
    save: tuple[SaveMethod, ...] = (),
    gguf: tuple[str, ...] = (),
) -> None:
    """Fine-tune a model with LoRA or QLoRA on a file of rows.

    Args:
      model: the model.
      data: a .jsonl or .json file of messages, prompt/completion or text rows.
      lora: the adapter.
      train: the run.
      save: merged checkpoints to write beside the adapter.
      gguf: quantizations of GGUF files to write, for example q8_0.
    """
    check_gguf_quantizations(gguf)
    language_model = model.load()
    FastLanguageModel.get_peft_model(language_model, **dataclasses.asdict(lora))
    SFTTrainer(language_model, train_dataset=data, args=train).train()
    output_dir = Path(train.output_dir)
    overwrite = train.overwrite_output_dir
    language_model.save_pretrained(output_dir / "adapter", overwrite=overwrite)
    for method in save:
        language_model.save_pretrained_merged(output_dir / method, save_method=method, overwrite=overwrite)
    if gguf:
        language_model.save_pretrained_gguf(output_dir / "gguf", quantization_method=gguf, overwrite=overwrite)


def generate(
    model: ModelConfig,
    prompt: tuple[str, ...],
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_strings: tuple[str, ...] = (),
    seed: int = 0,
    chat: bool = True,
    stream: bool = False,
) -> None:
    """Print a model's answers to one or more prompts.

    Args:
      model: the model, or an adapter of it.
      prompt: one text for each answer.
      max_new_tokens: at most so many for each.
      do_sample: draw tokens instead of taking the most likely ones.
      temperature: of the drawing.
      top_k: draw from the k most likely tokens; 0 is all.
      top_p: draw from the most likely tokens that together reach this probability.
      min_p: draw from the tokens that are at least so many times as likely as the most likely one.
      repetition_penalty: make tokens that were there before less likely; 1 is off.
      stop_strings: texts that end an answer.
      seed: of the drawing.
      chat: put each prompt into the tokenizer's chat template as the user's turn.
      stream: print the answer to a single prompt while it is made.
    """
    if stream and len(prompt) > 1:
        raise JaxftError("stream", "prints one answer while it is made", "Give one prompt")
    language_model = model.load()
    answers = language_model.answer(
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_strings=stop_strings,
        seed=seed,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2 for any problem in what the user gave)."""
    return run_command(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> None:
    enable_compilation_cache()
    tyro.extras.subcommand_cli_from_dict(
        {"sft": sft, "generate": generate, "plan": plan, "models": models, "demo": demo},
        args=expand_config(argv),
        prog="jaxft",
        description="Fine-tune language models in JAX: exact LoRA and QLoRA, and everything around it. "
        "With --config FILE, a YAML file fills in flags that are not given.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )


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
