"""GGUF in: tensors and config are those of transformers' own import; what is not understood is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_files
from converters.archs import ARCHS
from converters.archs.gguf_rope import FREQUENCIES, recognise_llama3
from converters.checkpoint import stream
from converters.gguf_import import GGUFCheckpoint
from converters.hf_load import HFCheckpoint
from jaxft.errors import JaxftError

VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture(scope="module")
def tiny_gguf(tiny_hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as F32 GGUF."""
    return gguf_files.export(tiny_hf_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_smollm2_equals_transformers_import(smollm2_gguf: Path) -> None:
    expected = json.loads((VECTORS / "smollm2_tensor_hashes.json").read_text())
    checkpoint = GGUFCheckpoint(smollm2_gguf)
    hashes = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in stream(checkpoint)}
    assert len(hashes) == 272
    assert hashes == expected["sha256"]
    config = {**checkpoint.config, "rope_theta": checkpoint.config["rope_parameters"]["rope_theta"]}
    assert {field: config[field] for field in expected["config"]} == expected["config"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["pad_token_id"] == 2


@pytest.mark.slow
def test_smollm2_equals_transformers_import_directly(smollm2_gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    state = model.state_dict()
    state.pop("lm_head.weight")
    checkpoint = GGUFCheckpoint(smollm2_gguf)
    assert state.keys() == checkpoint.tensors.keys()
    for name, array in stream(checkpoint):
        np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)


CONFIGS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no_grouping": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 24},
    "linear": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama3 without a band": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_written_and_read_again(fields: dict[str, Any], make_tiny_hf: Any, tmp_path: Path) -> None:
    """Every fact of the decoder and every bit of the float32 tensors survives the way through GGUF."""
    folder = make_tiny_hf(tmp_path / "hf", vocab_size=307, **fields)
    source = HFCheckpoint(folder)
    checkpoint = GGUFCheckpoint(gguf_files.export(folder, tmp_path / "model.gguf"))
    spec = ARCHS["llama"]
    assert spec.decoder_config(checkpoint.config, "ours") == spec.decoder_config(source.config, "source")
    assert checkpoint.tensors == source.tensors
    for name, array in stream(checkpoint):
        np.testing.assert_array_equal(array, source.read(name), err_msg=name)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert checkpoint.config[field] == source.config[field]


def test_dtype_is_that_of_the_matrices(make_tiny_hf: Any, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "hf", "bfloat16")
    dtypes = {}
    for quantization in ("f32", "f16", "bf16", "q8_0"):
        checkpoint = GGUFCheckpoint(gguf_files.export(folder, tmp_path / f"{quantization}.gguf", quantization))
        dtypes[quantization] = checkpoint.config["dtype"]
        assert checkpoint.read("model.norm.weight").dtype == np.float32
    assert dtypes == {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float32"}


MUTATED_METADATA = {
    "architecture": ({"general.architecture": "mamba"}, r"'mamba' is not supported \(supported: .*llama"),
    "unknown_key": ({"llama.logit_scale": 2.0}, "unknown metadata: llama.logit_scale = 2.0"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_used_count: is missing"),
    "missing_key": ({"llama.embedding_length": None}, "llama.embedding_length: is missing"),
    "wrong_type": ({"llama.block_count": "three"}, "llama.block_count: must be a positive integer, not 'three'"),
    "per_layer": ({"llama.attention.head_count_kv": [2, 2, 1]}, "head_count_kv: must be a positive integer"),
    "zero_heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count: must be a positive integer"),
    "huge_depth": ({"llama.block_count": 2**32 - 1}, "num_hidden_layers 4294967295, but no tensor is that large"),
    "huge_width": ({"llama.feed_forward_length": 2**31}, "intermediate_size 2147483648, but no tensor"),
    "partial_rotary": ({"llama.rope.dimension_count": 8}, "rope.dimension_count: the value 8 is not supported"),
    "ntk": ({"llama.rope.scaling.type": "ntk"}, "rope.scaling.type: the value 'ntk' is not supported"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor: is missing"),
    "no_factor": ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor: is missing"),
    "bad_eos": ({"tokenizer.ggml.eos_token_id": 5000}, "eos_token_id: must be the id of one of the"),
    "split": ({"split.count": 2}, "one part of a split model"),
}  # fmt: skip


@pytest.mark.parametrize(("metadata", "message"), MUTATED_METADATA.values(), ids=MUTATED_METADATA)
def test_refused_metadata(metadata: dict[str, Any], message: str, tiny_gguf: Path, tmp_path: Path) -> None:
    path = gguf_files.changed(tiny_gguf, tmp_path / "changed.gguf", metadata)
    with pytest.raises(JaxftError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in caught.value.where


def test_every_wrong_tensor_is_listed(tiny_gguf: Path, tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.weight": None,
        "blk.2.ffn_norm.weight": None,
        "blk.1.ffn_up.weight": np.zeros((64, 64), np.float32),
        "blk.1.attn_sinks.weight": np.zeros(4, np.float32),
    }
    with pytest.raises(JaxftError) as caught:
        GGUFCheckpoint(gguf_files.changed(tiny_gguf, tmp_path / "changed.gguf", {}, tensors))
    start, _, problems = caught.value.what.partition(": ")
    assert start == "its tensors do not fit its config"
    assert sorted(problems.split("; ")) == [
        "blk.0.attn_q.weight is missing",
        "blk.1.attn_sinks.weight is not expected",
        "blk.1.ffn_up.weight has shape [64, 64] instead of [160, 64]",
        "blk.2.ffn_norm.weight is missing",
    ]


def test_frequencies_that_are_not_llama3s_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    divisors = np.array([1, 1, 2, 3, 4, 5, 6, 8], np.float32)
    path = gguf_files.changed(tiny_gguf, tmp_path / "changed.gguf", {}, {FREQUENCIES: divisors})
    with pytest.raises(JaxftError, match=r"rope_freqs\.weight: holds frequency divisors .* that are not Llama 3's"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("parameters", [{"rope_type": "yarn"}, {"full_attention": {"rope_type": "default"}}])
def test_frequencies_beside_another_scaling_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(JaxftError, match=r"rope_freqs\.weight: cannot be combined with rope scaling"):
        recognise_llama3(np.ones(4, np.float32), parameters, 8, "model.gguf")
