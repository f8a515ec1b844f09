"""The mixture of experts: a router, experts that each token uses a few of, and shared ones that it always uses.

With p the router's scores of a token x, C the K experts that it goes to and w[e] their weights, made from p:

    y = sum over e in C of w[e] down_e(act(gate_e(x)) * up_e(x))   (+ the shared experts' MLP of x)

Nothing is dropped: tokens are sorted by expert, and each expert multiplies its own rows (`pallas_kernels.
grouped_matmul`). The weights multiply the activations and not the results, which is the same, as down_e is linear: the
backward pass then needs no down product again. Padding goes to no expert: it costs nothing and counts
nowhere.

Shape letters: B rows, T tokens, D hidden_size, M = B T, E experts, K experts of a token, F moe_intermediate_size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

import pallas_kernels as pk
from jaxft.models.config import DecoderConfig, MoEConfig
from jaxft.models.layers import ExpertLinear, Linear, normal
from jaxft.models.mlp import MLP


class Load(NamedTuple):
    """What a layer's experts were asked for; of several layers, with a leading [L].

    Attributes:
      counts: float32 [E], how many tokens went to each expert; exact below 2^24.
      scores: float32 [E], the sum of the tokens' router probabilities, which carry the router's gradient.
      tokens: float32 [], how many tokens there were, padding left out.
    """

    counts: jax.Array
    scores: jax.Array
    tokens: jax.Array


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      experts: int32 [M, K]; E for padding, which goes nowhere.
      weights: float32 [M, K].
      load: of these tokens.
    """

    experts: jax.Array
    weights: jax.Array
    load: Load


class Router(nnx.Module):
    """Scores of all experts for each token, and the choice among them, in float32.

    Called ``gate`` as in Hugging Face's checkpoints. Frozen unless its label, "router", is asked for.
    """

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        assert config.moe is not None
        self.moe: MoEConfig = config.moe
        experts = (*stack, self.moe.num_experts)
        self.weight = nnx.Param(normal(rngs, (*experts, config.hidden_size), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros(experts, dtype)) if self.moe.router_bias else None)
        # Rounding it would change which experts are chosen, so it is in float32 whatever the rest is.
        self.e_score_correction_bias = nnx.data(
            nnx.Param(jnp.zeros(experts, jnp.float32)) if self.moe.score_correction_bias else None
        )

    def __call__(self, x_MD: jax.Array, present_M: jax.Array | None) -> Routing:
        """x [M, D] -> Routing; tokens that are not `present` (bool [M]; None: all are) go nowhere."""
        weight_ED = self.weight.get_value().astype(jnp.float32)
        logits_ME = jnp.einsum("md,ed->me", x_MD.astype(jnp.float32), weight_ED, precision=jax.lax.Precision.HIGHEST)
        if self.bias is not None:
            logits_ME = logits_ME + self.bias.get_value().astype(jnp.float32)[None, :]
        score = jax.nn.sigmoid if self.moe.scoring_func == "sigmoid" else jax.nn.softmax
        scores_ME = score(logits_ME)
        _, experts_MK = jax.lax.top_k(self._for_choice(scores_ME), self.moe.num_experts_per_tok)
        weights_MK = jnp.take_along_axis(scores_ME, experts_MK, axis=1)
        if self.moe.norm_topk_prob:
            weights_MK = weights_MK / (jnp.sum(weights_MK, axis=1, keepdims=True) + 1e-20)
        weights_MK = weights_MK * self.moe.routed_scaling_factor
        probabilities_ME = scores_ME if self.moe.scoring_func == "softmax" else jax.nn.softmax(logits_ME)
        if present_M is None:
            present_M = jnp.ones(x_MD.shape[0], bool)
        experts_MK = jnp.where(present_M[:, None], experts_MK, self.moe.num_experts)
        chosen_MKE = experts_MK[:, :, None] == jnp.arange(self.moe.num_experts, dtype=jnp.int32)[None, None, :]
        load = Load(
            jnp.sum(chosen_MKE, axis=(0, 1), dtype=jnp.float32),
            jnp.sum(jnp.where(present_M[:, None], probabilities_ME, 0), axis=0),
            jnp.sum(present_M, dtype=jnp.float32),
        )
        return Routing(experts_MK, weights_MK, load)

    def _for_choice(self, scores_ME: jax.Array) -> jax.Array:
        """The scores by which experts are chosen: corrected, and 0 (or less than any) outside of the best groups."""
        moe = self.moe
        scores_ME = jax.lax.stop_gradient(scores_ME)
        if self.e_score_correction_bias is not None:
            scores_ME = scores_ME + self.e_score_correction_bias.get_value()[None, :]
        if moe.n_group == 1:
            return scores_ME
        grouped = scores_ME.reshape(-1, moe.n_group, moe.num_experts // moe.n_group)
        best = jax.lax.top_k(grouped, 1 if moe.group_score == "max" else 2)[0]
        _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), moe.topk_group)
        allowed = jnp.any(groups[:, :, None] == jnp.arange(moe.n_group, dtype=jnp.int32)[None, None, :], axis=1)
        return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(scores_ME.shape)


