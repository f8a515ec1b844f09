"""Makes tests/vectors/gguf_quants.json with libgguf, ggml's own quantizers as a Python package (extra `dev`).

    PYTHONPATH=.:tests python tests/vectors/make_gguf_quant_vectors.py

{type: {input of tests/gguf_quant_inputs.py: sha256 of the quantized matrix}}, and in gguf_weighted_quants.json
{type: sha256 of all inputs' matrices, quantized with `importance`}
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from gguf import GGMLQuantizationType
from libgguf import quantize_rows

from converters.gguf_quants import WEIGHTED
from gguf_quant_inputs import INPUTS, TYPES, importance, matrix

PATH = Path(__file__).with_name("gguf_quants.json")
WEIGHTED_PATH = Path(__file__).with_name("gguf_weighted_quants.json")


def sha256(kind: GGMLQuantizationType, name: str) -> str:
    return hashlib.sha256(quantize_rows(matrix(name), int(kind)).tobytes()).hexdigest()


def weighted_sha256(kind: GGMLQuantizationType) -> str:
    quantized = (quantize_rows(matrix(name), int(kind), imatrix=importance()) for name in INPUTS)
    return hashlib.sha256(b"".join(array.tobytes() for array in quantized)).hexdigest()


def main() -> None:
    vectors = {kind.name: {name: sha256(kind, name) for name in INPUTS} for kind in TYPES}
    PATH.write_text(json.dumps(vectors, indent=1) + "\n")
    weighted = {kind.name: weighted_sha256(kind) for kind in TYPES if kind in WEIGHTED}
    WEIGHTED_PATH.write_text(json.dumps(weighted, indent=1) + "\n")
    sys.stdout.write(f"wrote {PATH} ({PATH.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
