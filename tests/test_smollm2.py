"""SmolLM2-135M-Instruct in float32 against torch and peft: the numbers in vectors/."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft import FastLanguageModel, lora, losses
from jaxft.generate import generate
from llama_cases import SMOLLM2_LEARNING_RATE, STEPS, probes, smollm2_adapter, smollm2_tokens
from models import plain_batch, relative_l2
from test_lora import losses_of_steps, mean_loss_gradients

VECTORS = Path(__file__).parent / "vectors"
REFERENCE = json.loads((VECTORS / "smollm2_reference.json").read_text())
LORA = json.loads((VECTORS / "smollm2_lora.json").read_text())


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    return FastLanguageModel.from_pretrained(smollm2_gguf, load_in_4bit=False)[0]


@pytest.fixture(scope="module")
def adapted(smollm2_gguf):
    """The model with a non-zero adapter of rank 16."""
    model = FastLanguageModel.from_pretrained(smollm2_gguf, load_in_4bit=False)[0]
    lora.attach(model.decoder, lora.LoraConfig(r=16, lora_alpha=16), key=jax.random.key(0))
    lora.load_adapter_tensors(model.decoder, smollm2_adapter(model.source.config))
    return model


@pytest.mark.slow
def test_mean_nll_of_a_paragraph(model):
    tokens = np.asarray([REFERENCE["paragraph"]["input_ids"]])
    batch = jax.tree.map(lambda a: a[0], plain_batch(tokens))
    graphdef, params = nnx.split(model.decoder)
    total, weight, _ = jax.jit(lambda p, b: losses.sft(nnx.merge(graphdef, p), b))(params, batch)
    assert float(total / weight) == pytest.approx(REFERENCE["paragraph"]["mean_nll"], abs=1e-4)


def test_tokens_logits_and_greedy_output(model):
    prompts = [g["input_ids"] for g in REFERENCE["generations"]]
    for generation in REFERENCE["generations"]:
        ids = model.tokenizer(generation["prompt"], add_special_tokens=False)["input_ids"]
        assert ids == generation["input_ids"]
    outputs = generate(model.decoder, prompts, max_new_tokens=64, eos_token_ids=model.eos_token_ids())
    assert outputs == [g["output_ids"] for g in REFERENCE["generations"]]
    width = max(map(len, prompts))
    padded = np.asarray([[*p, *[0] * (width - len(p))] for p in prompts])
    logits = np.asarray(model(padded))
    for i, generation in enumerate(REFERENCE["generations"]):
        tokens, expected = zip(*generation["top10"], strict=True)
        found = logits[i, len(prompts[i]) - 1]
        np.testing.assert_allclose(found[list(tokens)], expected, atol=2e-3)
        assert found.argmax() == tokens[0]


@pytest.mark.slow
def test_gradients_of_all_420_adapter_leaves(adapted):
    """Norm and four projections on random signs of each: a relative L2 error e moves a projection by about e * norm."""
    tokens = smollm2_tokens()
    gradients = mean_loss_gradients(adapted.decoder, plain_batch(tokens))
    assert len(gradients) == 420
    assert gradients.keys() == LORA["leaves"].keys()
    errors = {}
    for name, (norm, *projections) in LORA["leaves"].items():
        gradient = gradients[name].astype(np.float64)
        found = np.tensordot(probes(name, gradient.shape), gradient, gradient.ndim)
        errors[name] = max(abs(np.linalg.norm(gradient) - norm), np.abs(found - projections).max() / 2) / norm
    assert max(errors.values()) < 1e-4, max(errors, key=errors.__getitem__)


@pytest.mark.slow
def test_ten_adamw_steps(adapted):
    tokens = smollm2_tokens()
    found = losses_of_steps(adapted.decoder, plain_batch(tokens), STEPS, SMOLLM2_LEARNING_RATE)
    np.testing.assert_allclose(found, LORA["losses"], atol=1e-4)
    assert found[0] - found[-1] > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft calls what transformers renamed
def test_gradients_equal_peft_leaf_by_leaf(adapted, smollm2_gguf):
    from vectors import torch_reference as reference

    tokens = smollm2_tokens()
    theirs = reference.with_adapter(reference.smollm2(smollm2_gguf), smollm2_adapter(adapted.source.config), 16, 16)
    single = reference.gradients(theirs, tokens)
    expected = reference.gradients(theirs.double(), tokens)
    found = mean_loss_gradients(adapted.decoder, plain_batch(tokens))
    ours, torchs = (max(relative_l2(g[name], expected[name]) for name in expected) for g in (found, single))
    print(f"worst relative L2 of {len(expected)} leaves to float64: ours {ours:.2e}, torch's float32 {torchs:.2e}")
    assert ours < 1e-4


@pytest.mark.slow
def test_unrolled_equals_scanned(adapted):
    tokens = smollm2_tokens()
    scanned = mean_loss_gradients(adapted.decoder, plain_batch(tokens))
    adapted.decoder.remat = "none,unroll=all"
    try:
        unrolled = mean_loss_gradients(adapted.decoder, plain_batch(tokens))
    finally:
        adapted.decoder.remat = "none"
    assert max(relative_l2(unrolled[name], scanned[name]) for name in scanned) < 1e-5


@pytest.mark.slow
def test_nf4_starts_where_bitsandbytes_does_and_learns(smollm2_gguf):
    """bitsandbytes rounds a few 8-bit absmax codes the other way (see test_nf4.py), which moves the loss by 4e-4."""
    model = FastLanguageModel.from_pretrained(smollm2_gguf, load_in_4bit=True)[0]
    FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    tokens = np.asarray([REFERENCE["paragraph"]["input_ids"]])
    first, *_, last = losses_of_steps(model.decoder, plain_batch(tokens), 3, 2e-3)
    assert first == pytest.approx(REFERENCE["paragraph"]["nf4_mean_nll"], abs=1e-3)
    assert last < first - 0.1
