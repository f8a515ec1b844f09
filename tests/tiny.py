"""A random tiny model as a Hugging Face folder: config.json, model.safetensors and a byte-level BPE tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy its bfloat16
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from converters.archs import arch_of

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 2 plus 3?<|im_end|>\n"
    "<|im_start|>assistant\n5<|im_end|>\nThe answer is the sum of the numbers, and the sum is the answer."
)


def hf_config(dtype: str = "float32", **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny llama: 3 layers, hidden 64, MLP 160, 4/2 heads of 16, vocabulary 300, untied head."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": dtype,
        **overrides,
    }


# The order in which `random_tensors` draws: by the first of these words that a name holds.
_ORDER = "embed input_layernorm q_proj k_proj v_proj o_proj gate_proj up_proj down_proj norm lm_head".split()  # noqa: SIM905


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor of a model with this config, layer by layer."""

    def place(name: str) -> tuple:
        layer = re.search(r"layers\.(\d+)\.", name)
        number = int(layer.group(1)) if layer else -1 if "embed" in name else 10**9
        word = next((i for i, word in enumerate(_ORDER) if word in name), len(_ORDER))
        return number, word, name.rpartition(".")[0], not name.endswith("weight")

    spec = arch_of(config["model_type"], "test")
    shapes = spec.tensors(spec.decoder_config(config, "test")).hf_shapes
    return {name: shapes[name] for name in sorted(shapes, key=place)}


def random_tensors(config: dict[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Weights from N(0, 1/in), norms near 1, biases near 0: activations stay near 1 through the layers."""
    rng = np.random.default_rng(seed)
    offset = arch_of(config["model_type"], "test").decoder_config(config, "test").norm_weight_offset
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1 - offset + 0.1 * values
        else:
            values *= shape[-1] ** -0.5
        tensors[name] = values.astype(dtype)
    return tensors


def tokenizer(vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE tokenizer with at most `vocab_size` tokens: the special ones, 256 bytes and a few merges."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator([CORPUS], trainer)
    return result


def write_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """tokenizer.json and tokenizer_config.json with a ChatML template."""
    tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2))


def make_tiny_hf(
    folder: Path, dtype: str = "float32", seed: int = 0, with_tokenizer: bool = True, **overrides: Any
) -> Path:
    """Writes the whole checkpoint into `folder` (created if needed) and returns it; `overrides` go into config.json."""
    return write_tiny_hf(folder, hf_config(dtype, **overrides), dtype, seed, with_tokenizer)


def write_tiny_hf(
    folder: Path, config: dict[str, Any], dtype: str = "float32", seed: int = 0, with_tokenizer: bool = False
) -> Path:
    """The same for any config of the registry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}, indent=2))
    save_file(random_tensors(config, dtype, seed), folder / "model.safetensors", {"format": "pt"})
    if with_tokenizer:
        write_tokenizer(folder, config["vocab_size"])
    return folder
