"""The language-model head and its cross-entropy in one op, without an array of [tokens, vocabulary] size.

    z[n]       = logits of hidden[n]: scale, bias and soft cap as in head_logits.py         hidden [N, D], head [V, D]
    lse[n]     = logsumexp(z[n])
    loss[n]    = (1 - eps) (lse[n] - z[n, targets[n]]) + eps mean_v (lse[n] - z[n, v]) + z_loss lse[n]^2
    loss_sum   = sum_n w[n] loss[n]            weight_sum = sum_n w[n]            w[n] = weights[n], 0 where ignored

eps is the label smoothing. With p = exp(z - lse) and

    d_z[n, v]  = w[n] ((1 + 2 z_loss lse[n]) p[n, v] - (1 - eps) [v = targets[n]] - eps / V)
    d_raw[n]   = d_z[n] logit_scale (1 - (z[n] / soft_cap)^2)

the gradients are

    d_hidden[n] = d_raw[n] @ head      d_head = sum_n d_raw[n]^T hidden[n]      d_bias = sum_n d_raw[n]
    d_weights[n] = loss[n]

times the cotangent of loss_sum, a scalar. So the forward pass computes them while it has a chunk's logits, and the
backward pass only scales (after Liger-Kernel, arXiv:2410.10989). Which ones it computes is decided by what is being
differentiated: a frozen head costs no d_head.

Tokens of weight 0 cost nothing: the others are gathered to the front and the loop runs ceil(active / chunk_size) times,
a number known only at run time (no autodiff goes through the loop, so it may be).

The kernel is everything between the two matmuls: a program per token reads its row of logits once for the maximum and
the sum, and once more, from the L2 cache, to write d_raw over it. Both are in the dtype of hidden and head: bfloat16
logits are rounded once, as Hugging Face, torch, Liger-Kernel and Unsloth round them, float32 ones never.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend, head_logits
from pallas_kernels.head_logits import NO_LOGIT, Cap, default_chunk_size
from pallas_kernels.op import REFERENCE, Case, Choice, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of next-token cross-entropies, differentiable in hidden, head, weights and bias.

    >>> hidden, head = jnp.eye(2, 3), jnp.eye(4, 3)
    >>> loss_sum, weight_sum = linear_cross_entropy(hidden, head, jnp.array([0, -100]))
    >>> print(f"{loss_sum:.4f} over {weight_sum:.0f} token")  # log(e + 3) - 1; the second target is ignored
    0.7437 over 1 token
    >>> mean_loss = lambda hidden: linear_cross_entropy(hidden, head, jnp.array([0, 1]))[0] / 2
    >>> print(jax.grad(mean_loss)(hidden).round(2))
    [[-0.26  0.09  0.09]
     [ 0.09 -0.26  0.09]]

    Args:
      hidden: [N, D], the last norm's result.
      head: [V, D].
      targets: int32 [N]; anything where the weight is 0. Out of range elsewhere makes the loss NaN.
      weights: float [N]; a token of weight 0 is not computed (so the gradient of its weight is 0 too). None: all 1.
      bias: [V], added to hidden @ head^T.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap), after bias and scale.
      logit_scale: factor of the logits, after the bias (Granite's logits_scaling is its inverse).
      label_smoothing: eps: each target is a mixture of 1 - eps of itself and eps of the uniform distribution.
      z_loss: factor of logsumexp^2, which is added to each token's loss.
      ignore_index: a token with this target has weight 0.
      chunk_size: tokens whose logits exist at one time; None chooses from the shapes.
      implementation: "pallas", "xla" or None.

    Returns:
      (loss_sum, weight_sum), float32 scalars.

    Raises:
      ValueError: shapes that do not fit, or a soft_cap, label_smoothing or chunk_size out of range.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    head_logits.check("linear_cross_entropy", hidden, head, targets, bias, soft_cap, chunk_size)
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"linear_cross_entropy: weights {weights.shape} do not fit targets {targets.shape}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be from 0 to 1, not {label_smoothing}")
    return LINEAR_CROSS_ENTROPY(
        hidden,
        head,
        targets,
        jnp.ones(targets.shape, jnp.float32) if weights is None else weights,
        bias=bias,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        implementation=implementation,
    )


MOST_COLUMNS = 8192  # of a row that a program holds at a time


@dataclasses.dataclass(frozen=True)
class _Loss:
    """What is the same for every token.

    Attributes:
      kernel: compute the chunk's loss and gradient in one Pallas kernel.
      logits_dtype: the dtype in which a chunk's raw logits are kept.
    """

    chunk_size: int
    cap: Cap
    label_smoothing: float
    z_loss: float
    kernel: bool
    logits_dtype: Any


class _Wanted(NamedTuple):
    """Which gradients the loop computes."""

    hidden: bool
    head: bool
    weights: bool
    bias: bool

    def logits(self) -> bool:
        """Whether any comes through the logits."""
        return self.hidden or self.head or self.bias


class _Gradients(NamedTuple):
    """Of loss_sum; None where not wanted. d_hidden is rounded to hidden's dtype, the others are float32."""

    hidden: jax.Array | None
    head: jax.Array | None
    weights: jax.Array | None
    bias: jax.Array | None


