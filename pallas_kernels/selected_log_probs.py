"""Log-probability of one token, entropy and logsumexp, of each row of a language-model head's logits.

    z[n]       = logits of hidden[n]: scale, bias and soft cap as in head_logits.py         hidden [N, D], head [V, D]
    lse[n]     = logsumexp(z[n])            p[n] = exp(z[n] - lse[n])
    log_prob[n] = z[n, targets[n]] - lse[n]
    entropy[n] = -sum_v p[n, v] log p[n, v] = lse[n] - sum_v p[n, v] z[n, v]

Preference and reinforcement losses are functions of these per-token results, often through sums over whole sequences,
so their cotangents g_log_prob, g_entropy and g_lse are arbitrary and known only in the backward pass:

    d_z[n, v]  = g_log_prob[n] ([v = targets[n]] - p[n, v]) - g_entropy[n] p[n, v] (log p[n, v] + entropy[n])
                 + g_lse[n] p[n, v]
    d_raw[n]   = d_z[n] logit_scale (1 - (z[n] / soft_cap)^2)

    d_hidden[n] = d_raw[n] @ head      d_head = sum_n d_raw[n]^T hidden[n]      d_bias = sum_n d_raw[n]

Saved are the arguments, lse and entropy; the backward pass computes the logits again, a chunk of tokens at a time.
There is never an array of [tokens, vocabulary] size. Logits are float32 whatever the inputs: a ratio of probabilities
under two policies must not see the rounding of a logit.

The kernels are what stands between the matmuls, a program per token: forward one pass over its row of logits (a running
maximum m with s0 = sum e^(z - m) and s1 = sum e^(z - m) (z - m), so lse = m + log s0, entropy = log s0 - s1 / s0), and
backward one pass that reads logits and writes d_raw.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend, head_logits
from pallas_kernels.head_logits import NO_LOGIT, Cap, default_chunk_size
from pallas_kernels.op import REFERENCE, Case, Choice, Implementation, Op, normal, register
from pallas_kernels.precision import einsum_float32


def selected_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each token's log-probability, and its distribution's entropy and logsumexp; differentiable, all three.

    >>> hidden, head = jnp.eye(2, 3), jnp.eye(4, 3)
    >>> log_probs, entropy, logsumexp = selected_log_probs(hidden, head, jnp.array([0, 3]))
    >>> for name, values in {"log": log_probs, "entropy": entropy, "logsumexp": logsumexp}.items():
    ...     print(name, [f"{value:.3f}" for value in values])  # of e / (e + 3) and of 1 / (e + 3)
    log ['-0.744', '-1.744']
    entropy ['1.268', '1.268']
    logsumexp ['1.744', '1.744']
    >>> mask = jnp.array([1.0, 0.0])
    >>> loss = lambda hidden: -jnp.sum(mask * selected_log_probs(hidden, head, jnp.array([0, 3]))[0])
    >>> print(jax.grad(loss)(hidden).round(2))
    [[-0.52  0.17  0.17]
     [ 0.    0.    0.  ]]

    Args:
      hidden: [N, D], the last norm's result.
      head: [V, D].
      targets: int32 [N]. Out of range makes this token's log-probability NaN (select with `jnp.where`, not by a
        factor) and nothing else.
      bias: [V], added to hidden @ head^T.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap), after bias and scale.
      logit_scale: factor of the logits, after the bias; 1 / temperature for sampling's distribution.
      chunk_size: tokens whose logits exist at one time; None chooses from the shapes.
      implementation: "pallas", "xla" or None.

    Returns:
      (log_probs, entropy, logsumexp), float32 [N] each.

    Raises:
      ValueError: shapes that do not fit, or a soft_cap or chunk_size out of range.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    head_logits.check("selected_log_probs", hidden, head, targets, bias, soft_cap, chunk_size)
    return SELECTED_LOG_PROBS(
        hidden,
        head,
        targets,
        bias=bias,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        chunk_size=chunk_size,
        implementation=implementation,
    )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is the same for every token; block and num_warps are the kernels'."""

    chunk_size: int
    cap: Cap
    kernel: bool = False
    block: int = 4096
    num_warps: int = 8

    def row_block(self, vocab_size: int) -> int:
        """Columns at a time: no more than the row needs."""
        return min(self.block, 1 << (vocab_size - 1).bit_length())


class _PerToken(NamedTuple):
    """The three results, or their cotangents: float32 [N] each."""

    log_prob: jax.Array
    entropy: jax.Array
    lse: jax.Array


