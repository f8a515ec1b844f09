"""Command R and R+, Aya 23 and Expanse: https://huggingface.co/docs/transformers/model_doc/cohere"""

from __future__ import annotations

from typing import Any

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch, MetadataReader
from converters.archs.common import LAYER_NORM_EPS, read_common, read_common_gguf, write_common_gguf
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, eps="layer_norm_eps", interleaved=True, attention_bias=False)
    return DecoderConfig(
        **fields,
        norm="layer_norm",
        parallel_block=True,
        qk_norm="each_head" if reader.take("use_qk_norm", False) else None,
        logit_scale=reader.take("logit_scale"),
    )


def _read_gguf(reader: MetadataReader) -> dict[str, Any]:
    return {
        **read_common_gguf(reader, eps="layer_norm_eps", eps_key=LAYER_NORM_EPS),
        "attention_bias": False,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in reader.tensors,
        "logit_scale": reader.number("logit_scale"),
    }


def _write_gguf(config: DecoderConfig) -> dict[str, int | float | str]:
    keys = write_common_gguf(
        config,
        eps_key=LAYER_NORM_EPS,
        said=("logit_scale",),
        interleaved=True,
        rope_kinds=("default", "linear"),
        norm="layer_norm",
        parallel_block=True,
        qk_norm="each_head" if config.num_hidden_layers >= 64 else None,  # as llama.cpp decides
        tie_word_embeddings=True,
    )
    return {**keys, "logit_scale": config.logit_scale}


COHERE = ArchSpec(
    model_type="cohere",
    architecture="CohereForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("command-r", _read_gguf, _write_gguf),
    models="Command R, Command R+, Aya 23, Aya Expanse",
    defaults={"tie_word_embeddings": True, "rope_theta": 500_000.0, "logit_scale": 0.0625},
)
