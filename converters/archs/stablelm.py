"""StableLM 3B, Stable LM 2 1.6B, Stable Code 3B: https://huggingface.co/docs/transformers/model_doc/stablelm"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import LAYER_NORM_EPS, gguf_rows, read_common
from converters.archs.gguf_keys import Key, Present
from converters.archs.gguf_rope import Rope
from jaxft.models.config import DecoderConfig

_PARALLEL = "use_parallel_residual"
# What the class and llama.cpp's graph fix.
_NORM = {"norm": "layer_norm", "norm_bias": True}


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("hidden_dropout", 0.0)
    reader.expect("qk_layernorm", False)
    return DecoderConfig(
        **read_common(reader, eps="layer_norm_eps"),
        **_NORM,
        parallel_block=reader.take(_PARALLEL, False),
        qkv_bias=reader.take("use_qkv_bias", False),
    )


STABLELM = ArchSpec(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch(
        "stablelm",
        gguf_rows(
            Present("blk.0.attn_q.bias", "use_qkv_bias", "qkv_bias"),
            Present("blk.0.ffn_norm.weight", _PARALLEL, "parallel_block", absent=True),
            Key(_PARALLEL, None),  # llama.cpp's graph looks at the tensors, too
            eps=LAYER_NORM_EPS,
            rope=Rope(whole_heads=False),
        ),
        graph={**_NORM, "tie_word_embeddings": False},
    ),
    models="StableLM 3B, Stable LM 2 1.6B, Stable Code 3B",
    defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25},
)
