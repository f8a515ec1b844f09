"""Tiny language models with an adapter, and rows to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import FastLanguageModel, LanguageModel, lora
from llama_cases import ALPHA, RANK, adapter, case_tokens
from tiny import hf_config

TOKENS = case_tokens(hf_config(), (2, 17))
CONFIG = lora.LoraConfig(r=RANK, lora_alpha=ALPHA)


def loaded(path: Path | str, load_in_4bit: bool = False, **settings: Any) -> LanguageModel:
    """The model without an adapter."""
    return FastLanguageModel.from_pretrained(path, load_in_4bit=load_in_4bit, **settings)[0]


def adapted(path: Path | str, **settings: Any) -> LanguageModel:
    """The tiny model with the non-zero adapter of the cases."""
    return with_values(loaded(path, **settings), CONFIG, adapter(hf_config(), RANK))


def with_values(model: LanguageModel, config: lora.LoraConfig, tensors: dict[str, np.ndarray]) -> LanguageModel:
    """`model` with an adapter of these values."""
    lora.attach(model.decoder, config, key=jax.random.key(0))
    lora.load_adapter_tensors(model.decoder, tensors)
    model.lora_config = config
    return model


def logits_of(model: LanguageModel, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """float32 [B, T, V]."""
    return np.asarray(model(tokens))


def adapter_of(model: LanguageModel) -> dict[str, np.ndarray]:
    """A copy of the adapter's values by name."""
    return {name: np.array(array) for name, array in lora.adapter_tensors(model.decoder).items()}


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference."""
    return float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64) - b))))


def sums(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Message rows that ask for sums."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus 3?"},
                {"role": "assistant", "content": f"The answer is {i + 3}"},
            ]
        }
        for i in range(start, start + n)
    ]
