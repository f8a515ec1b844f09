"""lora_linear, lora_qkv and lora_mlp over quantized and plain weights: what they keep, what they differentiate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quant import NF4Tensor
from jaxpr_tools import all_avals, all_equations, max_elements, residual_avals
from pallas_kernels import LoraWeights, lora_linear, lora_mlp, lora_qkv

IN, OUT, RANK, LAYERS = 64, 96, 4, 3


# Compiled once: run eagerly, each of their operations would be compiled on its own.
quantized = jax.jit(NF4Tensor.quantize)
decoded = jax.jit(NF4Tensor.dequantize)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> jax.Array:
    return jnp.asarray((scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def arguments() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, weight, lora_A, lora_B; fewer tokens than a weight has elements, by far."""
    return normal(2, 5, IN), normal(OUT, IN, scale=0.1), normal(RANK, IN, scale=0.1), normal(OUT, RANK)


def test_a_quantized_weight_computes_what_its_decoded_weight_computes() -> None:
    x, weight, lora_A, lora_B = arguments()
    packed, bias = quantized(weight), normal(OUT, seed=1)

    def loss(trained, weight):
        return jnp.sum(jnp.sin(lora_linear(trained[0], weight, *trained[1:], scale=0.5)))

    run = jax.jit(jax.value_and_grad(loss))
    trained = (x, bias, lora_A, lora_B)
    got, want = run(trained, packed), run(trained, decoded(packed))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)


def test_the_backward_pass_keeps_no_decoded_weight() -> None:
    x, weight, lora_A, lora_B = arguments()
    packed = quantized(weight)
    kept = residual_avals(lambda x, A, B: lora_linear(x, packed, None, A, B), x, lora_A, lora_B)
    assert max_elements(kept) < OUT * IN
    assert any(aval.dtype == jnp.uint8 for aval in kept)
    naive = residual_avals(lambda x, A, B: lora_linear(x, packed.dequantize(), None, A, B), x, lora_A, lora_B)
    assert max_elements(naive) >= OUT * IN, "the check finds nothing where there is something"


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_keeps_the_stack_once(remat: bool) -> None:
    """No [L, out, in] array, decoded or packed, per iteration: the codes stay one constant of the loop."""
    x, _, lora_A, lora_B = arguments()
    stack = NF4Tensor.stack([quantized(normal(OUT, IN, scale=0.1, seed=seed)) for seed in range(LAYERS)])
    adapters = tuple(jnp.broadcast_to(a, (LAYERS, *a.shape)) for a in (lora_A, lora_B))

    def run(adapters, stack):
        def layer(x, scanned):
            index, lora_A, lora_B = scanned
            return jnp.tanh(lora_linear(x, stack.at_layer(index), None, lora_A, lora_B))[..., :IN], None

        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(body, x, (jnp.arange(LAYERS, dtype=jnp.int32), *adapters))[0]

    jaxpr = jax.make_jaxpr(jax.grad(lambda adapters, stack: jnp.sum(run(adapters, stack))))(adapters, stack)
    assert max_elements(aval for aval in all_avals(jaxpr) if aval.dtype == jnp.uint8) == stack.codes.size
    assert max_elements(all_avals(jaxpr)) < LAYERS * OUT * IN

    @jax.jit
    def one_by_one(x, weights):
        for weight, A, B in zip(weights, *adapters, strict=True):
            x = jnp.tanh(lora_linear(x, weight, None, A, B))[..., :IN]
        return x

    want = one_by_one(x, [decoded(weight) for weight in stack.unstack()])
    np.testing.assert_allclose(jax.jit(run)(adapters, stack), want, rtol=1e-5, atol=1e-5)


def test_a_frozen_plain_weight_keeps_no_input_and_a_trained_one_does() -> None:
    x, weight, _, _ = arguments()
    size_of_x = lambda kept: [aval.shape for aval in kept if aval.size == x.size]  # noqa: E731
    assert not size_of_x(residual_avals(lambda x: lora_linear(x, weight), x))
    assert size_of_x(residual_avals(lora_linear, x, weight))


