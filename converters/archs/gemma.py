"""Gemma 1: https://huggingface.co/docs/transformers/model_doc/gemma"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common
from converters.archs.gemma_shared import GEMMA_SCALES
from converters.archs.gguf_keys import Fixed, values_of
from converters.tensor_ops import ADD_ONE_TO_NORMS
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("use_bidirectional_attention", False)
    # The first releases say "gelu" where they mean its tanh approximation; transformers corrects that, too.
    activation = reader.take("hidden_activation", None)
    fields = read_common(reader, attention_bias=False)
    fields["hidden_act"] = activation or {"gelu": "gelu_pytorch_tanh"}.get(fields["hidden_act"], fields["hidden_act"])
    return DecoderConfig(**fields, **values_of(GEMMA_SCALES, fields))


GEMMA = ArchSpec(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "gemma",
        gguf_rows(Fixed("hidden_act", "hidden_act", "gelu_pytorch_tanh")),
        graph=GEMMA_SCALES,
        hf={"attention_bias": False},
        tensor_ops=ADD_ONE_TO_NORMS,
    ),
    models="Gemma 2B, 7B; CodeGemma",
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
)
