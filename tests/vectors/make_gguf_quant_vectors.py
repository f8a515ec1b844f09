"""Makes tests/vectors/gguf_quants.json with libgguf, ggml's own quantizers as a Python package (extra `dev`).

    PYTHONPATH=tests python tests/vectors/make_gguf_quant_vectors.py

{type: {input of tests/gguf_quant_inputs.py: sha256 of the quantized matrix}}
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from gguf import GGMLQuantizationType
from libgguf import quantize_rows

from gguf_quant_inputs import INPUTS, TYPES, matrix

PATH = Path(__file__).with_name("gguf_quants.json")


def sha256(kind: GGMLQuantizationType, name: str) -> str:
    return hashlib.sha256(quantize_rows(matrix(name), int(kind)).tobytes()).hexdigest()


def main() -> None:
    vectors = {kind.name: {name: sha256(kind, name) for name in INPUTS} for kind in TYPES}
    PATH.write_text(json.dumps(vectors, indent=1) + "\n")
    sys.stdout.write(f"wrote {PATH} ({PATH.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
