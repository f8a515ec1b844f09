"""StarCoder2: https://huggingface.co/docs/transformers/model_doc/starcoder2"""

from __future__ import annotations

import dataclasses

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import LAYER_NORM_EPS, gguf_rows, read_common, read_windows
from converters.archs.gguf_keys import Fixed
from converters.layout import Fuse
from jaxft.models.config import DecoderConfig

# What the class and llama.cpp's graph fix.
_FIXED = {"norm": "layer_norm", "norm_bias": True, "gated_mlp": False}
_BIASES = ("qkv_bias", "o_bias", "mlp_bias")


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
        **_FIXED,
        **dict.fromkeys(_BIASES, bias),
        **read_windows(reader, fields["num_hidden_layers"]),
    )


STARCODER2 = ArchSpec(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "starcoder2",
        gguf_rows(
            Fixed("hidden_act", "hidden_act", "gelu_pytorch_tanh"),
            eps=dataclasses.replace(LAYER_NORM_EPS, hf="norm_epsilon"),
        ),
        graph={**_FIXED, **dict.fromkeys(_BIASES, True)},
        hf={"use_bias": True},
    ),
    models="StarCoder2 3B, 7B, 15B",
    defaults={"num_key_value_heads": 2, "tie_word_embeddings": True},
    layout=(Fuse("mlp.c_fc", ("mlp.up_proj",)), Fuse("mlp.c_proj", ("mlp.down_proj",))),
)
