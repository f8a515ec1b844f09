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
from converters.archs.llama4 import LLAMA4
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
        LLAMA4,
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
    """(column titles, one row for each architecture): what it covers, and what of it was compared with whom.

    tests/test_archs.py holds each claim against the cases that the comparisons run on.
    """
    titles = ("model_type", "models", "beside transformers", "GGUF, beside llama.cpp")
    return titles, [
        (name, spec.models, _compared(spec), spec.gguf.name if spec.gguf else "not written yet")
        for name, spec in ARCHS.items()
    ]


def _compared(spec: ArchSpec) -> str:
    without = ", ".join(f"{kind} RoPE" for kind in spec.no_greedy)
    return f"all, but greedy tokens not with {without}" if without else "all"


def models_markdown() -> str:
    """`models_table` for the README, and what its words mean."""
    titles, rows = models_table()
    lines = [titles, tuple("---" for _ in titles), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_LEGEND}"


_LEGEND = (
    "Random tiny configs of each, several a family. *all*: logits and the gradients of all parameters, packed and one "
    "document a row, decoding through the cache, greedy tokens, the checkpoint out again bit by bit, and LoRA adapters "
    "in and out (PEFT's), against transformers' own class. *GGUF*: logits in llama.cpp from a float32 file within rms "
    "0.01, and every tensor back bit by bit; facts that llama.cpp's graph does not have are refused by name."
)
