"""What torch, transformers and peft compute for our cases: shared by the vector scripts and the slow tests.

SmolLM2's gradients are taken in float64: torch's own float32 is up to 2e-4 away from it in the late layers' v_proj.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """transformers' own class for the config, in float32 with these tensors (all of them, and no others)."""
    with tempfile.TemporaryDirectory() as folder:
        # torch gives the row of a padding token no gradient.
        write_folder(Path(folder), {**config, "torch_dtype": "float32", "pad_token_id": None}, tensors)
        # torch's grouped product of experts takes rows of whole 16 bytes only.
        result, info = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    problems = {kind: names for kind, names in info.items() if names and set(names) != {"lm_head.weight"}}
    assert not problems, problems
    result.name_or_path = ""  # the folder is gone
    return result.float().eval()


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """A Hugging Face folder without a tokenizer."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """The `new` tokens that transformers' own generation adds."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


def all_gradients(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Gradient of `loss` for every parameter, under its name in a checkpoint; a tied head's is in the embedding's.

    What transformers holds in other shapes than it saves (experts) is saved with the gradients in its place.
    """
    model.zero_grad()
    loss(model, tokens).backward()
    values = copy.deepcopy(model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for parameter, of_model in zip(values.parameters(), model.parameters(), strict=True):
            parameter.copy_(of_model.grad)
        for buffer in values.buffers():  # a checkpoint may hold some; they have no gradients
            buffer.zero_()
        values.save_pretrained(folder)
        return {name: np.array(array) for name, array in load_file(Path(folder) / "model.safetensors").items()}


def with_adapter(model: Any, adapter: dict[str, np.ndarray], rank: int, alpha: float) -> Any:
    """`model` under peft with these A and B; only they require gradients."""
    peft_model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=LINEARS, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapter_parameters(peft_model).items():
            parameter.copy_(torch.from_numpy(adapter[name]))
    return peft_model


def adapter_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """HF module path + lora_A.weight or lora_B.weight -> parameter."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }


def loss(model: Any, tokens: np.ndarray) -> torch.Tensor:
    """Mean cross-entropy of the next token over all rows."""
    logits = model(torch.from_numpy(tokens)).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten())


def gradients(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Gradient of `loss` for every adapter parameter."""
    model.zero_grad()
    loss(model, tokens).backward()
    return {name: p.grad.numpy().copy() for name, p in adapter_parameters(model).items()}


def adamw_losses(model: Any, tokens: np.ndarray, steps: int, learning_rate: float) -> list[float]:
    """The loss before each of `steps` AdamW updates (betas 0.9 and 0.999, eps 1e-8, weight decay 0.01)."""
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=learning_rate, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, tokens)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def smollm2(gguf: Path) -> Any:
    """SmolLM2 in float32 as transformers reads it from the GGUF file; ``.double()`` makes it float64."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval()
