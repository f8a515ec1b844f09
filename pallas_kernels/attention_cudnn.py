"""cuDNN's fused causal attention for `pallas_kernels.attention`: a pair of forward and backward functions.

JAX binds cuDNN to two private primitives. We call these, and not `jax.nn.dot_product_attention`, because only inside
our own custom_vjp can a remat policy keep the output and the logsumexp.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend

_MODULE = "jax._src.cudnn.fused_attention_stablehlo"
_ARGUMENTS = ["query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"]
_ARGUMENTS += ["page_table_k", "page_table_v"]
_STATIC = ["scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"]
_EXPECTED = {
    "_dot_product_attention_fwd": [*_ARGUMENTS, *_STATIC, "is_training"],
    "_dot_product_attention_bwd": [*_ARGUMENTS, "activation", "fwd_output", "grad_output", *_STATIC],
}
DTYPES = (jnp.bfloat16, jnp.float16)

# How much memory a backward pass may take beside its arguments and results before it goes through groups of kv heads.
# One call takes 2 GiB for 65,536 tokens with 32 heads of 128, where a step has the least to spare. On paper the copies
# that groups need take 1 % of the pass's time for one row of as many, 5 % for one of 16,384, and 18 % for 16 rows of
# 4,096, which is under 2 % of a training step. 8,192 tokens stay in one call.
SCRATCH_BYTES = 256 * 2**20


def refuses(
    platform: str,
    q: Any,
    k: Any,
    v: Any,
    *,
    segment_ids: Any = None,
    sinks: Any = None,
    soft_cap: float | None = None,
    **others: Any,
) -> str | None:
    """Why cuDNN cannot run these arguments, or None where it can."""
    if platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, not {platform!r}"
    if segment_ids is not None:
        return "it takes no segment ids: the Pallas kernel skips their blocks and is as fast"
    if soft_cap is not None or sinks is not None:
        return "JAX's binding of cuDNN has no soft cap and no sinks"
    capability = backend.compute_capability()
    if capability < backend.AMPERE:
        return f"it needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    largest = 256 if capability >= backend.HOPPER else 128
    if q.shape[-1] % 8 or q.shape[-1] > largest:
        return f"the head size must be a multiple of 8 up to {largest}, not {q.shape[-1]}"
    return _refuses_jax()


@functools.cache
def _refuses_jax() -> str | None:
    """Whether this jax still has the private primitives that `_bind` calls, with the arguments that it gives them."""
    try:
        module = importlib.import_module(_MODULE)
        names = {name: list(inspect.signature(getattr(module, name + "_abstract")).parameters) for name in _EXPECTED}
        found = all(hasattr(module, name + "_p") for name in _EXPECTED)
        found &= hasattr(module.MaskType, "CAUSAL") and hasattr(module.AttentionLayout, "BTNH")
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has no cuDNN attention where it is looked for: {error}"
    if names != _EXPECTED or not found:
        return f"the cuDNN attention of jax {jax.__version__} takes other arguments than it is given"
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: None,
    sinks: None,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, N, T])."""

    def run(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, lse = _bind("_dot_product_attention_fwd", qkv, (), scale, sliding_window)
        return out, lse

    return _over_batch(run)(q, k, v)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: None,
    sinks: None,
    out: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: None,
    groups: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Returns (dq, dk, dv, None), from what `forward` returned and its output's cotangent g."""

    def whole(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_bind("_dot_product_attention_bwd", arrays[:3], arrays[3:], scale, sliding_window))

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return in_groups(whole, groups or number_of_groups(*arrays[:2]), *arrays)

    dq, dk, dv = _over_batch(run)(q, k, v, lse, out, g.astype(q.dtype))
    return dq, dk, dv, None


def number_of_groups(q: Any, k: Any) -> int:
    """Into how many groups of kv heads a backward pass goes: as few as keep it within `SCRATCH_BYTES`.

    cuDNN's workspace is dq in float32, and dk and dv for every query head in q's dtype. A group has copies of its parts
    of q, out and their gradients and of k, v and theirs as well. Where even single heads need more than is allowed
    there are as many groups as heads, unless one call for all needs less.
    """
    workspace = q.size * (4 + 2 * q.dtype.itemsize)
    copies = (4 * q.size + 4 * k.size) * q.dtype.itemsize
    num_kv_heads = k.shape[2]
    if workspace <= SCRATCH_BYTES:
        return 1
    divisors = [n for n in range(2, num_kv_heads + 1) if num_kv_heads % n == 0]
    groups = next((n for n in divisors if workspace + copies <= n * SCRATCH_BYTES), num_kv_heads)
    return groups if workspace + copies < groups * workspace else 1


def in_groups(
    backward: Callable[..., tuple[jax.Array, ...]],
    groups: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, ...]:
    """backward(q, k, v, lse, out, g) -> (dq, dk, dv) for one group of kv heads (and their query heads) after the other.

    kv heads share nothing, so the values are those of one call. dq, dk and dv are written over g, k and v, of which no
    later group reads those parts: arrays of their own would be there all through the layers, as zeros.
    """
    if groups == 1:
        return backward(q, k, v, lse, out, g)

    def step(i: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        def mine(array: jax.Array, axis: int = 2) -> jax.Array:
            size = array.shape[axis] // groups
            return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis)

        g, k, v = map(mine, arrays)
        parts = backward(mine(q), k, v, mine(lse, 1), mine(out), g)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, i * part.shape[2], axis=2)
            for whole, part in zip(arrays, parts, strict=True)
        )

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(groups), step, (g, k, v))


def _bind(
    name: str, qkv: tuple[jax.Array, ...], saved: tuple[jax.Array, ...], scale: float, sliding_window: int | None
) -> Any:
    """Calls one of the private primitives; `saved` is (lse, out, g) for the backward one."""
    module = importlib.import_module(_MODULE)
    unused = (jnp.zeros((0,), qkv[0].dtype),) * (len(_ARGUMENTS) - len(qkv))
    return getattr(module, name + "_p").bind(
        *qkv,
        *unused,
        *saved,
        scale=float(scale),
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=module.MaskType.CAUSAL,
        layout=module.AttentionLayout.BTNH.value,
        sliding_window_length=sliding_window,
        **({} if saved else {"is_training": True}),
    )


def _over_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(*arrays) whose vmapped axis joins the batch: the primitives have no rule for it."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def _(axis_size: int, batched: Any, *arrays: jax.Array) -> tuple[Any, Any]:
        def merge(x: jax.Array, is_batched: bool) -> jax.Array:
            x = x if is_batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        results = _over_batch(function)(*map(merge, arrays, batched))
        split = [x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]) for x in results]
        return tuple(split), (True,) * len(split)

    return run
