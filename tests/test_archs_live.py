"""Slow: every case of every architecture beside transformers, PEFT and llama.cpp themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from arch_cases import CASES, EVERY_CASE, GGUF_CASES, arch_config, greedy_is_compared, tokens
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from converters.hf_export import write_hf
from converters.hf_load import HFCheckpoint
from converters.load import load_decoder
from jaxft import FastLanguageModel
from jaxft.errors import JaxftError
from jaxft.fetch import Pinned
from jaxft.generate import generate
from jaxft.models.decoder import Decoder
from language_models import rms
from llamacpp import LlamaCpp
from models import batch_of, decoder_of, hf_gradients, hidden_states, plain_examples, relative_l2, through_cache
from moe_cases import MOE_CASES
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS
from test_archs import TOLERANCE, loss_and_logits, train_everything
from tiny import random_tensors, write_tiny_hf

pytestmark = pytest.mark.slow
every_case = pytest.mark.parametrize(("family", "case"), EVERY_CASE)


def torch_model(config: dict[str, Any]) -> Any:
    from vectors import torch_reference

    return torch_reference.model(config, random_tensors(config))


@pytest.fixture(scope="module")
def llama(unpacked: Callable[[Pinned], Path]) -> LlamaCpp:
    """The library."""
    return LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS))


def compare_gradients_and_logits(
    decoder: Decoder, model: Any, config: dict[str, Any], ids: np.ndarray, rows: list[list[int]]
) -> None:
    """Of the documents `ids` [B, T] laid out in `rows`, with torch's `model` of the same tensors."""
    from vectors import torch_reference

    expected = torch_reference.logits(model, ids)
    batch = batch_of(plain_examples(ids), rows, ids.size // len(rows))
    gradients, logits = loss_and_logits(decoder, batch)
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=TOLERANCE, rtol=TOLERANCE)
    theirs = torch_reference.all_gradients(model, ids)
    # A bias that all keys of a layer without positions have cannot change the loss: rounding is all that both have.
    rounding = 1e-6 * max(map(np.linalg.norm, theirs.values()))
    for name, gradient in hf_gradients(gradients, config).items():
        if not np.any(theirs[name]):  # an expert that no token goes to, or what only chooses experts
            assert not np.any(gradient), name
        elif np.linalg.norm(theirs[name]) <= rounding:
            assert np.linalg.norm(gradient) <= rounding, name
        else:
            assert relative_l2(gradient, theirs[name]) < TOLERANCE, name


@every_case
def test_logits_gradients_cache_and_greedy_equal_transformers(family: str, case: str) -> None:
    """Scanned and as straight code, with and without packing."""
    from vectors import torch_reference

    config = arch_config(family, case)
    model, ids = torch_model(config), tokens(config)
    expected = torch_reference.logits(model, ids)
    decoder = train_everything(decoder_of(config))
    for remat, rows in (("none", [[0], [1]]), ("full,unroll=all", [[0, 1]])):
        decoder.remat = remat
        compare_gradients_and_logits(decoder, model, config, ids, rows)
    decoder.remat = "none"
    hidden = through_cache(decoder, jnp.asarray(ids, jnp.int32), prefill=5)
    np.testing.assert_allclose(decoder.logits(hidden), expected, atol=TOLERANCE, rtol=TOLERANCE)
    prompt = ids[0, :9].tolist()
    if greedy_is_compared(family, case):
        assert generate(decoder, [prompt], max_new_tokens=12)[0] == torch_reference.greedy(model, prompt, 12)


@every_case
def test_hf_out_is_bit_equal(family: str, case: str, tmp_path: Path) -> None:
    config = arch_config(family, case)
    source = HFCheckpoint(write_tiny_hf(tmp_path / "in", config))
    from converters.merge import DecoderCheckpoint

    decoder = load_decoder(source, dtype=jnp.float32)
    write_hf(DecoderCheckpoint(decoder, source), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert json.loads((tmp_path / "in/config.json").read_text()) == json.loads(
        (tmp_path / "out/config.json").read_text()
    )


@every_case
def test_gguf_computes_the_same_in_llama_cpp(family: str, case: str, tmp_path: Path, llama: LlamaCpp) -> None:
    config = arch_config(family, case)
    source = HFCheckpoint(write_tiny_hf(tmp_path / "hf", config))
    path = tmp_path / "model.gguf"
    if (family, case) not in GGUF_CASES:
        with pytest.raises(JaxftError, match="GGUF"):
            write_gguf(source, path, "f32")
        return
    write_gguf(source, path, "f32")
    metadata = read_header(path).metadata
    ids = tokens(config)[:, : metadata[f"{metadata['general.architecture']}.context_length"]]
    decoder = load_decoder(source, dtype=jnp.float32)
    ours = np.asarray(decoder.logits(hidden_states(decoder, ids[:1])))[0]
    with llama.open(path) as model:
        error = rms(model.logits(ids[0].tolist()), ours)
    print(f"{family}/{case}: rms {error:.2e}, logits of {ours.std():.2f}")
    assert error <= 0.01
    if decoder.config.rope.kind == "llama3":
        with pytest.raises(JaxftError, match="not Llama 3's scaling"):  # the case is shorter than Llama 3's models
            GGUFCheckpoint(path)
        return
    back = GGUFCheckpoint(path)
    offset = decoder.config.norm_weight_offset
    for name in source.tensors:
        plus = np.float32(offset if name.endswith("norm.weight") else 0)  # GGUF holds 1 + w, rounded to float32
        np.testing.assert_array_equal(back.read(name) + plus, source.read(name) + plus, err_msg=name)
    again = load_decoder(back, dtype=jnp.float32)
    np.testing.assert_allclose(hidden_states(again, ids), hidden_states(decoder, ids), atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("family", [family for family in CASES if family not in MOE_CASES])  # those: test_moe_live.py
def test_peft_adapters_in_and_out(family: str, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from vectors import torch_reference

    config = arch_config(family, next(iter(CASES[family])))
    folder, ids = write_tiny_hf(tmp_path / "hf", config), tokens(config)
    linears = {n.split(".")[-2] for n in random_tensors(config) if "layers.0." in n and "norm" not in n}

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)

    theirs = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=sorted(linears)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = torch_reference.logits(theirs.eval(), ids)
    with_base = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    with_base["base_model_name_or_path"] = str(folder)
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(with_base))
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path / "theirs"), load_in_4bit=False, dtype="float32")
    np.testing.assert_allclose(model(ids), expected, atol=2 * TOLERANCE, rtol=TOLERANCE)
    assert np.abs(expected - torch_reference.logits(base().eval(), ids)).max() > 0.05, "the adapter does nothing"
    model.save_pretrained(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(torch_reference.logits(loaded, ids), expected, atol=2 * TOLERANCE, rtol=TOLERANCE)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "ours"), load_in_4bit=False, dtype="float32")
    np.testing.assert_allclose(again(ids), model(ids), atol=TOLERANCE)
    assert again.lora_config is not None
    assert again.lora_config.r == 4
    again.save_pretrained_merged(tmp_path / "merged", save_method="merged_16bit")
