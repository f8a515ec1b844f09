"""Slow: what SmolLM2 with an adapter computes here is what transformers, llama.cpp and peft compute from our files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft import LanguageModel
from jaxft.fetch import Pinned
from jaxft.lora import LoraConfig
from language_models import adapter_of, loaded, logits_of, rms, with_values
from llama_cases import smollm2_adapter, smollm2_tokens
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 still asks transformers 5.23 for an attribute by its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

TOKENS = smollm2_tokens()
LARGEST_RMS = 0.005


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> LanguageModel:
    base = loaded(smollm2_dir)
    return with_values(base, LoraConfig(r=16, lora_alpha=16), smollm2_adapter(base.source.config))


@pytest.fixture(scope="module")
def expected(model: LanguageModel) -> np.ndarray:
    return logits_of(model, TOKENS)


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def torch_model(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def nll(logits: np.ndarray) -> float:
    """Mean -log p of every next token, in float64."""
    logits = logits[:, :-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()
    return -float(np.take_along_axis(log_p, TOKENS[:, 1:, None], axis=-1).mean())


def test_merged_in_transformers(model: LanguageModel, expected: np.ndarray, smollm2_dir: Path, tmp_path: Path):
    merged = torch_logits(torch_model(model.save_pretrained_merged(tmp_path / "merged", save_method="merged")))
    found = rms(merged, expected)
    print(f"merged float32 in transformers: rms {found:.2e}")
    assert found <= LARGEST_RMS
    assert rms(torch_logits(torch_model(smollm2_dir)), expected) > 20 * LARGEST_RMS, "the adapter does nothing"


def test_gguf_in_llamacpp(
    model: LanguageModel, expected: np.ndarray, unpacked: Callable[[Pinned], Path], tmp_path: Path
):
    (path,) = model.save_pretrained_gguf(tmp_path / "gguf", quantization_method="f32")
    with LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS)).open(path) as judge:
        found = rms(np.stack([judge.logits(row.tolist()) for row in TOKENS]), expected)
    print(f"F32 GGUF in llama.cpp: rms {found:.2e}")
    assert found <= LARGEST_RMS


def test_our_adapter_in_peft(model: LanguageModel, expected: np.ndarray, smollm2_dir: Path, tmp_path: Path):
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(torch_model(smollm2_dir), model.save_pretrained(tmp_path / "adapter")).eval()
    found = nll(torch_logits(theirs))
    print(f"our adapter in peft: NLL {found:.6f}, here {nll(expected):.6f}")
    assert found == pytest.approx(nll(expected), abs=1e-4)


def test_pefts_adapter_here(smollm2_dir: Path, tmp_path: Path):
    """Other ranks, targets and scale than ours have, so that every field must be read."""
    import peft

    config = peft.LoraConfig(
        r=5, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    base = torch_model(smollm2_dir)
    without = nll(torch_logits(base))
    theirs = peft.get_peft_model(base, config).eval()
    rng = np.random.default_rng(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            size = 0.03 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data.numpy()[...] = size * rng.standard_normal(parameter.shape)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = nll(torch_logits(theirs))
    assert abs(expected - without) > 0.01, "the adapter does nothing"
    ours = loaded(tmp_path / "adapter")
    found = nll(logits_of(ours, TOKENS))
    print(f"peft's adapter here: NLL {found:.6f}, in peft {expected:.6f}, without {without:.6f}")
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(adapter_of(ours)) == 2 * 3 * 30