def _chunk_loop(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    settings: _Loss,
    wanted: _Wanted,
) -> tuple[jax.Array, _Gradients]:
    num_tokens, chunk_size = hidden.shape[0], settings.chunk_size
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
        loss, new = _loss_of_rows(x, head.astype(dtype), bias, target, w, settings, wanted)
        d_hidden, d_head, d_weights, d_bias = gradients
        if d_hidden is not None and new.hidden is not None:
            d_hidden = d_hidden.at[index].set(new.hidden.astype(hidden.dtype), mode="drop", unique_indices=True)
        if d_head is not None and new.head is not None:
            d_head = d_head + new.head
        if d_weights is not None:
            d_weights = d_weights.at[index].set(loss, mode="drop", unique_indices=True)
        if d_bias is not None and new.bias is not None:
            d_bias = d_bias + new.bias
        return loss_sum + jnp.sum(w * loss), _Gradients(d_hidden, d_head, d_weights, d_bias)

    gradients = _Gradients(
        jnp.zeros(hidden.shape, hidden.dtype) if wanted.hidden else None,
        jnp.zeros(head.shape, jnp.float32) if wanted.head else None,
        jnp.zeros(weights.shape, jnp.float32) if wanted.weights else None,
        jnp.zeros(bias.shape, jnp.float32) if bias is not None and wanted.bias else None,
    )
    return jax.lax.fori_loop(0, num_chunks, body, (jnp.float32(0), gradients))


def _loss_of_rows(
    x: jax.Array,
    head: jax.Array,
    bias: jax.Array | None,
    target: jax.Array,
    w: jax.Array,
    settings: _Loss,
    wanted: _Wanted,
) -> tuple[jax.Array, _Gradients]:
    """x [C, D] -> (loss [C], the wanted gradients of sum w loss, that of x [C, D]), from whole rows of logits."""
    raw = _matmul("nd,vd->nv", x, head, settings.logits_dtype)
    chunk_loss = _kernel_loss if settings.kernel else _plain_loss
    loss, d_raw = chunk_loss(raw, bias, target, w, settings, x.dtype if wanted.logits() else None)
    factor = d_raw.astype(x.dtype)
    return loss, _Gradients(
        _matmul("nv,vd->nd", factor, head, x.dtype) if wanted.hidden else None,
        einsum_float32("nv,nd->vd", factor, x) if wanted.head else None,
        None,
        jnp.sum(d_raw, axis=0, dtype=jnp.float32) if wanted.bias else None,
    )


