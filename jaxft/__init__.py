"""jaxft: exact, fast LoRA and QLoRA fine-tuning in JAX.

`import jaxft` imports nothing heavy: each name below is looked up in its module when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxft.api import FastLanguageModel, LanguageModel, is_bfloat16_supported
    from jaxft.errors import JaxftError
    from jaxft.models.config import DecoderConfig
    from jaxft.models.decoder import Decoder
    from jaxft.train.dpo import DPOConfig, DPOTrainer
    from jaxft.train.grpo import GRPOConfig, GRPOTrainer
    from jaxft.train.sft import SFTConfig, SFTTrainer

__version__ = "0.1.0"

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "Decoder",
    "DecoderConfig",
    "FastLanguageModel",
    "GRPOConfig",
    "GRPOTrainer",
    "JaxftError",
    "LanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "is_bfloat16_supported",
]

_HOME = {
    "DPOConfig": "jaxft.train.dpo",
    "DPOTrainer": "jaxft.train.dpo",
    "Decoder": "jaxft.models.decoder",
    "DecoderConfig": "jaxft.models.config",
    "FastLanguageModel": "jaxft.api",
    "GRPOConfig": "jaxft.train.grpo",
    "GRPOTrainer": "jaxft.train.grpo",
    "JaxftError": "jaxft.errors",
    "LanguageModel": "jaxft.api",
    "SFTConfig": "jaxft.train.sft",
    "SFTTrainer": "jaxft.train.sft",
    "is_bfloat16_supported": "jaxft.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
