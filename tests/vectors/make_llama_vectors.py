"""Writes llama.safetensors and smollm2_lora.json: what torch and peft compute for tests/llama_cases.py.

Run from tests/ with the dev extra: PYTHONPATH=. python vectors/make_llama_vectors.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxft.fetch import SMOLLM2, fetch
from llama_cases import (
    ALPHA,
    CASES,
    RANK,
    SMOLLM2_LEARNING_RATE,
    STEPS,
    adapter,
    case_config,
    case_tokens,
    gradient_summary,
    smollm2_adapter,
    smollm2_tokens,
)
from tiny import random_tensors
from vectors import torch_reference as reference

HERE = Path(__file__).parent
LEARNING_RATE = 1e-3


def tiny_vectors() -> dict[str, np.ndarray]:
    """logits, adapter gradients and AdamW losses of every case."""
    found: dict[str, np.ndarray] = {}
    for case in CASES:
        config = case_config(case)
        tokens = case_tokens(config)
        model = reference.model(config, random_tensors(config))
        found[f"{case}/logits"] = reference.logits(model, tokens)
        model = reference.with_adapter(model, adapter(config, RANK), RANK, ALPHA)
        found |= {f"{case}/grad/{name}": g for name, g in reference.gradients(model, tokens).items()}
        found[f"{case}/losses"] = np.asarray(reference.adamw_losses(model, tokens, STEPS, LEARNING_RATE))
    return found


def smollm2_vectors() -> dict[str, object]:
    """Loss, each adapter gradient's norm and projections, and ten AdamW losses."""
    model = reference.smollm2(fetch(SMOLLM2))
    tokens = smollm2_tokens()
    model = reference.with_adapter(model, smollm2_adapter(model.config.to_dict()), 16, 16)
    losses = reference.adamw_losses(model, tokens, STEPS, SMOLLM2_LEARNING_RATE)
    model = reference.smollm2(fetch(SMOLLM2))
    model = reference.with_adapter(model, smollm2_adapter(model.config.to_dict()), 16, 16).double()
    gradients = reference.gradients(model, tokens)
    leaves = {name: gradient_summary(name, g).tolist() for name, g in gradients.items()}
    return {"leaves": leaves, "losses": losses}


if __name__ == "__main__":
    save_file(tiny_vectors(), HERE / "llama.safetensors")
    (HERE / "smollm2_lora.json").write_text(json.dumps(smollm2_vectors()))
    for path in (HERE / "llama.safetensors", HERE / "smollm2_lora.json"):
        print(f"wrote {path} ({path.stat().st_size:,} bytes)")
