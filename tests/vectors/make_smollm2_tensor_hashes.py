"""Makes smollm2_tensor_hashes.json: what transformers' own import of the SmolLM2 GGUF file gives (needs torch).

python tests/vectors/make_smollm2_tensor_hashes.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from jaxft.fetch import SMOLLM2, fetch

# Fields that say what the model computes; the rest of transformers' config are its own defaults.
FIELDS = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
]


def main() -> None:
    path = fetch(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    content = {
        "config": {
            **{field: getattr(model.config, field) for field in FIELDS},
            "rope_theta": model.config.rope_parameters["rope_theta"],
        },
        "sha256": {
            name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()
        },
    }
    target = Path(__file__).with_name("smollm2_tensor_hashes.json")
    target.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
