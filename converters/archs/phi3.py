"""Phi-3, Phi-3.5-mini and Phi-4 (also mini): https://huggingface.co/docs/transformers/model_doc/phi3"""

from __future__ import annotations

from converters.archs.base import ArchSpec, ConfigReader, GGUFArch
from converters.archs.common import gguf_rows, read_common, read_windows
from converters.archs.gguf_rope import Rope
from converters.layout import Fuse
from jaxft.models.config import DecoderConfig


def _read_config(reader: ConfigReader) -> DecoderConfig:
    reader.expect("embd_pdrop", 0.0)
    reader.expect("resid_pdrop", 0.0)
    reader.expect("attention_bias", False)
    reader.expect("mlp_bias", False)
    fields = read_common(reader)
    return DecoderConfig(**fields, **read_windows(reader, fields["num_hidden_layers"]))


_ROPE = Rope(("default", "longrope"), whole_heads=False, outer=("original_max_position_embeddings",))

PHI3 = ArchSpec(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read_config=_read_config,
    gguf=GGUFArch("phi3", gguf_rows(rope=_ROPE)),
    models="Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini",
    layout=(
        Fuse("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fuse("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ),
)
