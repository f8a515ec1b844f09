"""Experts in GGUF: one tensor for each of their linears, llama.cpp's names, every bit back; MXFP4 as it is stored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gguf_files
from arch_cases import arch_config, smallest_in_gguf
from converters.archs import ARCHS
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint, read_entry
from converters.gguf_requantize import requantize
from converters.hf_load import HFCheckpoint
from converters.mxfp4 import write_mxfp4
from converters.open import open_checkpoint
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from moe_cases import MOE_CASES
from mxfp4_cases import CONFIG, stored_tensors
from tiny import write_tiny_hf

FAMILIES = [family for family in MOE_CASES if ARCHS[family].gguf is not None]


def without_aux_loss(config: DecoderConfig) -> DecoderConfig:
    """GGUF does not say how the router was trained."""
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router_aux_loss_coef=0.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_comes_back(family: str, tmp_path: Path) -> None:
    config = arch_config(family, smallest_in_gguf(family))
    source = HFCheckpoint(write_tiny_hf(tmp_path / "hf", config))
    write_gguf(source, tmp_path / "model.gguf", "f32")
    back = GGUFCheckpoint(tmp_path / "model.gguf")
    assert back.tensors == source.tensors
    for name in source.tensors:
        np.testing.assert_array_equal(back.read(name), source.read(name), err_msg=name)
    before, after = (ARCHS[family].decoder_config(checkpoint.config, family) for checkpoint in (source, back))
    assert without_aux_loss(after) == without_aux_loss(before)


def test_experts_are_stacked_by_linear(tmp_path: Path) -> None:
    """Mixtral has a tensor for each expert, Granite one of gate and up: in GGUF they look the same."""
    for family, up in (
        ("mixtral", "model.layers.1.block_sparse_moe.experts.{}.w3.weight"),
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight"),
    ):
        source = HFCheckpoint(write_tiny_hf(tmp_path / family, arch_config(family, smallest_in_gguf(family))))
        write_gguf(source, tmp_path / f"{family}.gguf", "q8_0")
        header = read_header(tmp_path / f"{family}.gguf")
        name = "llama" if family == "mixtral" else family
        assert (header.metadata[f"{name}.expert_count"], header.metadata[f"{name}.expert_used_count"]) == (5, 2)
        assert header.tensors["blk.1.ffn_gate_inp.weight"].type.name == "F32"
        entry, hidden = header.tensors["blk.1.ffn_up_exps.weight"], source.config["hidden_size"]
        assert (entry.shape, entry.type.name) == ((5, 56, hidden), "F16")  # rows that are no whole blocks of Q8_0
        stored = read_entry(tmp_path / f"{family}.gguf", entry)
        for expert in range(5):
            values = source.read(up.format(expert)) if family == "mixtral" else source.read(up)[expert, 56:]
            np.testing.assert_array_equal(stored[expert], values.astype(np.float16))


def test_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    """By a quantizer's own bytes, and again by `requantize`, which takes the mix of experts from the file."""
    fields = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 3}
    config = {**arch_config("mixtral", smallest_in_gguf("mixtral")), **fields}
    source = HFCheckpoint(write_tiny_hf(tmp_path / "hf", config))
    for quantization in ("q8_0", "f32"):
        write_gguf(source, tmp_path / f"{quantization}.gguf", quantization)
    requantize(tmp_path / "f32.gguf", tmp_path / "again.gguf", "q8_0")
    values = [source.read(f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight") for e in range(3)]
    expected = gguf.quants.quantize(np.stack(values), gguf.GGMLQuantizationType.Q8_0).tobytes()
    for name in ("q8_0", "again"):
        path = tmp_path / f"{name}.gguf"
        assert gguf_files.raw_bytes(path, read_header(path), "blk.0.ffn_down_exps.weight") == expected
    back = GGUFCheckpoint(tmp_path / "again.gguf")
    assert np.abs(back.read("model.layers.0.block_sparse_moe.experts.2.w2.weight") - values[2]).max() < 0.01


@pytest.mark.parametrize(
    ("family", "case", "message"),
    [
        ("qwen3_moe", "dense layers between, biases", "config field qkv_bias: this GGUF architecture cannot say True"),
        ("qwen2_moe", "windows, dense layers", "config field norm_topk_prob: .* cannot say True"),
        ("olmoe", "experts", "config field num_key_value_heads: .* cannot say 2"),
        ("deepseek_v2", "groups, yarn", "config field topk_method: .* two best experts"),
        ("llama4_text", "chunks, temperature", "config field layer_types: .* cannot say"),
        ("gpt_oss", "three layers, tight clamp", "config field swiglu_alpha: .* cannot say 1.2"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(family: str, case: str, message: str, tmp_path: Path) -> None:
    source = HFCheckpoint(write_tiny_hf(tmp_path / "hf", arch_config(family, case)))
    with pytest.raises(JaxftError, match=message):
        write_gguf(source, tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()


def test_mxfp4_is_kept_and_comes_back_bit_by_bit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(stored_tensors(), tmp_path / "model.safetensors", {"format": "pt"})
    source = open_checkpoint(tmp_path)
    write_gguf(source, tmp_path / "bf16.gguf", "bf16")
    header = read_header(tmp_path / "bf16.gguf")
    entry = header.tensors["blk.0.ffn_up_exps.weight"]
    assert (entry.type.name, entry.shape) == ("MXFP4", (3, 32, 64))
    # gguf's own reading of the blocks; up is every second column.
    up = source.read("model.layers.0.mlp.experts.gate_up_proj")[:, :, 1::2].swapaxes(1, 2)
    np.testing.assert_array_equal(read_entry(tmp_path / "bf16.gguf", entry), up.astype(np.float32))
    back = GGUFCheckpoint(tmp_path / "bf16.gguf")
    expected = load_file(tmp_path / "model.safetensors")
    found = load_file(write_mxfp4(back, tmp_path / "out") / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].astype(array.dtype), array, err_msg=name)


def test_adapters_of_experts_are_refused(tmp_path: Path) -> None:
    from converters.gguf_adapter import write_gguf_adapter
    from converters.peft_io import make_adapter
    from jaxft.lora import LoraConfig

    source = HFCheckpoint(write_tiny_hf(tmp_path / "hf", arch_config("mixtral", smallest_in_gguf("mixtral"))))
    module = "model.layers.0.block_sparse_moe.experts.0.w1"
    rows, columns = source.tensors[f"{module}.weight"].shape
    tensors: dict[str, Any] = {
        f"{module}.lora_A.weight": np.ones((2, columns), np.float32),
        f"{module}.lora_B.weight": np.ones((rows, 2), np.float32),
    }
    adapter = make_adapter(LoraConfig(r=2, target_modules=("w1",)), tensors, base_model_name_or_path="x")
    with pytest.raises(JaxftError, match=r"experts\.0\.w1"):
        write_gguf_adapter(adapter, source, tmp_path / "adapter.gguf")
