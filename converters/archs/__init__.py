"""The registry of architectures: one ArchSpec per HF model_type. A new family is one module here and one row below."""

from __future__ import annotations

from converters.archs.base import ArchSpec
from converters.archs.cohere import COHERE
from converters.archs.deepseek_v2 import DEEPSEEK_V2
from converters.archs.deepseek_v3 import DEEPSEEK_V3
from converters.archs.gemma import GEMMA
from converters.archs.gemma2 import GEMMA2
from converters.archs.gemma3 import GEMMA3
from converters.archs.gpt_oss import GPT_OSS
from converters.archs.granite import GRANITE
from converters.archs.granitemoe import GRANITE_MOE
from converters.archs.llama import LLAMA
from converters.archs.mistral import MISTRAL
from converters.archs.mixtral import MIXTRAL
from converters.archs.olmo2 import OLMO2
from converters.archs.olmoe import OLMOE
from converters.archs.phi3 import PHI3
from converters.archs.qwen2 import QWEN2
from converters.archs.qwen2_moe import QWEN2_MOE
from converters.archs.qwen3 import QWEN3
from converters.archs.qwen3_moe import QWEN3_MOE
from converters.archs.smollm3 import SMOLLM3
from converters.archs.stablelm import STABLELM
from converters.archs.starcoder2 import STARCODER2
from jaxft.errors import JaxftError

ARCHS: dict[str, ArchSpec] = {
    spec.model_type: spec
    for spec in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        PHI3,
        GRANITE,
        OLMO2,
        SMOLLM3,
        COHERE,
        STARCODER2,
        STABLELM,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        GRANITE_MOE,
        GPT_OSS,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
    )
}


def arch_of(model_type: str | None, where: object) -> ArchSpec:
    """The ArchSpec of an HF model_type; raises JaxftError with the supported ones for any other."""
    if not isinstance(model_type, str) or model_type not in ARCHS:
        raise JaxftError(
            f"{where}, field model_type",
            f"{model_type!r} is not supported (supported: {', '.join(sorted(ARCHS))})",
            "CONTRIBUTING.md has the recipe for a new architecture",
        )
    return ARCHS[model_type]


def models_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(column titles, one row for each architecture): what it covers, and what of it was compared with what.

    tests/test_archs.py compares every row with transformers' own class (logits, gradients of all parameters, packed
    rows, the cache); tests/test_archs_live.py several configs of each, beside PEFT and llama.cpp, and
    tests/test_moe_live.py adapters of experts.
    """
    titles = ("model_type", "models", "compared with transformers", "GGUF, compared with llama.cpp")
    numbers = "logits, gradients, packing, cache, greedy; checkpoints and adapters in and out"
    return titles, [
        (name, spec.models, numbers, spec.gguf.name if spec.gguf else "not written yet") for name, spec in ARCHS.items()
    ]


def models_markdown() -> str:
    """`models_table` for the README."""
    titles, rows = models_table()
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