def test_bfloat16_products_stay_bfloat16_and_adapter_gradients_are_not_rounded_to_it() -> None:
    x, weight, lora_A, lora_B = arguments()
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    grad = jax.grad(lambda A, B, w: jnp.sum(lora_linear(x, w, None, A, B).astype(jnp.float32) ** 2), (0, 1, 2))
    equations = all_equations(jax.make_jaxpr(grad)(lora_A, lora_B, weight))
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert {variable.aval.dtype for product in products for variable in product.invars} == {jnp.dtype(jnp.bfloat16)}
    of_parameters = {aval.shape for aval in (lora_A, lora_B, weight)}
    for equation in products:
        (out,), dtype = equation.outvars, equation.params["preferred_element_type"]
        assert dtype == jnp.float32 if {out.aval.shape, out.aval.shape[::-1]} & of_parameters else True
    d_A, d_B, d_weight = jax.jit(grad)(lora_A, lora_B, weight)
    assert (d_A.dtype, d_B.dtype, d_weight.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert not jnp.array_equal(d_A, d_A.astype(jnp.bfloat16).astype(jnp.float32))


def test_dropout_drops_the_adapters_input_only_and_keeps_its_mean() -> None:
    identity, zero, ones = jnp.eye(IN), jnp.zeros((IN, IN)), jnp.ones((400, IN))
    run = lambda weight, key: lora_linear(  # noqa: E731
        ones, weight, None, identity, identity, dropout=0.5, dropout_key=key
    )
    dropped = run(zero, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert abs(float(dropped.mean()) - 1) < 0.05
    np.testing.assert_array_equal(run(identity, jax.random.key(0)), dropped + 1)
    np.testing.assert_array_equal(run(zero, None), ones)


def shared_input_linears() -> tuple[jax.Array, dict[str, LoraWeights]]:
    """x [10, IN] and an MLP's linears over NF4: gate and down with adapters, up without."""
    x, weight, lora_A, lora_B = arguments()
    gate = LoraWeights(quantized(weight), None, lora_A, lora_B, 0.5)
    down = LoraWeights(quantized(weight.T), None, lora_B.T, lora_A.T, 0.5)
    return x.reshape(-1, IN), {"gate": gate, "up": LoraWeights(quantized(weight + 0.1)), "down": down}


def adapters(linears: dict[str, LoraWeights]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: (p.lora_A, p.lora_B) for name, p in linears.items() if p.lora_A is not None}


def with_adapters(linears: dict[str, LoraWeights], pairs: dict[str, tuple[jax.Array, jax.Array]]):
    return {
        name: linear._replace(lora_A=pairs[name][0], lora_B=pairs[name][1]) if name in pairs else linear
        for name, linear in linears.items()
    }


def test_the_mlp_keeps_x_gate_and_up_and_no_mask() -> None:
    x, linears = shared_input_linears()
    tokens = x.shape[0]

    def kept(dropout: float) -> list[tuple[int, ...]]:
        keyed = {n: p._replace(dropout_key=jax.random.key(0) if dropout else None) for n, p in linears.items()}
        run = lambda x, pairs: lora_mlp(x, **with_adapters(keyed, pairs), dropout=dropout)  # noqa: E731
        avals = residual_avals(run, x, adapters(linears))
        return sorted(aval.shape for aval in avals if aval.shape[:1] == (tokens,))

    rank = (tokens, RANK)
    assert kept(0.0) == sorted([x.shape, (tokens, OUT), (tokens, OUT), rank, rank])
    assert kept(0.5) == kept(0.0)


@pytest.mark.parametrize(("saved", "computed_again"), [((), 2), (("gate", "up", "lora_low_rank"), 0)])
def test_a_policy_that_keeps_gate_and_up_computes_no_product_again(saved: tuple[str, ...], computed_again: int) -> None:
    """The products with the wide weights in the forward, recomputed and backward pass; down is never computed again."""
    x, linears = shared_input_linears()
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def loss(x, pairs):
        run = jax.checkpoint(lambda x, pairs: lora_mlp(x, **with_adapters(linears, pairs)), policy=policy)
        return jnp.sum(jnp.sin(run(x, pairs)))

    # What jax.checkpoint recomputes but nobody uses, XLA removes: so count in the compiled program's input, after DCE.
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, adapters(linears))
    equations = [e for e in all_equations(jaxpr) if e.primitive.name == "dot_general"]
    wide = [e for e in equations if {v.aval.shape for v in e.invars} & {(OUT, IN), (IN, OUT)}]
    assert len(wide) == 6 + computed_again


def mlp_loss(linears, **settings):
    """(adapters, x) -> a loss of the MLP under `jax.checkpoint`, with the settings of `lora_mlp`."""
    run = jax.checkpoint(lambda pairs, x: lora_mlp(x, **with_adapters(linears, pairs), **settings))
    return lambda pairs, x: jnp.sum(jnp.sin(run(pairs, x)))


@pytest.mark.parametrize("tile", [None, 2, 5])
def test_an_mlp_that_keeps_only_its_input_has_the_same_gradients(tile: int | None) -> None:
    x, linears = shared_input_linears()
    (want_loss, want), (got_loss, got) = (
        jax.jit(jax.value_and_grad(mlp_loss(linears, **settings), argnums=(0, 1)))(adapters(linears), x)
        for settings in ({}, {"recompute": True, "tile": tile})
    )
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5), got, want)


