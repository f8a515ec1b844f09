"""alpaca_en_demo as a run that two trainers can make alike: rows, their order, settings and the adapter's first values.

The demo set has 999 rows; those that are short enough are used, the first to train on and the rest to evaluate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

MAX_LENGTH = 128  # tokens
EVAL_ROWS = 24
EVAL_STEPS = 6
R, ALPHA = 8, 16
TARGETS = ["q_proj", "v_proj"]
TRAINING = {
    "per_device_train_batch_size": 4,
    "max_steps": 24,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
}


def rows(folder: Path, tokenizer: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, evaluation rows) of prompt and completion, from the unpacked package of `pinned.LLAMAFACTORY`."""
    (path,) = folder.glob("*/data/alpaca_en_demo.json")
    found = []
    for row in json.loads(path.read_text()):
        question = "\n".join(text for text in (row["instruction"], row["input"]) if text)
        new = {"prompt": f"### Question\n{question}\n\n### Answer\n", "completion": row["output"]}
        if row["output"] and len(tokenizer(new["prompt"] + new["completion"])["input_ids"]) < MAX_LENGTH:
            found.append(new)
    n_train = TRAINING["max_steps"] * TRAINING["per_device_train_batch_size"]
    assert len(found) >= n_train + EVAL_ROWS
    return found[:n_train], found[-EVAL_ROWS:]


def first_values(shape: tuple[int, ...], name: str) -> np.ndarray:
    """float32 values of an adapter's A, from its name 'model.layers.3.self_attn.q_proj'; B is zero."""
    rng = np.random.default_rng(list(name.encode()))
    bound = shape[-1] ** -0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)
