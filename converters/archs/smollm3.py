"""SmolLM3: https://huggingface.co/docs/transformers/model_doc/smollm3"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import every_fourth, gguf_rows, read_common, read_nope_layers, read_optional_windows
from converters.tensor_ops import PERMUTE_QK
from jaxft.models.config import DecoderConfig, LayerType


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, attention_bias=False)
    layers = fields["num_hidden_layers"]
    nope = read_nope_layers(reader, layers)
    types: list[LayerType] = ["sliding_attention" if i in nope else "full_attention" for i in range(layers)]
    return DecoderConfig(
        **fields,
        nope_layers=nope,
        mlp_bias=reader.take("mlp_bias", False),
        **read_optional_windows(reader, layers, types),
    )


SMOLLM3 = ArchSpec(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "smollm3",
        gguf_rows(),
        graph={"nope_layers": every_fourth},
        hf={"attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 4},
        tensor_ops=PERMUTE_QK,
    ),
    models="SmolLM3 3B",
    defaults={"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
)
