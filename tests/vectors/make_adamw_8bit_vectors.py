"""Makes tests/vectors/adamw_8bit.safetensors with bitsandbytes on the CPU (extra `dev`).

    python tests/vectors/make_adamw_8bit_vectors.py

Its codes on a CPU are not always those of the nearest entry of a map: of values below 0.06 of their block's largest,
some are up to 7 entries off.

Each case is a parameter and three steps: `CASE.parameter`, `CASE.{1,2,3}.{gradient,parameter,m_codes,m_absmax,v_codes,
v_absmax}`, with the settings below; and the two maps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

PATH = Path(__file__).with_name("adamw_8bit.safetensors")
SETTINGS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "learning_rate": 0.01}
# Whole blocks of 256; a partial last one; a block whose gradients are zero.
CASES = {"whole": (4, 256), "partial": (5, 103), "zeros": (2, 256)}


def steps(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(list(CASES).index(name))
    shape = CASES[name]
    parameter = torch.randn(shape, generator=generator)
    blocks = -(-parameter.numel() // 256)
    maps = {"m": bnb.create_dynamic_map(signed=True), "v": bnb.create_dynamic_map(signed=False)}
    codes = {key: torch.full(shape, int((values == 0).nonzero()), dtype=torch.uint8) for key, values in maps.items()}
    absmax = {key: torch.zeros(blocks) for key in maps}
    tensors = {f"{name}.parameter": parameter.clone()}
    for step in (1, 2, 3):
        gradient = torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape, generator=generator) - 4)
        if name == "zeros":
            gradient[0] = 0
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            parameter,
            codes["m"],
            codes["v"],
            SETTINGS["b1"],
            SETTINGS["b2"],
            0.0,
            0.0,
            SETTINGS["eps"],
            step,
            SETTINGS["learning_rate"],
            maps["m"].clone(),
            maps["v"].clone(),
            absmax["m"],
            absmax["v"],
            SETTINGS["weight_decay"],
            1.0,
            False,
        )
        made = {"gradient": gradient, "parameter": parameter}
        made |= {f"{key}_codes": codes[key] for key in maps} | {f"{key}_absmax": absmax[key] for key in maps}
        tensors |= {f"{name}.{step}.{key}": tensor.clone() for key, tensor in made.items()}
    return tensors


def main() -> None:
    tensors = {key: tensor for name in CASES for key, tensor in steps(name).items()}
    tensors |= {"signed_map": bnb.create_dynamic_map(signed=True), "unsigned_map": bnb.create_dynamic_map(signed=False)}
    temporary = PATH.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(PATH)
    sys.stdout.write(f"wrote {PATH} ({PATH.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
