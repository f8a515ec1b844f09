"""Slow: what only families with experts have, beside transformers and PEFT themselves; the rest: test_archs_live.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch_cases import arch_config, smallest, tokens
from jaxft import FastLanguageModel
from jaxft.models.moe import load_balancing_loss
from models import decoder_of
from moe_cases import MOE_CASES
from test_archs import TOLERANCE
from tiny import random_tensors

pytestmark = pytest.mark.slow


def write(folder: Path, config: dict[str, Any]) -> Path:
    from vectors.torch_reference import write_folder

    folder.mkdir()
    write_folder(folder, {**config, "torch_dtype": "float32"}, random_tensors(config))
    return folder


# peft makes rank and alpha patterns for the fused gate_up_proj itself, and then warns that they match no module.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("qwen3_moe", "experts"),
        ("qwen3_moe", "dense layers between, biases"),
        ("qwen2_moe", "shared expert"),
        ("olmoe", "experts"),
        ("mixtral", "experts"),
        ("granitemoe", "multipliers"),
        ("gpt_oss", "experts"),
        ("deepseek_v2", "groups, yarn"),
        ("deepseek_v3", "groups, yarn"),
        ("llama4_text", "chunks, temperature"),
        ("llama4_text", "dense layers between, two experts, biases"),
    ],
)
def test_peft_computes_what_our_adapter_of_experts_does(family: str, case: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from jaxft import lora
    from vectors import torch_reference

    config = arch_config(family, case)
    folder, ids = write(tmp_path / "hf", config), tokens(config)
    model, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False, dtype="float32")
    before = np.asarray(model(ids))
    FastLanguageModel.get_peft_model(model, r=3, lora_alpha=6)
    rng = np.random.default_rng(0)
    shapes = {name: array.shape for name, array in lora.adapter_tensors(model.decoder).items()}
    lora.load_adapter_tensors(
        model.decoder, {name: 0.2 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    )
    ours = np.asarray(model(ids))
    assert np.abs(ours - before).max() > 0.05, "the adapter does nothing"
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(torch_reference.logits(theirs, ids), ours, atol=2 * TOLERANCE, rtol=TOLERANCE)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), load_in_4bit=False, dtype="float32")
    np.testing.assert_allclose(again(ids), ours, atol=TOLERANCE)
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    np.testing.assert_allclose(torch_reference.logits(merged, ids), ours, atol=2 * TOLERANCE, rtol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # of parameters
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "qwen3_moe", "mixtral", "deepseek_v3", "llama4_text"])
def test_what_peft_saves_of_all_experts_at_once_is_read(family: str, tmp_path: Path) -> None:
    """peft's target_parameters: A of gate_up_proj is shared by gate and up, so their ranks are the parameter's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from vectors import torch_reference

    config = arch_config(family, smallest(family))
    folder, ids = write(tmp_path / "hf", config), tokens(config)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    parameters = [name for name, _ in base.named_parameters() if name.endswith(("gate_up_proj", "experts.down_proj"))]
    settings = LoraConfig(
        r=3, lora_alpha=6, target_modules=["o_proj"], target_parameters=parameters, rank_pattern={"gate_up_proj": 4}
    )
    theirs = get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = torch_reference.logits(theirs.eval(), ids)
    stored = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps({**stored, "base_model_name_or_path": str(folder)}))
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path / "theirs"), load_in_4bit=False, dtype="float32")
    np.testing.assert_allclose(model(ids), expected, atol=2 * TOLERANCE, rtol=TOLERANCE)


# transformers' classes of the others have no such loss.
@pytest.mark.parametrize("family", [f for f in MOE_CASES if f not in ("deepseek_v2", "deepseek_v3", "llama4_text")])
def test_the_load_balancing_loss_is_transformers(family: str) -> None:
    import torch

    from vectors import torch_reference

    config = arch_config(family, smallest(family))
    ids = tokens(config)
    model = torch_reference.model(config, random_tensors(config))
    with torch.no_grad():
        expected = float(model(torch.from_numpy(ids), output_router_logits=True).aux_loss)
    decoder = decoder_of(config)
    graphdef, params = nnx.split(decoder)
    load = jax.jit(lambda params: nnx.merge(graphdef, params).with_load(jnp.asarray(ids, jnp.int32))[1])(params)
    assert decoder.config.moe is not None
    found = load_balancing_loss(load, decoder.config.moe.num_experts)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert expected > 1.0
