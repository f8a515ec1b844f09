"""Granite 3.x, dense: https://huggingface.co/docs/transformers/model_doc/granite"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import read_common, read_common_gguf, write_common_gguf
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig

# HF's field -> GGUF's key
_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def _read_config(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(
        **read_common(reader, attention_bias=False),
        mlp_bias=reader.take("mlp_bias", False),
        attention_scale=reader.take("attention_multiplier", 1.0),
        embedding_multiplier=reader.take("embedding_multiplier", 1.0),
        residual_multiplier=reader.take("residual_multiplier", 1.0),
        logit_scale=1.0 / reader.take("logits_scaling", 1.0),
    )


def read_granite_gguf(reader: MetadataReader, *, moe: bool = False) -> dict[str, Any]:
    """The fields that Granite has with and without experts."""
    return {
        **read_common_gguf(reader, moe=moe),
        "attention_bias": "blk.0.attn_q.bias" in reader.tensors,
        **{field: reader.number(key) for field, key in _SCALES.items()},
    }


def write_granite_gguf(config: DecoderConfig, *said: str) -> dict[str, int | float | str]:
    """The inverse; `said` as of `write_common_gguf`."""
    scales = ("attention_scale", "embedding_multiplier", "residual_multiplier", "logit_scale")
    values = dict(zip(_SCALES.values(), (getattr(config, name) for name in scales), strict=True))
    values["logit_scale"] = 1.0 / config.logit_scale  # GGUF's divides, too
    keys = write_common_gguf(config, said=("qkv_bias", "o_bias", *scales, *said))
    return {**keys, **{key: float(value) for key, value in values.items()}}


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {**read_granite_gguf(reader), "mlp_bias": "blk.0.ffn_up.bias" in reader.tensors}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return write_granite_gguf(config, "mlp_bias")


GRANITE = ArchSpec(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("granite", _read_gguf, _write_gguf, PERMUTE_QK),
    models="Granite 3.0 to 3.3 2B, 8B (dense)",
)
