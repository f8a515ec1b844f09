"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), Hugging Face's "rotate half" convention.

Value i of a head is paired with value i + R/2; each pair is rotated by its position's angle:

    y[i]       = x[i] cos - x[i + R/2] sin
    y[i + R/2] = x[i + R/2] cos + x[i] sin        i < R/2 <= H/2

Values from R on pass through. q [B, T, N, H], k [B, T, K, H], cos and sin float32 [B, T, R/2]: of each token, so packed
documents restart by their positions. The backward pass is the transposed rotation, the same formula with -sin; nothing
but cos and sin is kept for it. cos and sin are constants: they get no gradient.

The kernel rotates q and k in one launch, in place (XLA copies what somebody still needs); a program has all heads of
its tokens, and neither reads nor writes the values from R on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.op import Case, Choice, Implementation, Op, normal, register


def rope(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns q and k, each head rotated by its token's angles; computed in float32, returned in their dtypes.

    Args:
      q: [B, T, N, H], float.
      k: [B, T, K, H], float.
      cos, sin: float32 [B, T, R/2], R <= H, of each token; constants, whose gradient is zero.
      implementation: "pallas", "xla" or None for the fastest.

    Raises:
      ValueError: the shapes do not fit.
      ImplementationError: the named implementation does not exist or cannot run these arguments.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import rope
    >>> q = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    >>> quarter_turn_of_first_pair = jnp.array([[[0.0, 1.0]]]), jnp.array([[[1.0, 0.0]]])
    >>> rotated_q, rotated_k = rope(q, 2 * q, *quarter_turn_of_first_pair)
    >>> print(rotated_q.ravel(), rotated_k.ravel())
    [-3.  2.  1.  4.] [-6.  4.  2.  8.]
    """
    if (
        q.ndim != 4
        or k.shape != (*q.shape[:2], *k.shape[2:3], q.shape[3])
        or cos.shape != (*q.shape[:2], *cos.shape[2:3])
        or cos.shape != sin.shape
        or 2 * cos.shape[2] > q.shape[3]
    ):
        raise ValueError(
            f"rope: q {q.shape}, k {k.shape}, cos {cos.shape} and sin {sin.shape} do not fit [B, T, N, H], "
            "[B, T, K, H] and twice [B, T, R/2] with R <= H"
        )
    return ROPE(q, k, cos, sin, implementation=implementation)


def _reference(q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    cos, sin = jax.lax.stop_gradient((cos, sin))
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)


class _Tiling(NamedTuple):
    """Tokens and warps of a program, and whether it writes over its inputs."""

    tokens: int = 1
    num_warps: int = 4
    in_place: bool = True


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _rope(
    q_ref, k_ref, cos_ref, sin_ref, rotated_q_ref, rotated_k_ref, *, tiling: _Tiling, half: int, transpose: bool
) -> None:
    """Refs [tokens, heads, H] and, of the angles, [tokens, R/2]."""
    start = backend.program_id(0) * tiling.tokens
    tokens, block_half = backend.ds(start, tiling.tokens), _power_of_two(half)
    in_rows = None
    if q_ref.shape[0] % tiling.tokens:
        in_rows = start + jnp.arange(tiling.tokens) < q_ref.shape[0]
    in_half = None if block_half == half else jnp.arange(block_half) < half
    angle_mask = _mask(in_rows, in_half)
    cos, sin = (
        backend.load(ref.at[tokens, backend.ds(0, block_half)], mask=angle_mask)[:, None, :]
        for ref in (cos_ref, sin_ref)
    )
    if transpose:
        sin = -sin
    # Pallas refuses a known slice that reaches past the end, although it is masked; this one it does not know.
    second_start = half + 0 * start
    for x_ref, out_ref in ((q_ref, rotated_q_ref), (k_ref, rotated_k_ref)):
        heads = x_ref.shape[1]
        block_heads = _power_of_two(heads)
        in_heads = None if block_heads == heads else jnp.arange(block_heads) < heads
        mask = _mask(in_rows, in_heads, in_half)
        low = (tokens, backend.ds(0, block_heads), backend.ds(0, block_half))
        high = (*low[:2], backend.ds(second_start, block_half))
        first, second = (backend.load(x_ref.at[part], mask=mask).astype(jnp.float32) for part in (low, high))
        backend.store(out_ref.at[low], (first * cos - second * sin).astype(out_ref.dtype), mask=mask)
        backend.store(out_ref.at[high], (second * cos + first * sin).astype(out_ref.dtype), mask=mask)


def _mask(*axes: jax.Array | None) -> jax.Array | None:
    """A mask of as many axes, each given by its own mask [size] (None: all there); None where every one is None."""
    masks = []
    for axis, mask in enumerate(axes):
        if mask is not None:
            shape = [1] * len(axes)
            shape[axis] = mask.size
            masks.append(mask.reshape(shape))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _call(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array, tiling: _Tiling, *, transpose: bool
) -> tuple[jax.Array, jax.Array]:
    tokens, half = q.shape[0] * q.shape[1], cos.shape[-1]
    flat_q, flat_k = (x.reshape(tokens, *x.shape[2:]) for x in (q, k))
    rotated_q, rotated_k = backend.call(
        _rope,
        flat_q,
        flat_k,
        cos.reshape(tokens, half),
        sin.reshape(tokens, half),
        out=(jax.ShapeDtypeStruct(flat_q.shape, q.dtype), jax.ShapeDtypeStruct(flat_k.shape, k.dtype)),
        grid=(-(-tokens // tiling.tokens),),
        num_warps=tiling.num_warps,
        aliases={0: 0, 1: 1} if tiling.in_place else None,
        tiling=tiling,
        half=half,
        transpose=transpose,
    )
    return rotated_q.reshape(q.shape), rotated_k.reshape(k.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kernel_call(q, k, cos, sin, tiling: _Tiling):
    return _call(q, k, cos, sin, tiling, transpose=False)


def _kernel_call_fwd(q, k, cos, sin, tiling):
    return _kernel_call(q, k, cos, sin, tiling), (cos, sin)


def _kernel_call_bwd(tiling, residuals, cotangents):
    (d_q, d_k), (cos, sin) = cotangents, residuals
    return *_call(d_q, d_k, cos, sin, tiling, transpose=True), None, None


_kernel_call.defvjp(_kernel_call_fwd, _kernel_call_bwd)


def _pallas(q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _kernel_call(q, k, cos, sin, _Tiling())


def _refuses(platform: str, q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> str | None:
    if not (q.shape[2] and k.shape[2] and cos.shape[2]):
        return "there are no heads, or no values to rotate"
    largest = _power_of_two(max(q.shape[2], k.shape[2])) * _power_of_two(cos.shape[2])
    if largest > 2**15:
        return f"{max(q.shape[2], k.shape[2])} heads of {2 * cos.shape[2]} rotated values are too many for a program"
    return backend.refuses_platform(platform)


def _rank(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    if platform == "gpu":
        return (Choice("pallas", "it rotates q and k in place in one launch; as fast as XLA, which needs new arrays"),)
    return (Choice("xla", "the kernel is for GPUs"),)


def _case(name: str, q_shape: tuple[int, int, int, int], num_kv_heads: int, half: int) -> Case:
    batch, length, _, head_dim = q_shape

    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        angle = rng.uniform(0, 2 * np.pi, (batch, length, half)).astype(np.float32)
        return {
            "q": normal(rng, q_shape, dtype),
            "k": normal(rng, (batch, length, num_kv_heads, head_dim), dtype),
            "cos": jnp.asarray(np.cos(angle)),
            "sin": jnp.asarray(np.sin(angle)),
        }

    return Case(name, make, reduction=2, differentiable=("q", "k"))


ROPE = register(
    Op(
        name="rope",
        replaces="two rotations into new arrays",
        saves="new arrays for q and k",
        implementations={"xla": Implementation(_reference), "pallas": Implementation(_pallas, refuses=_refuses)},
        rank=_rank,
        cases=(
            _case("whole heads", (2, 7, 4, 64), 2, 32),
            _case("part of each head", (1, 5, 3, 18), 3, 5),
            _case("one kv head", (2, 3, 5, 12), 1, 6),
        ),
    )
)