def test_a_tiled_mlp_has_no_array_of_all_tokens_and_is_not_run_again_by_a_checkpoint() -> None:
    x, linears = shared_input_linears()
    wide = (x.shape[0], OUT)

    def program(**settings):
        return jax.make_jaxpr(jax.grad(mlp_loss(linears, **settings)))(adapters(linears), x)

    def shapes(**settings) -> list[tuple[int, ...]]:
        return [aval.shape for aval in all_avals(program(**settings))]

    def wide_products(**settings) -> int:
        equations = [e for e in all_equations(program(**settings)) if e.primitive.name == "dot_general"]
        return sum(bool({v.aval.shape for v in e.invars} & {(OUT, IN), (IN, OUT)}) for e in equations)

    assert wide not in shapes(recompute=True, tile=2)
    assert wide in shapes(recompute=True), "the check finds nothing where there is something"
    # Forward 3, gate and up again 2, their and down's input gradients 3: as with `jax.checkpoint` alone.
    assert wide_products(recompute=True) == wide_products() == 8


@pytest.mark.parametrize("tile", [0, 3])
def test_a_tile_needs_recompute(tile: int) -> None:
    x, linears = shared_input_linears()
    with pytest.raises(ValueError, match=f"tile={tile} needs recompute"):
        lora_mlp(x, **linears, tile=tile)


def test_adapters_of_qkv_share_one_product_and_one_gradient_each_way() -> None:
    x, weight, lora_A, lora_B = arguments()
    one = LoraWeights(weight, None, lora_A, lora_B)

    def loss(A, B):
        q, k, v = lora_qkv(x, *(one._replace(lora_A=A[i], lora_B=B[i]) for i in range(3)))
        return jnp.sum(jnp.sin(q + k + v))

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))([lora_A] * 3, [lora_B] * 3)
    products = [e for e in all_equations(jaxpr) if e.primitive.name == "dot_general"]
    stacked = [e for e in products if any(3 * RANK in v.aval.shape for v in (*e.invars, *e.outvars))]
    assert len(stacked) == 3  # x A^T, d A and d^T x


def test_a_trained_weight_beside_frozen_ones_gets_its_gradient() -> None:
    x, weight, lora_A, lora_B = arguments()
    frozen = LoraWeights(quantized(weight), None, lora_A, lora_B)

    def loss(weight):
        q, _, v = lora_qkv(x, LoraWeights(weight), frozen, frozen)
        return jnp.sum(jnp.sin(q) * v)

    got = jax.jit(jax.grad(loss))(weight)
    v = lora_linear(x, *frozen[:4])
    want = jax.grad(lambda w: jnp.sum(jnp.sin(jnp.einsum("bti,oi->bto", x, w, precision="highest")) * v))(weight)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_wrong_parts_are_refused() -> None:
    x, weight, lora_A, lora_B = arguments()
    good = LoraWeights(weight, None, lora_A, lora_B)
    with pytest.raises(ValueError, match="lora_qkv: k_lora_A and lora_B come together"):
        lora_qkv(x, good, good._replace(lora_B=None), good)
    with pytest.raises(ValueError, match="do not fit an input of 64 columns"):
        lora_linear(x, weight, None, lora_A[:, :3], lora_B)
    with pytest.raises(ValueError, match=r"lora_mlp: down_weight \(96, 64\) does not fit an input of 96 columns"):
        lora_mlp(x, good, good, good)
    with pytest.raises(ValueError, match="dropout must be in"):
        lora_linear(x, weight, dropout=1.0)
