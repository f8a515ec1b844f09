"""Writes archs.safetensors: what transformers' own classes compute for the smallest case of each family.

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
from tiny import random_tensors
from vectors import torch_reference as reference

PATH = Path(__file__).with_name("archs.safetensors")


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
    found = load_file(PATH) if PATH.exists() and sys.argv[1:] else {}
    found = {name: array for name, array in found.items() if name.split("/")[0] not in chosen}
    for family in chosen:
        found |= vectors(family)
    save_file(found, PATH)
    print(f"wrote {PATH.name} ({PATH.stat().st_size:,} bytes): {', '.join(chosen)}")
