"""Makes tests/vectors/nf4.safetensors with bitsandbytes on the CPU (extra `dev`).

    python tests/vectors/make_nf4_vectors.py

Each case is a weight and what bitsandbytes makes of it, plain and double-quantized: `CASE.weight`,
`CASE.{plain,double}.{codes,absmax,dequantized}`, `CASE.double.{nested_absmax,nested_offset}`; and the two maps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

PATH = Path(__file__).with_name("nf4.safetensors")
# Whole blocks of 64; a partial last one; all-zero ones; more than 256 blocks, so a second nested block, a partial one.
CASES = {
    "whole": ((16, 128), torch.float32),
    "whole_bf16": ((16, 128), torch.bfloat16),
    "partial": ((5, 50), torch.float32),
    "partial_bf16": ((5, 50), torch.bfloat16),
    "zeros": ((4, 64), torch.float32),
    "nested_bf16": ((33, 514), torch.bfloat16),
}


def weight(name: str) -> torch.Tensor:
    shape, dtype = CASES[name]
    w = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(list(CASES).index(name)))
    if name == "zeros":
        w[::2] = 0
    return w.to(dtype)


def quantized(w: torch.Tensor, double_quantization: bool) -> dict[str, torch.Tensor]:
    codes, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quantization)
    tensors = {"codes": codes.reshape(w.shape[0], -1), "absmax": state.absmax}
    if double_quantization:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
    return tensors | {"dequantized": bnb.dequantize_4bit(codes, state)}


def vectors() -> dict[str, torch.Tensor]:
    tensors = {}
    for name in CASES:
        tensors[f"{name}.weight"] = w = weight(name)
        for kind, double_quantization in (("plain", False), ("double", True)):
            made = quantized(w, double_quantization)
            tensors |= {f"{name}.{kind}.{key}": tensor.contiguous() for key, tensor in made.items()}
    _, state = bnb.quantize_4bit(weight("whole"), quant_type="nf4", compress_statistics=True)
    return tensors | {"quant_map": state.code, "nested_quant_map": state.state2.code}


def main() -> None:
    temporary = PATH.with_suffix(".tmp")
    save_file(vectors(), temporary)
    temporary.replace(PATH)
    sys.stdout.write(f"wrote {PATH} ({PATH.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
