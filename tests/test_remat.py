"""Remat policies: what they are spelt as, what a layer then keeps, and that no policy changes a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import losses
from jaxft.errors import JaxftError
from jaxft.models import labels, remat
from jaxft.models.remat import LayerPolicy, Span, parse_remat, spans
from jaxpr_tools import all_equations, residual_avals
from models import batch_of, decoder_of, random_examples, with_adapter

EVERYTHING = LayerPolicy(everything=True)
UNROLLED = EVERYTHING._replace(unroll=None)
MIXED = "offload+attn_out,attn_lse,q,k,v,mid,gate,up*1"


@pytest.mark.parametrize(("value", "policy"), [(True, "full"), (False, "none"), (None, "none"), ("unsloth", "offload")])
def test_spellings(value, policy):
    assert parse_remat(value) == policy


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("none", [Span(0, 4, EVERYTHING)]),
        ("full", [Span(0, 4, LayerPolicy())]),
        ("offload", [Span(0, 4, LayerPolicy(offloaded=("layer_input",)))]),
        ("mid, gate@host", [Span(0, 4, LayerPolicy(("mid",), ("gate",)))]),
        ("full*1 + none", [Span(0, 1, LayerPolicy()), Span(1, 4, EVERYTHING)]),
        ("full+none*4", [Span(0, 4, EVERYTHING)]),
        ("offload,prefetch=0", [Span(0, 4, LayerPolicy(offloaded=("layer_input",), prefetch=0))]),
        ("offload,tile=8", [Span(0, 4, LayerPolicy(offloaded=("layer_input",), tile=8))]),
        ("full,weights", [Span(0, 4, LayerPolicy(weights=True))]),
        ("none,weights", [Span(0, 4, EVERYTHING._replace(weights=True))]),
        ("mid,unroll=2+none,unroll=all*1", [Span(0, 3, LayerPolicy(("mid",), unroll=2)), Span(3, 4, UNROLLED)]),
    ],
)
def test_spans(policy, expected):
    assert spans(policy, 4) == tuple(expected)


@pytest.mark.parametrize(
    "policy",
    [
        "some",
        "full,none",
        "full,none,weights",
        "mid@disk",
        "full*x",
        "full+none",
        "",
        "full+",
        "full,tile=0",
        "full,unroll=x",
        "gate,tile=4",
        "block=2",
    ],
)
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(JaxftError, match=r"use_gradient_checkpointing|remat"):
        parse_remat(policy)


@pytest.mark.parametrize("policy", ["full*5", "full*3", "full+none*5"])
def test_counts_that_do_not_fit_the_layers_are_refused(policy):
    with pytest.raises(JaxftError, match="4 layers"):
        spans(policy, 4)


def test_offloads():
    assert [remat.offloads(policy) for policy in ("none", "full", "offload", MIXED, "mid")] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_one_part_without_prefetching_decides_for_the_program():
    assert [remat.prefetches(policy) for policy in ("offload", MIXED, "offload,prefetch=0+full*1")] == [
        True,
        True,
        False,
    ]


def program(policy: str):
    """(loss of the adapter, the adapter): of a decoder of three layers with this policy."""
    decoder = with_adapter(decoder_of(quantization="nf4", remat=policy))
    graphdef, trainable, frozen = labels.split(decoder)
    batch = batch_of(random_examples([9, 4, 12]), [[0, 1], [2]], 16)
    micro = jax.tree.map(lambda a: jnp.asarray(a[0]), batch)
    return lambda t: losses.sft(nnx.merge(graphdef, t, frozen), micro)[0], trainable


@pytest.fixture(scope="module")
def reference():
    loss, trainable = program("none")
    return jax.jit(jax.value_and_grad(loss))(trainable)


@pytest.mark.parametrize("policy", ["attn_out,attn_lse,q", MIXED, pytest.param("all", marks=pytest.mark.slow)])
def test_no_policy_changes_a_gradient(reference, policy):
    loss, trainable = program(policy)
    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    np.testing.assert_allclose(value, reference[0], rtol=1e-5)
    for found, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(reference[1]), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def kept(policy: str) -> list[tuple[int, ...]]:
    return [aval.shape for aval in residual_avals(*program(policy))]


def test_a_named_array_is_kept_once_a_layer_and_a_full_policy_keeps_only_inputs():
    full, gate = kept("full"), kept("gate")
    assert full.count((3, 2, 16, 64)) == 1, "the layers' inputs"
    assert (3, 32, 160) not in full
    assert sorted(gate) == sorted([*full, (3, 32, 160)])


def test_the_adapters_are_not_copied_for_the_backward_pass():
    """Their stacks are what it reads: the layers' loop gives back its input and the layers' inputs, nothing else."""
    loss, trainable = program("full")
    forward = next(e for e in all_equations(jax.make_jaxpr(jax.grad(loss))(trainable)) if e.primitive.name == "scan")
    assert [v.aval.shape for v in forward.outvars] == [(2, 16, 64), (3, 2, 16, 64)]
