"""Adapters: gradients and training against torch + peft, what trains and what does not, names and errors."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxft import lora, losses
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.train.step import make_train_step
from llama_cases import CASES, FIRST, OTHERS, STEPS, adapter, case_config, case_tokens
from models import decoder_of, hidden_states, plain_batch, relative_l2, with_adapter
from tiny import hf_config

VARIANTS = ({"remat": "none,unroll=all"}, {"remat": "full"})
VECTORS = Path(__file__).parent / "vectors" / "llama.safetensors"


def mean_loss_gradients(decoder, batch) -> dict[str, np.ndarray]:
    """Gradient of the mean loss for every adapter tensor, under HF names."""
    graphdef, trainable, frozen = labels.split(decoder)

    @jax.jit
    def gradient(trainable, frozen, batch):
        def mean(trainable):
            total, weight, _ = losses.sft(nnx.merge(graphdef, trainable, frozen), jax.tree.map(lambda a: a[0], batch))
            return total / weight

        return jax.grad(mean)(trainable)

    holder = nnx.merge(graphdef, gradient(trainable, frozen, batch), frozen)
    return lora.adapter_tensors(holder)


def losses_of_steps(decoder, batch, steps: int, learning_rate: float) -> list[float]:
    """The losses that `steps` train steps report."""
    graphdef, trainable, frozen = labels.split(decoder)
    tx = optax.adamw(learning_rate, weight_decay=0.01)
    step = make_train_step(graphdef, losses.sft, tx)
    trainable = jax.tree.map(jnp.copy, trainable)
    opt_state = tx.init(trainable)
    found = []
    for _ in range(steps):
        trainable, opt_state, metrics = step(trainable, frozen, opt_state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        (FIRST, {}),
        *(pytest.param(case, {}, marks=pytest.mark.slow) for case in OTHERS),
        *(pytest.param(case, settings, marks=pytest.mark.slow) for case in CASES for settings in VARIANTS),
    ],
)
def test_gradients_equal_peft(case, settings):
    config = case_config(case)
    expected = {
        k.removeprefix(f"{case}/grad/"): v for k, v in load_file(VECTORS).items() if k.startswith(f"{case}/grad")
    }
    decoder = with_adapter(decoder_of(config, **settings), config)
    gradients = mean_loss_gradients(decoder, plain_batch(case_tokens(config)))
    assert gradients.keys() == expected.keys()
    worst = max(relative_l2(gradients[name], expected[name]) for name in expected)
    assert worst < 1e-4


@pytest.mark.parametrize("case", [FIRST, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_ten_adamw_steps_equal_peft(case):
    config = case_config(case)
    decoder = with_adapter(decoder_of(config), config)
    expected = load_file(VECTORS)[f"{case}/losses"]
    assert expected[0] - expected[-1] > 0.01, "nothing was learnt, so nothing is compared"
    found = losses_of_steps(decoder, plain_batch(case_tokens(config)), STEPS, 1e-3)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_kinds_and_labels():
    decoder = with_adapter(decoder_of())
    kinds = {".".join(map(str, path)): labels.kind_of(path, v) for path, v in nnx.to_flat_state(nnx.state(decoder))}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "head"
    assert kinds["model.norm.weight"] == kinds["model.layers.input_layernorm.weight"] == "norm"
    assert kinds["model.layers.mlp.up_proj.weight"] == "base"
    assert kinds["model.layers.mlp.up_proj.lora_A"] == "lora"
    params = nnx.state(decoder)
    assert set(jax.tree.leaves(labels.labels(params))) == {"lora", "frozen"}
    labels.set_trainable(decoder, {"lora", "norm"})
    assert set(jax.tree.leaves(labels.labels(nnx.state(decoder)))) == {"lora", "norm", "frozen"}


def test_frozen_leaves_do_not_move_under_weight_decay():
    """`lora.masked` over the whole tree; bare optax.masked is the negative control: it hands gradients through."""
    decoder = with_adapter(decoder_of())
    params = nnx.state(decoder)
    gradients = jax.tree.map(jnp.ones_like, params)

    @jax.numpy_dtype_promotion("standard")  # optax's own arithmetic
    def step(tx):
        updates, _ = tx.update(gradients, tx.init(params), params)
        return jax.tree.map(lambda a, b: bool((a != b).any()), params, optax.apply_updates(params, updates))

    adamw = optax.adamw(1e-2, weight_decay=0.1)
    mask = lora.optimizer_mask(params)
    assert jax.tree.leaves(step(lora.masked(adamw))) == jax.tree.leaves(mask)
    assert sum(jax.tree.leaves(mask)) == 14
    assert all(jax.tree.leaves(step(optax.masked(adamw, mask))))


def test_the_train_step_moves_adapters_only():
    decoder = with_adapter(decoder_of(quantization="nf4"))
    graphdef, trainable, frozen = labels.split(decoder)
    before = jax.tree.map(np.array, (trainable, frozen))
    tx = optax.adamw(1e-2, weight_decay=0.1)
    step = make_train_step(graphdef, losses.sft, tx)
    after, _, _ = step(trainable, frozen, tx.init(trainable), plain_batch(case_tokens(hf_config())))
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before[0], after)), strict=True))
    for a, b in zip(*map(jax.tree.leaves, (before[1], frozen)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fresh_adapter_changes_nothing_and_starts_as_pefts():
    decoder = decoder_of()
    tokens = jnp.asarray(case_tokens(hf_config()), jnp.int32)
    base = hidden_states(decoder, tokens)
    lora.attach(decoder, lora.LoraConfig(r=8, lora_alpha=32), key=jax.random.key(1))
    fresh = hidden_states(decoder, tokens)
    # Another program, which may sum in another order: on a GPU the two differ in the last bits.
    np.testing.assert_allclose(fresh, base, atol=1e-5, rtol=1e-5)
    # In the same program, whatever A is, B = 0 leaves no trace of it.
    for module in lora.linears(decoder).values():
        module.lora_A.set_value(module.lora_A.get_value() * 3)
    np.testing.assert_array_equal(hidden_states(decoder, tokens), fresh)
    for module in lora.linears(decoder).values():
        module.lora_A.set_value(module.lora_A.get_value() / 3)
    a = decoder.model.layers.mlp.down_proj.lora_A.get_value()
    bound = 1 / np.sqrt(160)
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert decoder.model.layers.mlp.down_proj.lora_scale == 4.0
    assert lora.LoraConfig(r=16, lora_alpha=8, use_rslora=True).scale == 2.0


def test_adapter_tensors_round_trip_by_peft_names():
    config = hf_config()
    decoder = with_adapter(decoder_of())
    tensors = lora.adapter_tensors(decoder)
    expected = adapter(config, 4)
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_dropout_needs_a_key():
    decoder = with_adapter(decoder_of(), lora_dropout=0.5)
    tokens = jnp.asarray(case_tokens(hf_config()), jnp.int32)
    plain = hidden_states(decoder, tokens)
    np.testing.assert_array_equal(plain, hidden_states(with_adapter(decoder_of()), tokens))
    one, two, again = (hidden_states(decoder, tokens, dropout_key=jax.random.key(seed)) for seed in (1, 2, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_proj", "qq_proj")}, "qq_proj.*matches no linear.*down_proj"),
        ({"r": 0}, "rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(JaxftError, match=message):
        lora.attach(decoder_of(), lora.LoraConfig(**settings), key=jax.random.key(0))


def test_attaching_twice_and_loading_what_does_not_fit_are_refused():
    decoder = with_adapter(decoder_of())
    with pytest.raises(JaxftError, match="adapter already"):
        lora.attach(decoder, lora.LoraConfig(), key=jax.random.key(0))
    tensors = lora.adapter_tensors(decoder)
    first, second, *_ = tensors
    tensors["model.layers.9.mlp.up_proj.lora_A.weight"] = tensors.pop(first)
    tensors[second] = tensors[second][:, :2]
    with pytest.raises(JaxftError, match=r"missing .*; unexpected model\.layers\.9.*; .*expected"):
        lora.load_adapter_tensors(decoder, tensors)


def test_a_quantized_base_cannot_train():
    with pytest.raises(JaxftError, match="is quantized and cannot train"):
        labels.set_trainable(decoder_of(quantization="nf4"), {"base"})
    with pytest.raises(JaxftError, match="no parameter of kind lora"):
        labels.set_trainable(decoder_of(), {"lora"})
