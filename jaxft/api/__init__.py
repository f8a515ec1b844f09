"""The public face, as Unsloth's users know it: load, attach an adapter, generate, save.

`loading` has FastLanguageModel, `model` has LanguageModel, `saving` what its save methods do. This package is the one
part of jaxft that imports `converters`, and it does so inside functions.
"""

from jaxft.api.loading import (
    FastLanguageModel,
    checkpoint_config,
    default_dtype,
    is_bfloat16_supported,
    supported_models,
)
from jaxft.api.model import LanguageModel
from jaxft.api.saving import SaveMethod, check_gguf_quantizations

__all__ = [
    "FastLanguageModel",
    "LanguageModel",
    "SaveMethod",
    "check_gguf_quantizations",
    "checkpoint_config",
    "default_dtype",
    "is_bfloat16_supported",
    "supported_models",
]