class _Gradients(NamedTuple):
    """None where not wanted. d_hidden is rounded to hidden's dtype, the others are float32."""

    hidden: jax.Array | None
    head: jax.Array | None
    bias: jax.Array | None


def _over_chunks(num_tokens: int, chunk_size: int, step: Callable[..., Any], carry: Any) -> Any:
    """`carry = step(start, first, carry)` for every chunk: it has the rows from `start`, those from `first` are new.

    The last chunk begins early rather than ending late, so that nothing is padded, and it comes first, so that what it
    writes to rows of another chunk is overwritten.
    """
    count = -(-num_tokens // chunk_size)

    def body(i: jax.Array, carry: Any) -> Any:
        first = (count - 1 - i) * chunk_size
        return step(jnp.minimum(first, num_tokens - chunk_size), first, carry)

    return jax.lax.fori_loop(0, count, body, carry)


def _raw_logits(x: jax.Array, head: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, head.dtype)
    return einsum_float32("nd,vd->nv", x.astype(dtype), head.astype(dtype))


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, bias: jax.Array | None, settings: _Settings
) -> _PerToken:
    chunk_size, num_tokens = settings.chunk_size, hidden.shape[0]
    chunk_results = _kernel_results if settings.kernel else _plain_results

    def step(start: jax.Array, first: jax.Array, results: _PerToken) -> _PerToken:
        x, target = (jax.lax.dynamic_slice_in_dim(array, start, chunk_size) for array in (hidden, targets))
        chunk = chunk_results(_raw_logits(x, head), bias, target, settings)
        update = jax.lax.dynamic_update_slice_in_dim
        return _PerToken(*(update(whole, part, start, 0) for whole, part in zip(results, chunk, strict=True)))

    return _over_chunks(num_tokens, chunk_size, step, _PerToken(*(jnp.zeros(num_tokens, jnp.float32),) * 3))


def _backward(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None,
    results: _PerToken,
    cotangents: _PerToken,
    gradients: _Gradients,
    settings: _Settings,
) -> _Gradients:
    """Adds to `gradients`, zeros at first."""
    chunk_size, num_tokens = settings.chunk_size, hidden.shape[0]
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    chunk_gradient = _kernel_gradient if settings.kernel else _plain_gradient

    def step(start: jax.Array, first: jax.Array, gradients: _Gradients) -> _Gradients:
        arrays = (hidden, targets, results, cotangents)
        x, target, result, g = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk_size), arrays)
        d_raw = chunk_gradient(_raw_logits(x, head), bias, target, result, g, settings, dtype)
        d_hidden, d_head, d_bias = gradients
        if d_hidden is not None:
            rows = einsum_float32("nv,vd->nd", d_raw.astype(dtype), head.astype(dtype)).astype(hidden.dtype)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, rows, start, 0)
        new = start + jnp.arange(chunk_size, dtype=jnp.int32) >= first
        if d_head is not None:
            new_x = jnp.where(new[:, None], x.astype(dtype), jnp.zeros((), dtype))
            d_head = d_head + einsum_float32("nv,nd->vd", d_raw.astype(dtype), new_x)
        if d_bias is not None:
            d_bias = d_bias + jnp.sum(jnp.where(new[:, None], d_raw.astype(jnp.float32), 0.0), axis=0)
        return _Gradients(d_hidden, d_head, d_bias)

    return _over_chunks(num_tokens, chunk_size, step, gradients)


def _plain_logits(raw: jax.Array, bias: jax.Array | None, cap: Cap) -> jax.Array:
    return cap.logits(raw if bias is None else raw + bias.astype(jnp.float32)[None, :])


def _plain_results(raw: jax.Array, bias: jax.Array | None, target: jax.Array, settings: _Settings) -> _PerToken:
    """raw float32 [C, V], bias [V], target [C] -> [C] each."""
    logits = _plain_logits(raw, bias, settings.cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - lse[:, None]
    rows = jnp.arange(raw.shape[0], dtype=jnp.int32)
    in_range = (target >= 0) & (target < raw.shape[1])
    log_prob = jnp.where(in_range, log_p.at[rows, target].get(mode="clip"), jnp.nan)
    return _PerToken(log_prob, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), lse)


