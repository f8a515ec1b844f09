"""Slow: every case of every family with experts beside transformers and PEFT themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from arch_cases import arch_config, smallest, tokens
from converters.hf_export import write_hf
from converters.hf_load import HFCheckpoint
from converters.load import load_decoder
from converters.merge import DecoderCheckpoint
from jaxft import FastLanguageModel
from jaxft.errors import JaxftError
from jaxft.generate import generate
from jaxft.models.moe import load_balancing_loss
from models import batch_of, decoder_of, hf_gradients, plain_examples, relative_l2, train_everything
from moe_cases import MOE_CASES
from test_archs import TOLERANCE, loss_and_logits
from tiny import random_tensors

pytestmark = pytest.mark.slow
every_case = pytest.mark.parametrize(
    ("family", "case"), [(f, case) for f, cases in MOE_CASES.items() for case in cases]
)


def write(folder: Path, config: dict[str, Any]) -> Path:
    from vectors.torch_reference import write_folder

    folder.mkdir()
    write_folder(folder, {**config, "torch_dtype": "float32"}, random_tensors(config))
    return folder


@every_case
def test_logits_gradients_and_greedy_equal_transformers(family: str, case: str) -> None:
    """Scanned and as straight code, with and without packing."""
    import torch

    from vectors import torch_reference

    config = arch_config(family, case)
    model, ids = torch_reference.model(config, random_tensors(config)), tokens(config)
    expected, theirs = torch_reference.logits(model, ids), torch_reference.all_gradients(model, ids)
    decoder = train_everything(decoder_of(config))
    for remat, rows in (("none", [[0], [1]]), ("full,unroll=all", [[0, 1]])):
        decoder.remat = remat
        gradients, logits = loss_and_logits(decoder, batch_of(plain_examples(ids), rows, ids.size // len(rows)))
        np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=TOLERANCE, rtol=TOLERANCE)
        for name, gradient in hf_gradients(gradients, config).items():
            if np.any(theirs[name]):
                assert relative_l2(gradient, theirs[name]) < TOLERANCE, name
            else:
                assert not np.any(gradient), name
    decoder.remat = "none"
    prompt = ids[0, :9].tolist()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(torch.tensor([prompt]), **settings)[0, 9:].tolist()
    assert generate(decoder, [prompt], max_new_tokens=12)[0] == out


@every_case
def test_hf_out_is_bit_equal(family: str, case: str, tmp_path: Path) -> None:
    source = HFCheckpoint(write(tmp_path / "in", arch_config(family, case)))
    write_hf(DecoderCheckpoint(load_decoder(source, dtype=jnp.float32), source), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


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


def test_adapters_of_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", arch_config("gpt_oss", smallest("gpt_oss")))
    model, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False, dtype="float32")
    FastLanguageModel.get_peft_model(model, r=2)
    with pytest.raises(JaxftError, match=r"experts\.0\.\w+_proj is a part of"):
        model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("family", MOE_CASES)
def test_the_load_balancing_loss_is_transformers(family: str) -> None:
    import torch

    from vectors import torch_reference

    config = arch_config(family, smallest(family))
    ids = tokens(config)
    model = torch_reference.model(config, random_tensors(config))
    with torch.no_grad():
        expected = float(model(torch.from_numpy(ids), output_router_logits=True).aux_loss)
    decoder = decoder_of(config)
    assert decoder.config.moe is not None
    graphdef, params = nnx.split(decoder)
    load = jax.jit(lambda params: nnx.merge(graphdef, params).with_load(jnp.asarray(ids, jnp.int32))[1])(params)
    found = load_balancing_loss(load, decoder.config.moe.num_experts)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert expected > 1.0
