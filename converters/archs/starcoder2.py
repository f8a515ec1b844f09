"""StarCoder2: https://huggingface.co/docs/transformers/model_doc/starcoder2"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import LAYER_NORM_EPS, read_common, read_common_gguf, read_windows, write_common_gguf
from converters.layout import Fuse
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("embedding_dropout", 0.0)
    reader.expect("residual_dropout", 0.0)
    # Names that its first configs give to what the class fixes.
    reader.expect("mlp_type", "default")
    reader.expect("norm_type", "layer_norm")
    bias = reader.take("use_bias", True)
    fields = read_common(reader, eps="norm_epsilon")
    return DecoderConfig(
        **fields,
        norm="layer_norm",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        **read_windows(reader, fields["num_hidden_layers"]),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    fields = read_common_gguf(reader, hidden_act="gelu_pytorch_tanh", eps="norm_epsilon", eps_key=LAYER_NORM_EPS)
    return {**fields, "use_bias": True}


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return write_common_gguf(
        config,
        eps_key=LAYER_NORM_EPS,
        hidden_act="gelu_pytorch_tanh",
        norm="layer_norm",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


STARCODER2 = ArchSpec(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("starcoder2", _read_gguf, _write_gguf),
    models="StarCoder2 3B, 7B, 15B",
    defaults={"num_key_value_heads": 2, "tie_word_embeddings": True},
    layout=(Fuse("mlp.c_fc", ("mlp.up_proj",)), Fuse("mlp.c_proj", ("mlp.down_proj",))),
)
