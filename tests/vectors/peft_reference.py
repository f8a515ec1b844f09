"""What peft computes for tests/lora_cases.py: shared by the vector script and the slow tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

import lora_cases as cases
from tiny import random_tensors
from vectors import torch_reference


def model(case: str, config: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The case's model under peft, in training mode, with the cases' values in what trains."""
    config = cases.CONFIG if config is None else config
    settings = {**cases.settings(case), **changes}
    if settings.get("init_lora_weights") == "loftq":
        settings["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    base = torch_reference.model(config, random_tensors(config))
    with on_the_cpu():
        peft_model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).train()
    for name, module in peft_model.named_modules():
        if name.endswith(".lora_dropout.default") and isinstance(module, torch.nn.Dropout):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_dropout.default")
            module.forward = dropping(path, module.p)
    if settings.get("init_lora_weights", True) not in cases.STARTS:
        with torch.no_grad():
            for name, parameter in trained(peft_model).items():
                parameter.copy_(torch.from_numpy(cases.value(name, parameter.detach().numpy())))
    return peft_model


def dropping(module: str, rate: float) -> Any:
    """A dropout that drops what ours does."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        mask = torch.from_numpy(cases.dropout_mask(module, (x.numel() // x.shape[-1], x.shape[-1])).copy())
        return torch.where(mask.reshape(x.shape), x / (1 - rate), 0.0)

    return forward


def trained(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """What requires a gradient, by the names that we give it."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(
                "lora_magnitude_vector.default.weight", "lora_magnitude_vector"
            )
            for part in (".modules_to_save.default", ".default", ".base_layer"):
                name = name.replace(part, "")
            found[name] = parameter
    return found


def results(peft_model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """logits, and the loss' gradient of all that trains: "grad/" + name."""
    peft_model.zero_grad()
    logits = peft_model(torch.from_numpy(tokens)).logits
    targets = torch.from_numpy(tokens[:, 1:])
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    gradients = {f"grad/{name}": p.grad.numpy().copy() for name, p in trained(peft_model).items()}
    return {"logits": logits.detach().numpy().copy(), **gradients}


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Inside, what peft sends to "cuda" stays on the CPU: LoftQ's start knows no other device."""
    import bitsandbytes

    classes = (torch.Tensor, bitsandbytes.nn.Params4bit)
    originals = [vars(cls).get("to") for cls in classes]

    def redirected(original: Any) -> Any:
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if arg == "cuda" else arg for arg in args)
            kwargs = {name: "cpu" if arg == "cuda" else arg for name, arg in kwargs.items()}
            return original(self, *args, **kwargs)

        return to

    saved = [(cls, original or cls.to) for cls, original in zip(classes, originals, strict=True)]
    try:
        for cls, original in saved:
            cls.to = redirected(original)
        yield
    finally:
        for (cls, _), original in zip(saved, originals, strict=True):
            if original is None:
                del cls.to
            else:
                cls.to = original
