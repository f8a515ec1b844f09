"""The mixture of experts against its formula in float64, and what is particular to it in a decoder and a loss."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch_cases import arch_config, smallest
from converters.archs import ARCHS
from converters.expert_adapters import experts_to_decoder, experts_to_hf
from converters.layout import Layout
from converters.peft_io import Adapter, make_adapter, scale_of
from jaxft import FastLanguageModel, lora, losses
from jaxft.data.batch import Batch, lay_out
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.models.config import DecoderConfig, MoEConfig
from jaxft.models.decoder import Decoder, abstract_decoder
from jaxft.models.moe import Load, MoE, load_balancing_loss, utilisation
from jaxft.models.params import expected_tensors, tensor_views
from jaxft.quant.mxfp4 import MXFP4Tensor
from models import random_examples
from tiny import write_tiny_hf

D, TOKENS = 16, (2, 7)
PLAIN = MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
CASES = {
    "everything": dataclasses.replace(
        PLAIN, scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, score_correction_bias=True,
        n_group=3, topk_group=2, group_score="top2", expert_bias=True, router_bias=True, expert_act="clamped_swiglu",
        swiglu_limit=1.0, shared_expert_intermediate_size=10, shared_expert_gate=True,
    ),
    "plain": PLAIN,
    "normed": dataclasses.replace(PLAIN, norm_topk_prob=True, n_group=2, topk_group=1),
    "scaled inputs": dataclasses.replace(PLAIN, scoring_func="sigmoid", num_experts_per_tok=1, scale_inputs=True),
}  # fmt: skip


def config_of(moe: MoEConfig | None = PLAIN, layers: int = 2, **others: Any) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=50, hidden_size=D, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, moe=moe, **others,
    )  # fmt: skip


def random_moe(moe: MoEConfig) -> MoE:
    block = MoE(config_of(moe), stack=(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.5, x.dtype), nnx.state(block))
    nnx.update(block, values)
    return block


def formula(block: MoE, moe: MoEConfig, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y [M, D], tokens of each expert [E]), one token after the other, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(block)))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731

    def mlp(weights: dict, z: np.ndarray, activation: str) -> np.ndarray:
        gate, up = (weights[f"{n}_proj"]["weight"] @ z + weights[f"{n}_proj"].get("bias", 0) for n in ("gate", "up"))
        if activation == "clamped_swiglu":
            gate, up = np.minimum(gate, moe.swiglu_limit), np.clip(up, -moe.swiglu_limit, moe.swiglu_limit)
            h = gate * sigmoid(moe.swiglu_alpha * gate) * (up + 1)
        else:
            h = gate * sigmoid(gate) * up
        return weights["down_proj"]["weight"] @ h + weights["down_proj"].get("bias", 0)

    outputs, counts = [], np.zeros(moe.num_experts)
    for token in x.astype(np.float64):
        logits = p["gate"]["weight"] @ token + p["gate"].get("bias", 0)
        score = sigmoid(logits) if moe.scoring_func == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        choice = (score + p["gate"].get("e_score_correction_bias", 0)).reshape(moe.n_group, -1)
        best = np.sort(choice, axis=1)[:, -(1 if moe.group_score == "max" else 2) :].sum(axis=1)
        allowed = np.argsort(-best)[: moe.topk_group]
        choice = np.where(np.isin(np.arange(moe.n_group), allowed)[:, None], choice, -np.inf).ravel()
        chosen = np.argsort(-choice)[: moe.num_experts_per_tok]
        weight = score[chosen] / (score[chosen].sum() if moe.norm_topk_prob else 1) * moe.routed_scaling_factor
        y = np.zeros(D)
        for e, w in zip(chosen, weight, strict=True):
            counts[e] += 1
            expert = jax.tree.map(lambda array, e=e: array[e], p["experts"])
            y += mlp(expert, w * token, moe.expert_act) if moe.scale_inputs else w * mlp(expert, token, moe.expert_act)
        if moe.shared_expert_intermediate_size:
            gate = sigmoid(p["shared_expert_gate"]["weight"] @ token) if moe.shared_expert_gate else 1
            y += gate * mlp(p["shared_expert"], token, "silu")
        outputs.append(y)
    return np.stack(outputs), counts


@pytest.mark.parametrize("name", ["everything", *(pytest.param(n, marks=pytest.mark.slow) for n in list(CASES)[1:])])
def test_a_block_equals_its_formula_and_padding_goes_nowhere(name: str) -> None:
    moe = CASES[name]
    block = random_moe(moe)
    x = np.random.default_rng(2).standard_normal((*TOKENS, D)).astype(np.float32)
    segment_ids = jnp.asarray(np.where(np.arange(7) < 5, 1, 0) * np.ones((2, 1), int), jnp.int32)
    graphdef, state = nnx.split(block)
    run = jax.jit(lambda state, present: nnx.merge(graphdef, state)(jnp.asarray(x), present))
    y, load = run(state, segment_ids > 0)
    present = np.asarray(segment_ids).ravel() > 0
    expected, counts = formula(block, moe, x.reshape(-1, D)[present])
    np.testing.assert_allclose(y.reshape(-1, D)[present], expected, atol=2e-5)
    np.testing.assert_array_equal(load.counts, counts)
    assert int(load.tokens) == present.sum()
    if not moe.shared_expert_intermediate_size:
        assert not np.any(y.reshape(-1, D)[~present])
    # Without segments the same tokens give the same, and the padding counts.
    assert run(state, None)[1].counts.sum() == x[..., 0].size * moe.num_experts_per_tok
    # Negative control: weights that are a tenth larger are noticed.
    other = dataclasses.replace(moe, routed_scaling_factor=1.1 * moe.routed_scaling_factor)
    assert np.abs(formula(block, other, x.reshape(-1, D)[present])[0] - expected).max() > 1e-2


def test_the_load_balancing_loss_is_transformers() -> None:
    """E sum f P over the tokens of all layers; 1 per choice where every expert gets the same."""
    even = Load(jnp.full((3, 4), 6.0), jnp.full((3, 4), 3.0), jnp.full(3, 12.0))
    assert load_balancing_loss(even, 4) == pytest.approx(2.0)
    assert {name: float(x) for name, x in utilisation(even).items()} == {"moe/busiest": 1.0, "moe/idle": 0.0}
    one = Load(jnp.asarray([[12.0, 0, 0, 0]]), jnp.asarray([[12.0, 0, 0, 0]]), jnp.asarray([12.0]))
    assert load_balancing_loss(one, 4) == pytest.approx(4.0)
    assert {name: float(x) for name, x in utilisation(one).items()} == {"moe/busiest": 4.0, "moe/idle": 0.75}


@functools.cache
def random_decoder(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Split; jitted, because every eager random draw compiles."""
    graphdef = nnx.graphdef(abstract_decoder(config, jnp.float32))
    return graphdef, jax.jit(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))()