class Experts(nnx.Module):
    """The experts' gated MLPs: three stacks of linears [E, out, in].

    Attributes:
      weigh_results: multiply the results by the weights, and not the activations, which `down_proj` then reads bare.
    """

    weigh_results = False

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        assert config.moe is not None
        self.moe: MoEConfig = config.moe

        def linears(name: str, inputs: int, outputs: int) -> ExpertLinear:
            return ExpertLinear(
                name, inputs, outputs, bias=self.moe.expert_bias,
                stack=(*stack, self.moe.num_experts), dtype=dtype, rngs=rngs,
            )  # fmt: skip

        d, f = config.hidden_size, self.moe.moe_intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (
            linears("gate_proj", d, f), linears("up_proj", d, f), linears("down_proj", f, d)
        )  # fmt: skip

    def __call__(self, x_MD: jax.Array, routing: Routing) -> jax.Array:
        """x [M, D] -> [M, D], 0 for tokens that go nowhere."""
        moe, (tokens, k) = self.moe, routing.experts.shape
        groups = routing.load.counts.astype(jnp.int32)
        order = jnp.argsort(routing.experts.reshape(-1), stable=True).astype(jnp.int32)
        rows = _Rows(order, _inverse(order), k)
        weights = rows.of_pairs(routing.weights.reshape(tokens * k, 1))
        x = rows.of_tokens(x_MD)
        if moe.scale_inputs:
            x = _scaled(x, weights)
        gate = checkpoint_name(self.gate_proj(x, groups), "gate")
        up = checkpoint_name(self.up_proj(x, groups), "up")
        h = pk.gated_activation(gate, up, activation=moe.expert_act, alpha=moe.swiglu_alpha, limit=moe.swiglu_limit)
        if moe.scale_inputs:
            return rows.sum_of_pairs(self.down_proj(h, groups))
        if self.weigh_results:
            return rows.sum_of_pairs(_scaled(self.down_proj(h, groups), weights))
        return rows.sum_of_pairs(self.down_proj(_scaled(h, weights), groups, weights))


