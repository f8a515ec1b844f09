"""Every kind of adapter against what peft computes, and what trains and what does not with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lora_cases as cases
from jaxft import lora, losses
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.models.layers import Constant, is_quantizable
from jaxft.models.params import build_decoder, parameters
from jaxft.quant import NF4Tensor
from jaxft.train.step import make_train_step
from models import decoder_config, decoder_of, hidden_states, plain_batch, relative_l2
from tiny import hf_config, random_tensors

VECTORS = load_file(Path(__file__).parent / "vectors" / "lora_variants.safetensors")


def config_of(case: str, **changes: Any) -> lora.LoraConfig:
    """Our LoraConfig of a case."""
    settings = {**cases.settings(case), **changes}
    return lora.LoraConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})


def adapted(case: str, hf: dict[str, Any] | None = None) -> Decoder:
    """The case's model with the cases' values in what trains."""
    hf = cases.CONFIG if hf is None else hf
    tensors = random_tensors(hf)
    decoder = quantized_as_peft(hf) if case == "loftq" else decoder_of(hf)
    lora.attach(decoder, config_of(case), key=jax.random.key(0), weights=tensors.__getitem__)
    if case not in cases.STARTS:
        start = lora.adapter_tensors(decoder)
        lora.load_adapter_tensors(decoder, {name: cases.value(name, array) for name, array in start.items()})
    return decoder


def quantized_as_peft(hf: dict[str, Any]) -> Decoder:
    """NF4 without double quantization, as peft's LoftQ has it."""
    names = {path: ".".join(map(str, path)) for path, _ in parameters(decoder_of(hf)) if is_quantizable(path)}
    ends = {name.split("layers.")[1] for name in names.values()}
    quantize = jax.jit(lambda w: NF4Tensor.quantize(w, double_quantization=False))

    def read(name: str) -> Any:
        array = random_tensors(hf)[name]
        return quantize(jnp.asarray(array)) if any(name.endswith(end) for end in ends) else array

    return build_decoder(decoder_config(hf), read, dtype=jnp.float32)


def logits_and_gradients(decoder: Decoder, tokens: np.ndarray) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """float32 logits, and the mean loss' gradient of all that trains, under HF names; with the cases' dropout."""
    graphdef, trainable, frozen = labels.split(decoder)
    key = jax.random.key(cases.DROPOUT_SEED)

    @jax.jit
    def run(trainable, frozen, batch, tokens):
        def mean(trainable):
            decoder = nnx.merge(graphdef, trainable, frozen)
            total, weight, _ = losses.sft(decoder, jax.tree.map(lambda a: a[0], batch), dropout_key=key)
            return total / weight

        decoder = nnx.merge(graphdef, trainable, frozen)
        return decoder.logits(decoder(tokens, dropout_key=key)), jax.grad(mean)(trainable)

    logits, gradient = run(trainable, frozen, plain_batch(tokens), jnp.asarray(tokens, jnp.int32))
    return logits, lora.adapter_tensors(nnx.merge(graphdef, gradient, frozen))


def of_case(case: str, kind: str) -> dict[str, np.ndarray]:
    prefix = f"{case}/{kind}/"
    return {name.removeprefix(prefix): array for name, array in VECTORS.items() if name.startswith(prefix)}


