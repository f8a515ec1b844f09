"""Command R and R+, Aya 23 and Expanse: https://huggingface.co/docs/transformers/model_doc/cohere"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import LAYER_NORM_EPS, gguf_rows, read_common
from converters.archs.gguf_keys import Facts, Key, Present
from converters.archs.gguf_rope import Rope
from jaxft.models.config import DecoderConfig

# What the class and llama.cpp's graph fix.
_FIXED = {"norm": "layer_norm", "parallel_block": True}


def _read_config(reader: ConfigReader) -> DecoderConfig:
    fields = read_common(reader, eps="layer_norm_eps", interleaved=True, attention_bias=False)
    return DecoderConfig(
        **fields,
        **_FIXED,
        qk_norm="each_head" if reader.take("use_qk_norm", False) else None,
        logit_scale=reader.take("logit_scale"),
    )


def _qk_norm(facts: Facts) -> str | None:
    """As llama.cpp decides."""
    return "each_head" if facts["num_hidden_layers"] >= 64 else None


COHERE = ArchSpec(
    model_type="cohere",
    architecture="CohereForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "command-r",
        gguf_rows(
            Key("logit_scale", "logit_scale", kind="number"),
            Present("blk.0.attn_q_norm.weight", "use_qk_norm", "qk_norm"),
            eps=LAYER_NORM_EPS,
            rope=Rope(("default", "linear"), interleaved=True),
        ),
        graph={**_FIXED, "qk_norm": _qk_norm, "tie_word_embeddings": True},
        hf={"attention_bias": False},
    ),
    models="Command R, Command R+, Aya 23, Aya Expanse",
    defaults={"tie_word_embeddings": True, "rope_theta": 500_000.0, "logit_scale": 0.0625},
)