class MoE(nnx.Module):
    """A block's MLP where it is a mixture of experts."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        assert config.moe is not None
        self.gate = Router(config, stack=stack, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, stack=stack, dtype=dtype, rngs=rngs)
        self.shared_expert: MLP | None = nnx.data(None)
        self.shared_expert_gate: Linear | None = nnx.data(None)
        if config.moe.shared_expert_intermediate_size:
            f = config.moe.shared_expert_intermediate_size
            self.shared_expert = MLP(config, f, stack=stack, dtype=dtype, rngs=rngs)
        if config.moe.shared_expert_gate:
            self.shared_expert_gate = Linear(
                "shared_expert_gate", config.hidden_size, 1, bias=False, stack=stack, dtype=dtype, rngs=rngs
            )

    def __call__(
        self, x_BTD: jax.Array, present_BT: jax.Array | None, dropout_key: jax.Array | None = None, **mlp: Any
    ) -> tuple[jax.Array, Load]:
        """x [B, T, D] -> ([B, T, D], what the experts were asked for); see `Router` for tokens that are not present.

        `mlp`: as of `MLP`, for the shared experts.
        """
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.gate(x_MD, None if present_BT is None else present_BT.reshape(-1))
        y_BTD = self.experts(x_MD, routing).reshape(x_BTD.shape)
        if self.shared_expert is not None:
            shared_BTD = self.shared_expert(x_BTD, dropout_key, **mlp)
            if self.shared_expert_gate is not None:
                gate = jax.nn.sigmoid(self.shared_expert_gate(x_BTD, dropout_key).astype(jnp.float32))
                shared_BTD = _scaled(shared_BTD, gate)
            y_BTD = y_BTD + shared_BTD
        return y_BTD, routing.load


def load_balancing_loss(load: Load, num_experts: int) -> jax.Array:
    """E sum_e f[e] P[e] over all layers' tokens together, f[e] the tokens that went to e and P[e] its mean score.

    Switch Transformer's equations 4 to 6 (arXiv:2101.03961), as transformers computes them; `load` has a leading [L].
    """
    tokens = jnp.maximum(jnp.sum(load.tokens), 1)
    share, score = (jnp.sum(x, axis=0) / tokens for x in (load.counts, load.scores))
    return num_experts * jnp.sum(jax.lax.stop_gradient(share) * score)


def utilisation(load: Load) -> dict[str, jax.Array]:
    """How evenly the experts are used, each the mean over layers of `load` [L, ...].

    "moe/busiest": the busiest expert's tokens over the mean expert's (1: all are alike). "moe/idle": the share of
    experts that no token went to.
    """
    mean = jnp.maximum(jnp.mean(load.counts, axis=-1), jnp.finfo(jnp.float32).tiny)
    return {
        "moe/busiest": jnp.mean(jnp.max(load.counts, axis=-1) / mean),
        "moe/idle": jnp.mean(load.counts == 0, dtype=jnp.float32),
    }


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x times a float32 factor for each row, rounded once, to x's dtype."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _inverse(order: jax.Array) -> jax.Array:
    """The permutation that undoes one."""
    places = jnp.arange(order.shape[0], dtype=order.dtype)
    return jnp.zeros_like(order).at[order].set(places, unique_indices=True)


class _Rows(NamedTuple):
    """Rows [M K, ...] sorted by expert, out of tokens and back, by gathering both ways: a scatter's sums have no order.

    Attributes:
      order: int32 [M K], the pair t * K + i, choice i of token t, that stands in each row.
      inverse: int32 [M K], the row of each pair.
      choices: K.
    """

    order: jax.Array
    inverse: jax.Array
    choices: int

    def of_tokens(self, x_MD: jax.Array) -> jax.Array:
        """Each token in its K rows."""
        return _of_tokens(self.choices, x_MD, self.order, self.inverse)

    def of_pairs(self, x: jax.Array) -> jax.Array:
        """[M K, n] of pairs, sorted."""
        return _permuted(x, self.order, self.inverse)

    def sum_of_pairs(self, rows: jax.Array) -> jax.Array:
        """[M, D]: the sum of each token's K rows."""
        pairs = _permuted(rows, self.inverse, self.order)
        pairs = pairs.reshape(-1, self.choices, rows.shape[-1])
        return jnp.sum(pairs, axis=1, dtype=jnp.float32).astype(rows.dtype)


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order]; `inverse` undoes `order`."""
    return jnp.take(x, order, axis=0)


_permuted.defvjp(
    lambda x, order, inverse: (_permuted(x, order, inverse), (order, inverse)),
    lambda indices, g: (jnp.take(g, indices[1], axis=0), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_tokens(choices: int, x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order // choices]."""
    return jnp.take(x, order // choices, axis=0)


def _of_tokens_bwd(choices: int, inverse: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    pairs = jnp.take(g, inverse, axis=0).reshape(-1, choices, g.shape[-1])
    return jnp.sum(pairs, axis=1, dtype=jnp.float32).astype(g.dtype), None, None


_of_tokens.defvjp(lambda choices, x, order, inverse: (_of_tokens(choices, x, order, inverse), inverse), _of_tokens_bwd)
