"""The language-model head and its cross-entropy in one op, without an array of [tokens, vocabulary] size.

    logits[n] = hidden[n] @ head^T                              hidden [N, D], head [V, D]
    loss[n]   = logsumexp(logits[n]) - logits[n, targets[n]]
    loss_sum  = sum_n weights[n] loss[n]                        weight_sum = sum_n weights[n]

With d[n] = weights[n] (softmax(logits[n]) - onehot(targets[n])) the gradients are

    d_hidden[n] = d[n] @ head        d_head = sum_n d[n]^T hidden[n]        d_weights[n] = loss[n]

times the cotangent of loss_sum, a scalar. So the forward pass computes them while it has a chunk's logits, and the
backward pass only scales (after Liger-Kernel, arXiv:2410.10989). Which ones it computes is decided by what is being
differentiated: a frozen head costs no d_head.

Tokens of weight 0 cost nothing: the others are gathered to the front and the loop runs ceil(active / chunk_size) times,
a number known only at run time (no autodiff goes through the loop, so it may be).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.op import Case, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32

# Logits of one chunk, in elements. A CPU's GEMM is fast from 128 rows on, and a chunk that few active tokens leave
# half empty is wasted work; a GPU reads the whole head once or twice a chunk and wants some 500 rows to hide that.
CHUNK_ELEMENTS = {"cpu": 2**22}
CHUNK_ELEMENTS_ACCELERATOR = 2**26
MIN_CHUNK_SIZE = 128


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of next-token cross-entropies, differentiable in hidden, head and weights.

    Args:
      hidden: [N, D].
      head: [V, D].
      targets: int32 [N]; anything where the weight is 0. Out of range elsewhere makes the loss NaN.
      weights: float [N]; a token of weight 0 is not computed (so the gradient of its weight is 0 too). None: all 1.
      chunk_size: tokens whose logits exist at one time; None chooses from the shapes.
      implementation: "xla" or None.

    Returns:
      (loss_sum, weight_sum), float32 scalars.

    Raises:
      ValueError: shapes that do not fit, or a chunk_size below 1.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.shape}, head {head.shape} and targets {targets.shape} do not fit "
            "[N, D], [V, D], [N]"
        )
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0], head.shape[0], jax.default_backend())
    if chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size must be at least 1, not {chunk_size}")
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    return LINEAR_CROSS_ENTROPY(hidden, head, targets, weights, chunk_size=chunk_size, implementation=implementation)


def default_chunk_size(num_tokens: int, vocab_size: int, platform: str) -> int:
    """Tokens a chunk: what the platform's logits budget holds, in multiples of 128; no more than there are."""
    budget = CHUNK_ELEMENTS.get(platform, CHUNK_ELEMENTS_ACCELERATOR) // vocab_size
    return max(1, min(num_tokens, max(MIN_CHUNK_SIZE, budget // MIN_CHUNK_SIZE * MIN_CHUNK_SIZE)))


class _Wanted(NamedTuple):
    """Which gradients the loop computes."""

    hidden: bool
    head: bool
    weights: bool


class _Gradients(NamedTuple):
    """Of loss_sum; None where not wanted. d_hidden is rounded to hidden's dtype, the others are float32."""

    hidden: jax.Array | None
    head: jax.Array | None
    weights: jax.Array | None


def _chunk_loop(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk_size: int, wanted: _Wanted
) -> tuple[jax.Array, _Gradients]:
    num_tokens = hidden.shape[0]
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    active = weights != 0
    num_chunks = (jnp.sum(active, dtype=jnp.int32) + chunk_size - 1) // chunk_size
    # The active tokens' indices, in order; then num_tokens, which gathers fill with zeros and scatters drop.
    padded_size = num_tokens + -num_tokens % chunk_size
    order = jnp.nonzero(active, size=padded_size, fill_value=num_tokens)[0].astype(jnp.int32)

    def body(chunk: jax.Array, carry: tuple[jax.Array, _Gradients]) -> tuple[jax.Array, _Gradients]:
        loss_sum, gradients = carry
        index = jax.lax.dynamic_slice(order, (chunk * chunk_size,), (chunk_size,))
        w = weights.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)
        x = hidden.at[index].get(mode="fill", fill_value=0).astype(dtype)
        target = targets.at[index].get(mode="fill", fill_value=0)
        loss, d_logits = _chunk_loss(x, head.astype(dtype), target)
        d_logits = (d_logits * w[:, None]).astype(dtype)
        d_hidden, d_head, d_weights = gradients
        if d_hidden is not None:
            rows = einsum_float32("nv,vd->nd", d_logits, head.astype(dtype)).astype(d_hidden.dtype)
            d_hidden = d_hidden.at[index].set(rows, mode="drop", unique_indices=True)
        if d_head is not None:
            d_head = d_head + einsum_float32("nv,nd->vd", d_logits, x)
        if d_weights is not None:
            d_weights = d_weights.at[index].set(loss, mode="drop", unique_indices=True)
        return loss_sum + jnp.sum(w * loss), _Gradients(d_hidden, d_head, d_weights)

    gradients = _Gradients(
        jnp.zeros(hidden.shape, hidden.dtype) if wanted.hidden else None,
        jnp.zeros(head.shape, jnp.float32) if wanted.head else None,
        jnp.zeros(weights.shape, jnp.float32) if wanted.weights else None,
    )
    return jax.lax.fori_loop(0, num_chunks, body, (jnp.float32(0), gradients))


def _chunk_loss(x: jax.Array, head: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [C, D], head [V, D], target [C] -> (loss [C], softmax - onehot [C, V]), float32."""
    logits = einsum_float32("nd,vd->nv", x, head)
    lse = jax.nn.logsumexp(logits, axis=-1)
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    in_range = (target >= 0) & (target < head.shape[0])
    target_logit = jnp.where(in_range, logits.at[rows, target].get(mode="clip"), jnp.nan)
    one_hot = jnp.arange(head.shape[0], dtype=target.dtype)[None, :] == target[:, None]
    return lse - target_logit, jnp.exp(logits - lse[:, None]) - one_hot.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_sum(hidden, head, targets, weights, chunk_size):
    return _chunk_loop(hidden, head, targets, weights, chunk_size, _Wanted(False, False, False))[0]


def _loss_sum_fwd(hidden, head, targets, weights, chunk_size):
    wanted = _Wanted(hidden.perturbed, head.perturbed, weights.perturbed)
    loss_sum, gradients = _chunk_loop(hidden.value, head.value, targets.value, weights.value, chunk_size, wanted)
    d_head, d_weights = (
        None if gradient is None else gradient.astype(primal.value.dtype)
        for gradient, primal in ((gradients.head, head), (gradients.weights, weights))
    )
    return loss_sum, _Gradients(gradients.hidden, d_head, d_weights)


def _loss_sum_bwd(chunk_size, gradients, g):
    d_hidden, d_head, d_weights = (
        None if gradient is None else (gradient.astype(jnp.float32) * g).astype(gradient.dtype)
        for gradient in gradients
    )
    return d_hidden, d_head, None, d_weights


_loss_sum.defvjp(_loss_sum_fwd, _loss_sum_bwd, symbolic_zeros=True)


def _reference(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    loss_sum: jax.Array = _loss_sum(hidden, head, targets, weights, chunk_size)
    return loss_sum, jnp.sum(weights.astype(jnp.float32))


def _case(name: str, num_tokens: int, vocab_size: int, size: int, chunk_size: int, active: float = 1.0) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        weights = rng.uniform(0.5, 1.5, num_tokens) * (rng.random(num_tokens) < active)
        return {
            "hidden": normal(rng, (num_tokens, size), dtype),
            "head": normal(rng, (vocab_size, size), dtype, scale=size**-0.5),
            "targets": jnp.asarray(rng.integers(0, vocab_size, num_tokens, np.int32)),
            "weights": jnp.asarray(weights.astype(np.float32)),
            "chunk_size": chunk_size,
        }

    return Case(name, make, max(num_tokens, vocab_size, size), differentiable=("hidden", "head", "weights"))


LINEAR_CROSS_ENTROPY = register(
    Op(
        name="linear_cross_entropy",
        implementations={"xla": Implementation(_reference)},
        cases=(
            _case("chunks do not divide", 37, 101, 24, chunk_size=8),
            _case("few active tokens", 45, 67, 16, chunk_size=7, active=0.2),
            _case("none active", 9, 33, 8, chunk_size=4, active=0.0),
            _case("one chunk larger than the tokens", 3, 50, 12, chunk_size=128),
        ),
        roundings=4,
    )
)
