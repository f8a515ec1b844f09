"""Gemma 2: https://huggingface.co/docs/transformers/model_doc/gemma2"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader
from converters.archs.common import gguf_rows, window_keys
from converters.archs.gemma_shared import GEMMA_ACTIVATION, GEMMA_DEFAULTS, gemma_fields, gemma_gguf
from converters.archs.gguf_keys import Facts, Key
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig

_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"  # in GGUF, too


def _read_config(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(**gemma_fields(reader, 2))


def _soft_cap(name: str, of: str, default: float) -> Key:
    def value(facts: Facts) -> float:
        if not (facts["attention_soft_cap"] and facts["logit_soft_cap"]):
            where = f"config field {_CAP}"
            raise JaxftError(where, "this GGUF architecture cannot be without soft caps")
        return facts[of]

    return Key(name, name, of, "number", default, value=value)


GEMMA2 = ArchSpec(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=_read_config,
    gguf=gemma_gguf(
        "gemma2",
        gguf_rows(
            GEMMA_ACTIVATION,
            *window_keys(2, default=4096),
            _soft_cap(_CAP, "attention_soft_cap", 50.0),
            _soft_cap(_LOGIT_CAP, "logit_soft_cap", 30.0),
        ),
        largest=46,
    ),
    models="Gemma 2 2B, 9B, 27B",
    defaults={**GEMMA_DEFAULTS, _CAP: 50.0, _LOGIT_CAP: 30.0},
)
