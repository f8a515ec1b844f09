"""Gemma 2: https://huggingface.co/docs/transformers/model_doc/gemma2"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.gemma_shared import GEMMA_DEFAULTS, gemma_fields, read_gemma_gguf, write_gemma_gguf
from converters.tensor_ops import ADD_ONE_TO_NORMS
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig

_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"  # in GGUF, too
_LARGEST = 46


def _read_config(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(**gemma_fields(reader, 2))


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    caps = {_CAP: reader.number(_CAP, 50.0), _LOGIT_CAP: reader.number(_LOGIT_CAP, 30.0)}
    return {**read_gemma_gguf(reader, largest=_LARGEST, window=4096), **caps}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    if not (config.attention_soft_cap and config.logit_soft_cap):
        raise JaxftError("config field attn_logit_softcapping", "this GGUF architecture cannot be without soft caps")
    caps = {_CAP: config.attention_soft_cap, _LOGIT_CAP: config.logit_soft_cap}
    said = ("attention_soft_cap", "logit_soft_cap")
    return {**write_gemma_gguf(config, period=2, largest=_LARGEST, said=said), **caps}


GEMMA2 = ArchSpec(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("gemma2", _read_gguf, _write_gguf, ADD_ONE_TO_NORMS),
    models="Gemma 2 2B, 9B, 27B",
    defaults={**GEMMA_DEFAULTS, _CAP: 50.0, _LOGIT_CAP: 30.0},
)