def decoder_of(config: DecoderConfig) -> Decoder:
    return nnx.merge(*random_decoder(config))


def batch(tokens: np.ndarray, segment_ids: np.ndarray | None = None) -> Batch:
    tokens = jnp.asarray(tokens, jnp.int32)
    ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32), tokens[:, 1:].shape)
    positions = positions if ids is None else None
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones(tokens[:, 1:].shape, jnp.float32), ids, positions)


@pytest.mark.slow
def test_the_router_is_frozen_unless_asked_for_and_then_pays_for_imbalance() -> None:
    decoder = decoder_of(config_of(dataclasses.replace(PLAIN, router_aux_loss_coef=0.5)))
    data = batch(np.random.default_rng(0).integers(0, 50, (1, 12)))
    labels.set_trainable(decoder, {"base"})
    base_def, base = nnx.split(decoder)
    plain, _, metrics = jax.jit(lambda base: losses.sft(nnx.merge(base_def, base), data))(base)
    assert "moe/aux_loss" not in metrics
    assert float(metrics["moe/busiest"][0]) >= 1
    labels.set_trainable(decoder, {"router"})
    graphdef, trainable, frozen = labels.split(decoder)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}
    assert names == {"model.layers.mlp.gate.weight"}

    def loss(trainable: nnx.State, coefficient: float) -> Any:
        model = nnx.merge(graphdef, trainable, frozen)
        model.config = config_of(dataclasses.replace(PLAIN, router_aux_loss_coef=coefficient))
        total, weight, metrics = losses.sft(model, data)
        return total, (weight, metrics)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (total, (weight, metrics)), gradient = run(trainable, 0.5)
    penalty = metrics["moe/aux_loss"][0]
    np.testing.assert_allclose(total, plain + 0.5 * penalty * weight, rtol=1e-5)
    without = run(trainable, 0.0)[1]
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient, without)
    assert max(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.slow
def test_padding_of_rows_without_segment_ids_goes_nowhere() -> None:
    """One document a row, and an empty row: the same loss, experts' load and count of tokens as with segment ids."""
    decoder = decoder_of(config_of(dataclasses.replace(PLAIN, router_aux_loss_coef=0.5)))
    labels.set_trainable(decoder, {"router"})
    graphdef, params = nnx.split(decoder)
    with_ids = lay_out(random_examples([11, 5, 2], vocab_size=50), [[0], [1], [2], []], 12)
    run = jax.jit(lambda text: losses.sft(nnx.merge(graphdef, params), text))
    expected, found = run(with_ids), run(with_ids.one_document_a_row())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), expected, found)
    assert found[2]["tokens"] == 18
    full = with_ids.one_document_a_row()._replace(positions=np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12)))
    assert abs(run(full)[2]["moe/aux_loss"][0] - expected[2]["moe/aux_loss"][0]) > 1e-3


