"""StableLM 3B, Stable LM 2 1.6B, Stable Code 3B: https://huggingface.co/docs/transformers/model_doc/stablelm"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import LAYER_NORM_EPS, read_common, read_common_gguf, write_common_gguf
from jaxft.models.config import DecoderConfig

_PARALLEL = "use_parallel_residual"


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("hidden_dropout", 0.0)
    reader.expect("qk_layernorm", False)
    return DecoderConfig(
        **read_common(reader, eps="layer_norm_eps"),
        norm="layer_norm",
        norm_bias=True,
        parallel_block=reader.take(_PARALLEL, False),
        qkv_bias=reader.take("use_qkv_bias", False),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    reader.ignore(_PARALLEL)  # llama.cpp's graph looks at the tensors, too
    return {
        **read_common_gguf(reader, eps="layer_norm_eps", eps_key=LAYER_NORM_EPS, whole_heads=False),
        "use_qkv_bias": "blk.0.attn_q.bias" in reader.tensors,
        _PARALLEL: "blk.0.ffn_norm.weight" not in reader.tensors,
    }


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    return write_common_gguf(
        config,
        eps_key=LAYER_NORM_EPS,
        said=("qkv_bias", "parallel_block"),
        whole_heads=False,
        norm="layer_norm",
        norm_bias=True,
        tie_word_embeddings=False,
    )


STABLELM = ArchSpec(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("stablelm", _read_gguf, _write_gguf),
    models="StableLM 3B, Stable LM 2 1.6B, Stable Code 3B",
    defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25},
)
