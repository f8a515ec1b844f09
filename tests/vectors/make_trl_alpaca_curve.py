"""Makes trl_alpaca_curve.json: the losses of a LoRA run of TRL and PEFT on alpaca_en_demo (needs torch, trl, peft).

    PYTHONPATH=.:tests python tests/vectors/make_trl_alpaca_curve.py

SmolLM2 in float32 on the CPU. TRL's own evaluation averages batches whatever their number of tokens, so the evaluation
loss is taken token by token here, a row at a time, after every EVAL_STEPS steps.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset

import alpaca_cases as cases
from converters.gguf_import import GGUFCheckpoint
from jaxft.fetch import SMOLLM2, fetch
from pinned import LLAMAFACTORY


def main() -> None:
    path = fetch(SMOLLM2)
    tokenizer = GGUFCheckpoint(path).tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(fetch(LLAMAFACTORY), folder, "gztar", filter="data")
        train, held_out = cases.rows(Path(folder), tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # Its weights were decoded while loading; transformers would still refuse to train what it calls quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    config = peft.LoraConfig(r=cases.R, lora_alpha=cases.ALPHA, target_modules=cases.TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").split(".lora_A")[0]
            parameter.data.copy_(torch.from_numpy(cases.first_values(tuple(parameter.shape), module)))
    curve = EvalCurve([tokens_of(row, tokenizer) for row in held_out])
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder, max_length=cases.MAX_LENGTH, gradient_checkpointing=False, bf16=False, use_cpu=True,
            report_to="none", save_strategy="no", train_sampling_strategy="sequential", **cases.TRAINING,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args, train_dataset=Dataset.from_list(train), processing_class=tokenizer, callbacks=[curve]
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    versions = {module.__name__: module.__version__ for module in (trl, peft, transformers, torch)}
    found = {"versions": versions, "loss": losses, "eval_loss": curve.losses, "eval_tokens": curve.tokens}
    Path(__file__).with_name("trl_alpaca_curve.json").write_text(json.dumps(found, indent=1) + "\n")


def tokens_of(row: dict[str, str], tokenizer: Any) -> tuple[list[int], int]:
    """A row's tokens with the end-of-sequence token, and how many of them are the prompt."""
    ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    return ids, len(tokenizer(row["prompt"])["input_ids"])


class EvalCurve(transformers.TrainerCallback):
    """Nats per completion token of the rows, before the run and after every EVAL_STEPS steps."""

    def __init__(self, rows: list[tuple[list[int], int]]) -> None:
        self.rows = rows
        self.losses: dict[int, float] = {}
        self.tokens = sum(len(ids) - n_prompt for ids, n_prompt in rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % cases.EVAL_STEPS == 0:
            self.measure(state.global_step, model)

    @torch.no_grad()
    def measure(self, step: int, model: Any) -> None:
        model.eval()
        total = 0.0
        for ids, n_prompt in self.rows:
            logits = model(torch.tensor([ids])).logits[0, n_prompt - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[n_prompt:]), reduction="sum").item()
        model.train()
        self.losses[step] = total / self.tokens
        print(f"step {step}: {self.losses[step]:.5f}", flush=True)


if __name__ == "__main__":
    main()
