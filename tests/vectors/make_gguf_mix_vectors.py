"""Makes tests/vectors/gguf_mixes.json with llama.cpp's own llama_model_quantize (fetched; needs cffi of extra `dev`).

    PYTHONPATH=.:tests python tests/vectors/make_gguf_mix_vectors.py

{model of tests/gguf_mix_cases.py: {mix: {part: types by layer}}}; the weights are random, types hang on shapes only.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import gguf_files
from converters.gguf_header import read_header
from converters.gguf_mixes import MIXES
from gguf_mix_cases import MODELS, compact, mix_config
from jaxft.fetch import Pinned, fetch
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS
from tiny import write_tiny_hf

PATH = Path(__file__).with_name("gguf_mixes.json")


def unpacked(pinned: Pinned, folder: Path) -> Path:
    archive = fetch(pinned)
    shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else "gztar")
    return folder


def types(llama: LlamaCpp, source: Path, mix: str) -> dict[str, str]:
    target = source.with_suffix(".quantized")
    llama.quantize(source, target, MIXES[mix].file_type)
    return compact({name: entry.type.name for name, entry in read_header(target).tensors.items()})


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama = LlamaCpp(
            unpacked(LLAMA_CPP, folder / "llama"), unpacked(LLAMA_CPP_DECLARATIONS, folder / "declarations")
        )
        vectors = {}
        for model, fields in MODELS.items():
            hf = write_tiny_hf(folder / model, mix_config(**fields), "bfloat16")
            source = gguf_files.export(hf, folder / f"{model}.gguf", "bf16")
            vectors[model] = {mix: types(llama, source, mix) for mix in MIXES}
    PATH.write_text(json.dumps(vectors, indent=1) + "\n")
    sys.stdout.write(f"wrote {PATH} ({PATH.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