def _plain_gradient(
    raw: jax.Array,
    bias: jax.Array | None,
    target: jax.Array,
    result: _PerToken,
    g: _PerToken,
    settings: _Settings,
    dtype: Any,
) -> jax.Array:
    """The gradient of raw, float32 [C, V]."""
    logits = _plain_logits(raw, bias, settings.cap)
    log_p = logits - result.lse[:, None]
    one_hot = (jnp.arange(raw.shape[1], dtype=target.dtype)[None, :] == target[:, None]).astype(jnp.float32)
    p_factor = (g.lse - g.log_prob)[:, None] - g.entropy[:, None] * (log_p + result.entropy[:, None])
    return settings.cap.pull_back(g.log_prob[:, None] * one_hot + p_factor * jnp.exp(log_p), logits)


def _kernel_results(raw: jax.Array, bias: jax.Array | None, target: jax.Array, settings: _Settings) -> _PerToken:
    """`_plain_results` by a kernel."""
    out = jax.ShapeDtypeStruct(target.shape, jnp.float32)
    results = backend.call(
        _selected_log_probs_kernel,
        raw,
        target,
        *([] if bias is None else [bias]),
        out=(out,) * 3,
        grid=target.shape,
        num_warps=settings.num_warps,
        has_bias=bias is not None,
        cap=settings.cap,
        block=settings.row_block(raw.shape[1]),
    )
    return _PerToken(*results)


def _kernel_gradient(
    raw: jax.Array,
    bias: jax.Array | None,
    target: jax.Array,
    result: _PerToken,
    g: _PerToken,
    settings: _Settings,
    dtype: Any,
) -> jax.Array:
    """`_plain_gradient` by a kernel, rounded to `dtype`, and in raw's memory where that has the same."""
    return backend.call(
        _selected_log_probs_backward_kernel,
        raw,
        target,
        result.entropy,
        result.lse,
        *g,
        *([] if bias is None else [bias]),
        out=jax.ShapeDtypeStruct(raw.shape, dtype),
        grid=target.shape,
        num_warps=settings.num_warps,
        aliases={0: 0} if raw.dtype == dtype else None,
        has_bias=bias is not None,
        cap=settings.cap,
        block=settings.row_block(raw.shape[1]),
    )


def _selected_log_probs_kernel(raw_ref, target_ref, *refs, has_bias: bool, cap: Cap, block: int):
    """One row of logits a program."""
    bias_ref = refs[0] if has_bias else None
    log_prob_ref, entropy_ref, lse_ref = refs[1:] if has_bias else refs
    vocab_size = raw_ref.shape[1]
    row = backend.program_id(0)
    target = backend.load(target_ref.at[row])

    def add_block(start, mask, carry):
        maximum, s0, s1, target_logit = carry
        logits = head_logits.load_logits(raw_ref, bias_ref, row, start, mask, block, cap)
        columns = start + jnp.arange(block, dtype=jnp.int32)
        target_logit = target_logit + jnp.sum(jnp.where(columns == target, logits, 0.0))
        new_maximum = jnp.maximum(maximum, jnp.max(logits))
        fall = maximum - new_maximum
        below = logits - new_maximum
        powers = jnp.exp(below)
        s1 = jnp.exp(fall) * (s1 + fall * s0) + jnp.sum(powers * below)
        s0 = jnp.exp(fall) * s0 + jnp.sum(powers)
        return new_maximum, s0, s1, target_logit

    zero = jnp.float32(0)
    start = (jnp.float32(NO_LOGIT), zero, zero, zero)
    maximum, s0, s1, target_logit = head_logits.fold_row(add_block, start, vocab_size, block)
    in_range = (target >= 0) & (target < vocab_size)
    log_prob = jnp.where(in_range, target_logit - maximum - jnp.log(s0), jnp.float32(jnp.nan))
    backend.store(log_prob_ref.at[row], log_prob)
    backend.store(entropy_ref.at[row], jnp.log(s0) - s1 / s0)
    backend.store(lse_ref.at[row], maximum + jnp.log(s0))


