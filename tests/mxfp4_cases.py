"""A tiny gpt-oss checkpoint with its experts in MXFP4, as OpenAI packs them."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxft.quant import MXFP4Tensor
from tiny import hf_config, random_tensors

CONFIG = {
    **{name: value for name, value in hf_config().items() if name not in ("mlp_bias", "rope_scaling")},
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True, "torch_dtype": "bfloat16",
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2,
    "sliding_window": 4, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}  # fmt: skip


def stored_tensors() -> dict[str, np.ndarray]:
    """Random, with the experts as OpenAI packs them: [E, out, in / 32, 16] and [E, out, in / 32]."""
    plain = {name: value for name, value in CONFIG.items() if name != "quantization_config"}
    found: dict[str, np.ndarray] = {}
    for name, array in random_tensors(plain).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            found[name] = array.astype(ml_dtypes.bfloat16)
            continue
        packed = [MXFP4Tensor.quantize(jnp.asarray(expert.T)) for expert in array]
        scales = np.stack([weight.scales for weight in packed])
        found[f"{name}_scales"] = scales
        found[f"{name}_blocks"] = np.stack([weight.codes for weight in packed]).reshape(*scales.shape, 16)
    return found