def test_layers_of_several_kinds_are_stacks_of_their_own_under_hf_names() -> None:
    config = config_of(layers=3, mlp_layer_types=("dense", "sparse", "sparse"))
    names = expected_tensors(config)
    for layer, kind in enumerate(config.mlp_layer_types):
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in names) == (kind == "dense")
        assert (f"model.layers.{layer}.mlp.experts.5.up_proj.weight" in names) == (kind == "sparse")
    assert names["model.layers.2.mlp.experts.0.down_proj.weight"] == (D, 12)
    decoder = decoder_of(config)
    views = tensor_views(decoder)
    assert set(views) == set(names)
    third = decoder.model.layers.sparse.mlp.experts.up_proj.weight.get_value()[1, 4]
    np.testing.assert_array_equal(views["model.layers.2.mlp.experts.4.up_proj.weight"].read(), third)


@pytest.mark.slow
def test_adapters_of_experts_are_split_and_every_remat_policy_gives_their_gradients() -> None:
    """W + scale B A for each expert, with gradients by autodiff of that; and no policy changes them."""
    config = config_of(layers=3, mlp_layer_types=("dense", "sparse", "sparse"))
    decoder = decoder_of(config)
    lora.attach(decoder, lora.LoraConfig(r=2, lora_alpha=6), key=jax.random.key(0))
    rng = np.random.default_rng(5)
    tensors = {
        n: rng.standard_normal(a.shape).astype(np.float32) * 0.3 for n, a in lora.adapter_tensors(decoder).items()
    }
    lora.load_adapter_tensors(decoder, tensors)
    assert "model.layers.1.mlp.experts.3.up_proj.lora_A.weight" in tensors
    again = lora.adapter_tensors(decoder)
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array)
    data = batch(rng.integers(0, 50, (2, 9)), np.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2]))
    data = data._replace(loss_mask=(data.segment_ids > 0).astype(jnp.float32))
    graphdef, trainable, frozen = labels.split(decoder)

    def gradients(policy: str) -> Any:
        def loss(trainable: nnx.State) -> jax.Array:
            model = nnx.merge(graphdef, trainable, frozen)
            model.remat = policy
            return losses.sft(model, data)[0]

        return jax.jit(jax.grad(loss))(trainable)

    found = gradients("none,unroll=all")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, gradients("offload,unroll=1"))

    # Of W + s B A, whose gradient is dW: dA = s B^T dW and dB = s dW A^T.
    merged, modules = lora.without_adapter(decoder), lora.linears(decoder)
    for path, module in lora.linears(merged).items():
        a, b = (np.asarray(factor.get_value()) for factor in (modules[path].lora_A, modules[path].lora_B))
        module.weight.set_value(module.weight.get_value() + jnp.asarray(3 * b @ a))
    labels.set_trainable(merged, {"base"})
    merged_def, base, rest = labels.split(merged)
    run = jax.jit(jax.grad(lambda base: losses.sft(nnx.merge(merged_def, base, rest), data)[0]))
    d_weights = {".".join(map(str, path[:-1])): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(run(base))}
    for path, variable in nnx.to_flat_state(found):
        name, part = ".".join(map(str, path[:-1])), path[-1]
        a, b = (np.asarray(factor.get_value()) for factor in (modules[name].lora_A, modules[name].lora_B))
        expected = 3 * (b.mT @ d_weights[name] if part == "lora_A" else d_weights[name] @ a.mT)
        np.testing.assert_allclose(variable.get_value(), expected, atol=1e-4, err_msg=name)
        assert np.abs(expected).max() > 1e-3, name