def _selected_log_probs_backward_kernel(
    raw_ref, target_ref, entropy_ref, lse_ref, g_log_prob_ref, g_entropy_ref, g_lse_ref, *refs, has_bias, cap, block
):
    """One row of logits a program."""
    bias_ref, d_raw_ref = refs if has_bias else (None, *refs)
    row = backend.program_id(0)
    target, entropy, lse, g_log_prob, g_entropy, g_lse = (
        backend.load(ref.at[row])
        for ref in (target_ref, entropy_ref, lse_ref, g_log_prob_ref, g_entropy_ref, g_lse_ref)
    )

    def write_block(start, mask, carry):
        logits = head_logits.load_logits(raw_ref, bias_ref, row, start, mask, block, cap)
        log_p = logits - lse
        columns = start + jnp.arange(block, dtype=jnp.int32)
        d_logits = jnp.exp(log_p) * (g_lse - g_log_prob - g_entropy * (log_p + entropy))
        d_raw = cap.pull_back(d_logits + jnp.where(columns == target, g_log_prob, 0.0), logits)
        backend.store(d_raw_ref.at[row, backend.ds(start, block)], d_raw.astype(d_raw_ref.dtype), mask=mask)
        return carry

    head_logits.fold_row(write_block, 0, raw_ref.shape[1], block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _results(hidden, head, targets, bias, settings):
    return _forward(hidden, head, targets, bias, settings)


def _results_fwd(hidden, head, targets, bias, settings):
    # () or None for "wanted" or not: residuals are trees of arrays, and this is in the tree.
    wanted = tuple(None if x is None or not x.perturbed else () for x in (hidden, head, bias))
    arguments = (hidden.value, head.value, targets.value, None if bias is None else bias.value)
    results = _forward(arguments[0], arguments[1], arguments[2], arguments[3], settings)
    return results, (arguments, results._replace(log_prob=None), wanted)


def _results_bwd(settings, residuals, cotangents):
    (hidden, head, targets, bias), results, wanted = residuals
    cotangents = _PerToken(
        *(
            jnp.zeros(g.shape, jnp.float32) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g
            for g in cotangents
        )
    )
    zeros = _Gradients(
        None if wanted[0] is None else jnp.zeros_like(hidden),
        None if wanted[1] is None else jnp.zeros(head.shape, jnp.float32),
        None if wanted[2] is None else jnp.zeros(bias.shape, jnp.float32),
    )
    d_hidden, d_head, d_bias = _backward(hidden, head, targets, bias, results, cotangents, zeros, settings)
    d_head, d_bias = (
        None if gradient is None else gradient.astype(x.dtype) for gradient, x in ((d_head, head), (d_bias, bias))
    )
    return d_hidden, d_head, None, d_bias


_results.defvjp(_results_fwd, _results_bwd, symbolic_zeros=True)


def _run(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    **tuning: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The op; `tuning` is `_Settings`'."""
    num_tokens = hidden.shape[0]
    if num_tokens == 0:
        nothing = jnp.zeros(0, jnp.float32)
        return nothing, nothing, nothing
    if chunk_size is None:
        chunk_size = default_chunk_size(num_tokens, head.shape[0], backend.platform())
    settings = _Settings(min(chunk_size, num_tokens), Cap(soft_cap, logit_scale), **tuning)
    results: _PerToken = _results(hidden, head, targets, bias, settings)
    return results.log_prob, results.entropy, results.lse


def _rank(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        return (Choice("pallas", "each kernel goes over a chunk's logits once: 42.6 ms, XLA 44.7 on an H100"),)
    return (Choice(REFERENCE, "kernels are only interpreted here"),)


def _case(
    name: str, num_tokens: int, vocab_size: int, size: int, chunk_size: int, bias: bool = False, **options: float
) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {
            "hidden": normal(rng, (num_tokens, size), dtype),
            "head": normal(rng, (vocab_size, size), dtype, scale=size**-0.5),
            "targets": jnp.asarray(rng.integers(0, vocab_size, num_tokens, np.int32)),
            "chunk_size": chunk_size,
            **({"bias": normal(rng, (vocab_size,), dtype)} if bias else {}),
            **options,
        }

    differentiable = ("hidden", "head") + (("bias",) if bias else ())
    return Case(name, make, max(num_tokens, vocab_size, size), differentiable)


SELECTED_LOG_PROBS = register(
    Op(
        name="selected_log_probs",
        implementations={
            REFERENCE: Implementation(_run),
            "pallas": Implementation(functools.partial(_run, kernel=True), head_logits.refuses_kernel),
        },
        cases=(
            _case("one chunk larger than the tokens", 3, 50, 12, chunk_size=128),
            _case("chunks do not divide, every option", 21, 67, 16, 8, bias=True, soft_cap=3.0, logit_scale=1.5),
        ),
        rank=_rank,
        roundings=4,
        replaces="head matmul, log-softmax, gather and entropy",
        saves="the [tokens, vocabulary] logits, which the backward pass computes again",
    )
)