def signs_of(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Singular vectors have no sign of their own: for each tensor +-1 for each rank, [r, 1] or [r], as it starts."""
    signs = {}
    for name, array in found.items():
        if name.endswith("lora_A.weight"):
            sign = np.sign(np.sum(array * expected[name], axis=1))
            signs |= {name: sign[:, None], name.replace("lora_A", "lora_B"): sign}
    return signs


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in cases.SLOW else ()) for case in cases.CASES]
)
def test_logits_and_gradients_equal_pefts(case: str) -> None:
    decoder = adapted(case)
    start, expected = lora.adapter_tensors(decoder), of_case(case, "grad")
    logits, gradients = logits_and_gradients(decoder, cases.TOKENS)
    assert relative_l2(logits, VECTORS[f"{case}/logits"]) < 1e-5
    assert gradients.keys() == expected.keys()
    signs = signs_of(start, of_case(case, "start")) if case in cases.STARTS else {}
    for name, array in of_case(case, "start").items():
        assert relative_l2(start[name] * signs[name], array) < 1e-4, name
    for name, array in expected.items():
        assert np.linalg.norm(array) > 1e-6, f"{name} has no gradient, so nothing is compared"
        assert relative_l2(gradients[name] * signs.get(name, 1), array) < 1e-4, name


def test_kinds_differ() -> None:
    """Negative control of the above: no case computes what another does."""
    logits = [VECTORS[f"{case}/logits"] for case in cases.CASES if case not in ("pissa", "olora")]
    assert min(relative_l2(a, b) for i, a in enumerate(logits) for b in logits[:i]) > 0.01


EVERYTHING = lora.LoraConfig(
    r=3,
    lora_alpha=6,
    use_dora=True,
    bias="all",
    target_modules="all-linear",
    exclude_modules=("k_proj",),
    modules_to_save=("embed_tokens", "input_layernorm"),
    layers_to_transform=(1,),
    rank_pattern={"up_proj": 2},
    init_lora_weights="olora",
)


@pytest.mark.slow
def test_only_what_the_settings_name_moves_and_what_fills_up_a_stack_stays_zero() -> None:
    """With weight decay, through a real step, for an adapter of every kind at once."""
    hf = hf_config(attention_bias=True, num_hidden_layers=2, tie_word_embeddings=True)
    decoder = decoder_of(hf)
    lora.attach(decoder, EVERYTHING, key=jax.random.key(0))
    assert decoder.lm_head is not None, "the embedding trains, the head does not"
    graphdef, trainable, frozen = labels.split(decoder)
    kinds = set(jax.tree.leaves(labels.labels(nnx.state(decoder))))
    assert kinds == {"lora", "embedding", "norm", "base", "frozen"}
    before = lora.adapter_tensors(decoder)
    layers = {name.split(".")[2] for name in before if "lora_" in name}
    assert layers == {"1"}
    assert not any("k_proj.lora" in name for name in before)
    assert before["model.layers.1.mlp.up_proj.lora_A.weight"].shape == (2, 64)

    tx = optax.adamw(1e-2, weight_decay=0.1)
    batch = plain_batch(np.random.default_rng(0).integers(0, hf["vocab_size"], (2, 9)))
    stepped, _, _ = make_train_step(graphdef, losses.sft, tx)(trainable, frozen, tx.init(trainable), batch)
    after: Decoder = nnx.merge(graphdef, stepped, frozen)
    for name, array in lora.adapter_tensors(after).items():
        assert (array != before[name]).any(), f"{name} did not move"
    for module in lora.linears(after).values():
        if module.lora_A is not None:
            A, B, magnitude = (v.get_value() for v in (module.lora_A, module.lora_B, module.lora_magnitude_vector))
            assert not A[0].any()
            assert not B[0].any()
            assert not magnitude[0].any(), "a layer without an adapter has none of its parts"
    up = after.model.layers.mlp.up_proj
    assert up.lora_A.get_value()[1, :2].any()
    assert not up.lora_A.get_value()[1, 2:].any()
    assert not up.lora_B.get_value()[1, :, 2:].any()


def test_constants_are_no_parameters() -> None:
    """Norms and starts are frozen, in no checkpoint, and not trainable by any kind."""
    decoder = decoder_of(cases.CONFIG)
    lora.attach(decoder, config_of("pissa", use_dora=True), key=jax.random.key(0))
    constants = [v for _, v in nnx.iter_graph(decoder) if isinstance(v, Constant)]
    assert len(constants) == 7 * 3
    labels.set_trainable(decoder, {"lora", "norm", "embedding", "head"})
    assert not any(labels.is_trainable((), constant) for constant in constants)


@pytest.mark.parametrize("case", ["pissa", "olora"])
def test_an_adapter_from_the_original_weights_computes_the_same(case: str) -> None:
    """What is saved of PiSSA on the base that it came from, after it has learnt something; and the start without it."""
    decoder = decoder_of(cases.CONFIG)
    config = config_of(case, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    lora.attach(decoder, config, key=jax.random.key(0))
    learnt = {name: array + 0.05 * cases.value(name, array) for name, array in lora.adapter_tensors(decoder).items()}
    lora.load_adapter_tensors(decoder, learnt)
    plain, tensors = lora.to_save(decoder, config)
    assert (plain.r, plain.init_lora_weights) == (6, True)
    again = decoder_of(cases.CONFIG)
    lora.attach(again, plain, key=jax.random.key(1))
    lora.load_adapter_tensors(again, tensors)
    expected = hidden_states(decoder, cases.TOKENS)
    base = hidden_states(decoder_of(cases.CONFIG), cases.TOKENS)
    assert relative_l2(expected, base) > 0.01
    assert relative_l2(hidden_states(again, cases.TOKENS), expected) < 1e-5
    assert relative_l2(hidden_states(lora.without_adapter(decoder), cases.TOKENS), base) < 1e-5


@pytest.mark.slow
def test_pissa_by_subspace_iteration_finds_the_largest_singular_values() -> None:
    exact, iterated = decoder_of(cases.CONFIG), decoder_of(cases.CONFIG)
    for decoder, start in ((exact, "pissa"), (iterated, "pissa_niter_16")):
        lora.attach(decoder, lora.LoraConfig(r=3, init_lora_weights=start), key=jax.random.key(0))
    tensors = random_tensors(cases.CONFIG)

    def left(decoder: Decoder) -> list[float]:
        """The norm of what is left of each weight."""
        modules = lora.linears(decoder).items()
        weights = {name: tensors[name.replace("layers", "layers.0") + ".weight"] for name, _ in modules}
        products = {name: m.lora_B.get_value()[0] @ m.lora_A.get_value()[0] for name, m in modules}
        return [float(np.linalg.norm(weights[name] - 16 / 3 * products[name])) for name in weights]

    for least, found in zip(left(exact), left(iterated), strict=True):
        assert least <= found * (1 + 1e-6)
        assert found < 1.01 * least


def test_a_reference_that_trained_is_no_reference() -> None:
    decoder = decoder_of(cases.CONFIG)
    lora.attach(decoder, lora.LoraConfig(r=2, modules_to_save=("norm",)), key=jax.random.key(0))
    with pytest.raises(JaxftError, match=r"reference model: the base of the adapter trains as well \(model.*norm"):
        lora.without_adapter(decoder)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "whole": (
        {"modules_to_save": ("lm_heads",)},
        r"modules_to_save: \['lm_heads'\] match nothing. There are: .*lm_head",
    ),
    "some layers": ({"modules_to_save": ("layers.1.input_layernorm",)}, "modules_to_save: means only some layers'"),
    "nothing left": ({"layers_to_transform": (7,)}, r"target_modules: nothing of .* is left to adapt"),
    "regex": ({"target_modules": "q_pro"}, "'q_pro' matches no linear"),
    "start": (
        {"init_lora_weights": "pisa"},
        "init_lora_weights: 'pisa' is not known. .*gaussian, pissa",
    ),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq needs a quantized base. Load with load_in_4bit=True"),
    "bias": ({"bias": "lora"}, "bias: 'lora' is not known"),
    "rank": ({"rank_pattern": {"q_proj": 0}}, "q_proj: the rank must be at least 1"),
    "head": ({"target_modules": ("lm_head",), "lora_dropout": 0.1}, "lora_dropout: an adapter of lm_head has none"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_named(case: str) -> None:
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(JaxftError, match=message):
        lora.attach(decoder_of(hf_config(num_hidden_layers=2)), lora.LoraConfig(**settings), key=jax.random.key(0))
