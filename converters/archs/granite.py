"""Granite 3.x, dense: https://huggingface.co/docs/transformers/model_doc/granite"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import ATTENTION_BIAS, MLP_BIAS, gguf_rows, read_common
from converters.archs.gguf_keys import Key
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig

SCALES = (
    Key("attention.scale", "attention_multiplier", "attention_scale", "number"),
    Key("embedding_scale", "embedding_multiplier", kind="number"),
    Key("residual_scale", "residual_multiplier", kind="number"),
    # HF's and GGUF's divides.
    Key("logit_scale", "logits_scaling", "logit_scale", "number", value=lambda facts: 1.0 / facts["logit_scale"]),
)


def read_scales(reader: ConfigReader) -> dict[str, Any]:
    """The fields of DecoderConfig that `SCALES` say."""
    scales = {key.says[0]: reader.take(key.hf, 1.0) for key in SCALES if key.hf}
    return {**scales, "logit_scale": 1.0 / scales["logit_scale"]}


def _read_config(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(
        **read_common(reader, attention_bias=False),
        mlp_bias=reader.take("mlp_bias", False),
        **read_scales(reader),
    )


GRANITE = ArchSpec(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("granite", gguf_rows(ATTENTION_BIAS, MLP_BIAS, *SCALES), tensor_ops=PERMUTE_QK),
    models="Granite 3.0 to 3.3 2B, 8B (dense)",
)