def _matmul(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """A product summed in float32 and rounded once, to `dtype`, by the matmul itself where that is the inputs' dtype.

    With a float32 result a GPU would write, read and round it in a second pass.
    """
    if dtype == x.dtype != jnp.float32:
        return jnp.einsum(subscripts, x, y)
    return einsum_float32(subscripts, x, y).astype(dtype)


def _plain_loss(
    raw: jax.Array, bias: jax.Array | None, target: jax.Array, w: jax.Array, settings: _Loss, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """raw [C, V], bias [V], target [C], w [C] -> (loss [C], w d_loss / d_raw [C, V]), float32."""
    eps, vocab_size = settings.label_smoothing, raw.shape[1]
    raw = raw.astype(jnp.float32)
    logits = settings.cap.logits(raw if bias is None else raw + bias.astype(jnp.float32)[None, :])
    lse = jax.nn.logsumexp(logits, axis=-1)
    rows = jnp.arange(raw.shape[0], dtype=jnp.int32)
    in_range = (target >= 0) & (target < vocab_size)
    target_logit = jnp.where(in_range, logits.at[rows, target].get(mode="clip"), jnp.nan)
    loss = lse - (1 - eps) * target_logit + settings.z_loss * lse * lse
    if eps:
        loss = loss - eps * jnp.mean(logits, axis=-1)
    one_hot = (jnp.arange(vocab_size, dtype=target.dtype)[None, :] == target[:, None]).astype(jnp.float32)
    p = jnp.exp(logits - lse[:, None])
    d_logits = (1 + 2 * settings.z_loss * lse)[:, None] * p - (1 - eps) * one_hot - eps / vocab_size
    return loss, settings.cap.pull_back(d_logits * w[:, None], logits)


def _kernel_loss(
    raw: jax.Array, bias: jax.Array | None, target: jax.Array, w: jax.Array, settings: _Loss, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """`_plain_loss` by the kernel: d_raw rounded to `dtype`, in raw's memory if that is its dtype; None: just raw."""
    num_rows, vocab_size = raw.shape
    loss_shape = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    out = backend.call(
        _linear_cross_entropy_kernel,
        raw,
        target,
        w,
        *([] if bias is None else [bias]),
        out=(loss_shape,) if dtype is None else (loss_shape, jax.ShapeDtypeStruct(raw.shape, dtype)),
        grid=(num_rows,),
        num_warps=16,
        aliases={0: 1} if raw.dtype == dtype else None,
        has_bias=bias is not None,
        settings=settings,
        block=min(MOST_COLUMNS, 1 << (vocab_size - 1).bit_length()),
    )
    return out[0], raw if dtype is None else out[1]


def _linear_cross_entropy_kernel(
    raw_ref, target_ref, w_ref, *refs, has_bias: bool, settings: _Loss, block: int
) -> None:
    """One row of logits a program: its loss and, over the row itself, the gradient of w * loss."""
    bias_ref = refs[0] if has_bias else None
    loss_ref, *d_raw_refs = refs[1:] if has_bias else refs
    cap, eps, vocab_size = settings.cap, settings.label_smoothing, raw_ref.shape[1]
    row = backend.program_id(0)
    target = backend.load(target_ref.at[row])
    load = functools.partial(head_logits.load_logits, raw_ref, bias_ref, row, block=block, cap=cap)

    def add_block(start, mask, carry):
        return _add_logits(carry, load(start, mask), start, mask, target)

    zero = jnp.float32(0)
    nothing = _Statistics(jnp.float32(NO_LOGIT), zero, zero, zero)
    maximum, total, target_logit, logit_sum = head_logits.fold_row(add_block, nothing, vocab_size, block)
    lse = maximum + jnp.log(total)
    in_range = (target >= 0) & (target < vocab_size)
    target_logit = jnp.where(in_range, target_logit, jnp.float32(jnp.nan))
    loss = lse - (1 - eps) * target_logit - (eps / vocab_size) * logit_sum + settings.z_loss * lse * lse
    backend.store(loss_ref.at[row], loss)
    if not d_raw_refs:
        return
    w = backend.load(w_ref.at[row])
    p_factor = 1 + 2 * settings.z_loss * lse

    def write_block(start, mask, carry):
        logits = load(start, mask)
        columns = start + jnp.arange(block, dtype=jnp.int32)
        one_hot = jnp.where(columns == target, jnp.float32(1 - eps), 0.0)
        d_logits = p_factor * jnp.exp(logits - lse) - one_hot - jnp.float32(eps / vocab_size)
        d_raw = cap.pull_back(d_logits * w, logits)
        d_raw_ref = d_raw_refs[0].at[row, backend.ds(start, block)]
        backend.store(d_raw_ref, d_raw.astype(d_raw_refs[0].dtype), mask=mask)
        return carry

    head_logits.fold_row(write_block, 0, vocab_size, block)


class _Statistics(NamedTuple):
    """Of the blocks of a row of logits so far, float32 scalars."""

    maximum: jax.Array
    total: jax.Array  # sum of exp(logit - maximum)
    target_logit: jax.Array
    logit_sum: jax.Array


def _add_logits(
    statistics: _Statistics, logits: jax.Array, start: jax.Array, mask: jax.Array | None, target: jax.Array
) -> _Statistics:
    """In a kernel: the statistics (scalars) with a block of logits from column `start` on added."""
    maximum = jnp.maximum(statistics.maximum, jnp.max(logits))
    columns = start + jnp.arange(logits.shape[0], dtype=jnp.int32)
    counted = logits if mask is None else jnp.where(mask, logits, 0.0)
    return _Statistics(
        maximum,
        statistics.total * jnp.exp(statistics.maximum - maximum) + jnp.sum(jnp.exp(logits - maximum)),
        statistics.target_logit + jnp.sum(jnp.where(columns == target, counted, 0.0)),
        statistics.logit_sum + jnp.sum(counted),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss_sum(hidden, head, targets, weights, bias, settings):
    return _chunk_loop(hidden, head, targets, weights, bias, settings, _Wanted(False, False, False, False))[0]


def _loss_sum_fwd(hidden, head, targets, weights, bias, settings):
    wanted = _Wanted(hidden.perturbed, head.perturbed, weights.perturbed, bias is not None and bias.perturbed)
    bias_value = None if bias is None else bias.value
    loss_sum, gradients = _chunk_loop(
        hidden.value, head.value, targets.value, weights.value, bias_value, settings, wanted
    )
    arguments = _Gradients(hidden.value, head.value, weights.value, bias_value)
    rounded = (
        None if gradient is None or value is None else gradient.astype(value.dtype)
        for gradient, value in zip(gradients, arguments, strict=True)
    )
    return loss_sum, _Gradients(*rounded)


def _loss_sum_bwd(settings, gradients, g):
    d_hidden, d_head, d_weights, d_bias = (
        None if gradient is None else (gradient.astype(jnp.float32) * g).astype(gradient.dtype)
        for gradient in gradients
    )
    return d_hidden, d_head, None, d_weights, d_bias


_loss_sum.defvjp(_loss_sum_fwd, _loss_sum_bwd, symbolic_zeros=True)


def _run(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    kernel: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The op, by the kernel or by XLA, which keeps the logits in float32."""
    if hidden.shape[0] == 0:
        return jnp.float32(0), jnp.float32(0)
    logits_dtype = jnp.promote_types(hidden.dtype, head.dtype) if kernel else jnp.float32
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0], head.shape[0], backend.platform(), logits_dtype)
    settings = _Loss(chunk_size, Cap(soft_cap, logit_scale), label_smoothing, z_loss, kernel, logits_dtype)
    weights = jnp.where(targets == ignore_index, 0, weights)
    loss_sum: jax.Array = _loss_sum(hidden, head, targets, weights, bias, settings)
    return loss_sum, jnp.sum(weights.astype(jnp.float32))


def _rank(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        return (Choice("pallas", "one kernel turns logits into their gradient in place: 26.7 ms, XLA 29.5 on an H100"),)
    return (Choice(REFERENCE, "kernels are only interpreted here"),)


def _case(
    name: str,
    num_tokens: int,
    vocab_size: int,
    size: int,
    chunk_size: int,
    active: float = 1.0,
    bias: bool = False,
    **options: float,
) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        weights = rng.uniform(0.5, 1.5, num_tokens) * (rng.random(num_tokens) < active)
        return {
            "hidden": normal(rng, (num_tokens, size), dtype),
            "head": normal(rng, (vocab_size, size), dtype, scale=size**-0.5),
            "targets": jnp.asarray(rng.integers(0, vocab_size, num_tokens, np.int32)),
            "weights": jnp.asarray(weights.astype(np.float32)),
            "chunk_size": chunk_size,
            **({"bias": normal(rng, (vocab_size,), dtype)} if bias else {}),
            **options,
        }

    differentiable = ("hidden", "head", "weights") + (("bias",) if bias else ())
    return Case(name, make, max(num_tokens, vocab_size, size), differentiable)


EVERYTHING: dict[str, float] = {
    "soft_cap": 3.0,
    "logit_scale": 1.5,
    "label_smoothing": 0.1,
    "z_loss": 0.05,
    "ignore_index": 7,
}

LINEAR_CROSS_ENTROPY = register(
    Op(
        name="linear_cross_entropy",
        implementations={
            REFERENCE: Implementation(_run),
            "pallas": Implementation(functools.partial(_run, kernel=True), head_logits.refuses_kernel),
        },
        cases=(
            _case("one chunk larger than the tokens", 3, 50, 12, chunk_size=128),
            _case("chunks do not divide, few active tokens", 45, 101, 24, chunk_size=7, active=0.3),
            _case("none active", 9, 33, 8, chunk_size=4, active=0.0),
            _case("every option", 21, 67, 16, chunk_size=8, bias=True, **EVERYTHING),
            _case("z-loss alone", 5, 32, 8, chunk_size=8, z_loss=0.1),
            _case("label smoothing alone", 5, 32, 8, chunk_size=8, label_smoothing=0.2),
        ),
        rank=_rank,
        roundings=4,
        replaces="head matmul, softmax cross-entropy and their backward passes",
        saves="the [tokens, vocabulary] logits and their gradient; tokens of weight 0",
    )
)
