"""Writes lora_variants.safetensors: what peft computes for every case of tests/lora_cases.py.

Run from tests/ with the dev extra: PYTHONPATH=. python vectors/make_lora_variant_vectors.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import lora_cases as cases
from vectors import peft_reference as reference

PATH = Path(__file__).parent / "lora_variants.safetensors"


def vectors() -> dict[str, np.ndarray]:
    """logits and gradients of every case, and what the cases with a start of their own start from."""
    found: dict[str, np.ndarray] = {}
    for case in cases.CASES:
        model = reference.model(case)
        found |= {f"{case}/{name}": array for name, array in reference.results(model, cases.TOKENS).items()}
        if case in cases.STARTS:
            found |= {f"{case}/start/{name}": p.detach().numpy().copy() for name, p in reference.trained(model).items()}
    return found


if __name__ == "__main__":
    save_file({name: np.ascontiguousarray(array) for name, array in vectors().items()}, PATH)
    print(f"wrote {PATH} ({PATH.stat().st_size:,} bytes)")
