"""dpo_en_demo as a run that two trainers can make alike: rows, their order, settings; the adapter as in alpaca_cases.

The demo set's texts are long; a run in minutes on a CPU takes the last question and the first words of both answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxft.data.preference import PairLoader, read_pairs

WORDS = 16  # that are kept of an answer
MAX_LENGTH = 96  # tokens of a pair: both documents
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
BETA = 0.1
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "max_steps": 50,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
}
METRICS = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")


def rows(folder: Path, tokenizer: Any) -> list[dict[str, str]]:
    """As many prompts with two answers as the run has, from the unpacked package of `pinned.LLAMAFACTORY`."""
    (path,) = folder.glob("*/data/dpo_en_demo.json")
    needed = TRAINING["max_steps"] * TRAINING["per_device_train_batch_size"]
    found = []
    for row in json.loads(path.read_text()):
        prompt = f"### Question\n{row['conversations'][-1]['value']}\n\n### Answer\n"
        answers = {key: " ".join(row[key]["value"].split()[:WORDS]) for key in ("chosen", "rejected")}
        tokens = sum(len(tokenizer(prompt + answer)["input_ids"]) + 1 for answer in answers.values())
        if answers["chosen"] != answers["rejected"] and tokens <= MAX_LENGTH and len(found) < needed:
            found.append({"prompt": prompt, **answers})
    assert len(found) == needed
    return found


def in_order(rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, str]]:
    """The rows as DPOTrainer takes them with seed 0."""
    pairs, _ = read_pairs(rows, tokenizer, max_seq_length=MAX_LENGTH)
    batch_size = TRAINING["per_device_train_batch_size"]
    loader = PairLoader(pairs, batch_size=batch_size, max_seq_length=MAX_LENGTH, packing=False, seed=0)
    return [rows[i] for step in range(len(loader)) for i in loader.indices(step).ravel()]
