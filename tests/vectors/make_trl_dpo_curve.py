"""Makes trl_dpo_curve.json: losses and rewards of a LoRA run of TRL and PEFT on dpo_en_demo (needs torch, trl, peft).

    PYTHONPATH=.:tests python tests/vectors/make_trl_dpo_curve.py

SmolLM2 in float32 on the CPU. The rows come in the order of `dpo_cases.in_order`, our loader's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import transformers
import trl
from datasets import Dataset

import dpo_cases as cases
from alpaca_cases import first_values
from converters.gguf_import import GGUFCheckpoint
from jaxft.fetch import SMOLLM2, fetch
from pinned import LLAMAFACTORY


def main() -> None:
    path = fetch(SMOLLM2)
    tokenizer = GGUFCheckpoint(path).tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(fetch(LLAMAFACTORY), folder, "gztar", filter="data")
        rows = cases.in_order(cases.rows(Path(folder), tokenizer), tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # Its weights were decoded while loading; transformers would still refuse to train what it calls quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    model = peft.get_peft_model(model, peft.LoraConfig(**cases.LORA, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").split(".lora_A")[0]
            parameter.data.copy_(torch.from_numpy(first_values(tuple(parameter.shape), module)))
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            output_dir=folder, beta=cases.BETA, max_length=cases.MAX_LENGTH, gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", train_sampling_strategy="sequential", **cases.TRAINING,
        )  # fmt: skip
        trainer = trl.DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    versions = {module.__name__: module.__version__ for module in (trl, peft, transformers, torch)}
    found = {"versions": versions, **{name: [row[name] for row in log] for name in cases.METRICS}}
    Path(__file__).with_name("trl_dpo_curve.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
