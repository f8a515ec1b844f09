"""Writes archs.safetensors and archs_moe.safetensors: what transformers' own classes compute for the smallest cases.

    PYTHONPATH=. python vectors/make_arch_vectors.py [family ...]     from tests/, with the dev extra

`FAMILY/CASE/logits` float32 [B, T, V], and `FAMILY/CASE/gradients` float64 [tensors, 5], in the order of the tensors'
names: each gradient's norm and its projections on `probes`. Families that are not named keep what they have.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from arch_cases import arch_config, families, smallest, tokens
from llama_cases import gradient_summary
from moe_cases import MOE_CASES
from tiny import random_tensors
from vectors import torch_reference as reference


def path_of(family: str) -> Path:
    """The file that holds a family's vectors."""
    return Path(__file__).with_name("archs_moe.safetensors" if family in MOE_CASES else "archs.safetensors")


def vectors(family: str) -> dict[str, np.ndarray]:
    """Of one family."""
    case = smallest(family)
    config = arch_config(family, case)
    model = reference.model(config, random_tensors(config))
    ids = tokens(config)
    gradients = reference.all_gradients(model, ids)
    return {
        f"{family}/{case}/logits": reference.logits(model, ids),
        f"{family}/{case}/gradients": np.stack([gradient_summary(name, gradients[name]) for name in sorted(gradients)]),
    }


if __name__ == "__main__":
    chosen = sys.argv[1:] or families()
    for path in dict.fromkeys(path_of(family) for family in chosen):
        mine = [family for family in chosen if path_of(family) == path]
        found = load_file(path) if path.exists() and sys.argv[1:] else {}
        found = {name: array for name, array in found.items() if name.split("/")[0] not in mine}
        for family in mine:
            found |= vectors(family)
        save_file(found, path)
        print(f"wrote {path.name} ({path.stat().st_size:,} bytes): {', '.join(mine)}")