@pytest.mark.slow
def test_experts_in_4_bits_need_a_flag_and_compute_with_what_the_codes_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "moe_intermediate_size": 32}
    folder = write_tiny_hf(tmp_path, {**arch_config("qwen3_moe", smallest("qwen3_moe")), **sizes})
    loaded = functools.partial(FastLanguageModel.from_pretrained, str(folder), dtype="float32", load_in_4bit=False)
    model, _ = loaded(load_experts_in_4bit=True)
    assert "experts are in MXFP4" in "".join(capsys.readouterr()).replace("\n", " ")
    plain, _ = loaded()
    ids = np.random.default_rng(0).integers(0, 96, (1, 9))
    before = np.asarray(plain(ids))
    for name in ("gate_proj", "up_proj", "down_proj"):
        coded, exact = (getattr(m.decoder.model.layers.mlp.experts, name).weight for m in (model, plain))
        assert isinstance(coded.get_value(), MXFP4Tensor)
        exact.set_value(coded.get_value().dequantize(jnp.float32))
    np.testing.assert_allclose(model(ids), plain(ids), atol=1e-5)
    assert np.abs(np.asarray(plain(ids)) - before).max() > 0.05


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "llama4_text"])
def test_adapters_of_stacked_experts_are_pefts_parameters_and_come_back(family: str) -> None:
    """What peft computes of them (`ParamWrapper.get_delta_weight`) is each expert's own scale * B A, in its place."""
    hf, spec = arch_config(family, smallest(family)), ARCHS[family]
    layout = spec.tensors(spec.decoder_config(hf, "test"))
    modules = [n.removesuffix(".weight") for n in layout.decoder if ".experts." in n and n.endswith(".weight")]
    rng, r, scale = np.random.default_rng(0), 3, 2.0
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        out, inputs = layout.decoder[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((r, inputs), np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((out, r), np.float32)
    adapter = make_adapter(lora.LoraConfig(r=r, lora_alpha=r * scale), tensors, base_model_name_or_path=None)
    stored = experts_to_hf(adapter, layout, spec)
    assert stored.config["target_parameters"] == [op.hf for op in spec.expert_parameters]
    holder, experts = spec.expert_parameters[0].hf.rpartition(".")[0], layout_experts(layout)
    for op, inside in zip(spec.expert_parameters, (".base_layer", ""), strict=True):
        a, b = (stored.tensors[f"model.layers.1.{holder}{inside}.lora_{part}.weight"] for part in "AB")
        a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
        delta = np.einsum("ore,eri->eoi", b, a) * scale_of(stored, f"model.layers.1.{op.hf}")
        names = [f"model.layers.1.{part.format(e)}" for e in range(experts) for part in op.parts]
        pairs = [[tensors[n.replace(".weight", f".lora_{part}.weight")] for part in "BA"] for n in names]
        (whole,) = {layout.decoder[name].names[0] for name in names}
        expected = layout.hf[whole].compute(*(scale * left @ right for left, right in pairs))
        np.testing.assert_allclose(delta if delta.shape == expected.shape else delta.mT, expected, atol=1e-5)
    back = experts_to_decoder(stored, layout, spec)
    assert back.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(back.tensors[name], array, err_msg=name)
    assert scale_of(back, modules[0]) == scale_of(back, modules[-1]) == scale
    broken = dict(stored.tensors)
    broken[f"model.layers.0.{holder}.lora_B.weight"] = broken[f"model.layers.0.{holder}.lora_B.weight"][:-1]
    with pytest.raises(JaxftError, match=r"experts\.down_proj.*does not fit"):
        experts_to_decoder(Adapter(stored.config, broken), layout, spec)


def layout_experts(layout: Layout) -> int:
    """E of a layout's layers."""
    return 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in layout.decoder if ".experts." in name)


def test_what_cannot_be_is_refused() -> None:
    for change, message in (
        ({"num_experts_per_tok": 7}, "exceeds the 6"),
        ({"n_group": 4}, "does not divide"),
        ({"n_group": 2, "topk_group": 3}, "exceeds n_group"),
        ({"num_experts": 0}, "positive"),
    ):
        with pytest.raises(JaxftError, match=message):
            dataclasses.replace(PLAIN, **change)
    with pytest.raises(JaxftError, match="moe"):
        config_of(None, mlp_layer_types=("dense", "sparse"))
