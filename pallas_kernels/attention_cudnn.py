"""cuDNN's fused attention for `pallas_kernels.attention`, plain and packed: a pair of forward and backward functions.

JAX binds cuDNN to two private primitives. We call these, and not `jax.nn.dot_product_attention`, because only inside
our own custom_vjp can a remat policy keep the output and the logsumexp, and because the public function moves the
documents' offsets into place again in every layer and direction.

A packed program sees documents as sequences of a ragged batch: sequence j starts `offsets[j]` tokens into the
flattened [B * T] tokens and is `lengths[j]` long; B * max_segments of them, the unused ones empty and at the end. Its
logsumexp is dense [B * max_segments, N, T], mostly unused, so between forward and backward it is kept as [B, N, T].
Tokens that belong to no sequence are padding: cuDNN leaves them unwritten, so zeros are stored there afterwards, in
place.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels import backend

_MODULE = "jax._src.cudnn.fused_attention_stablehlo"
_ARGUMENTS = ["query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"]
_ARGUMENTS += ["page_table_k", "page_table_v"]
_STATIC = ["scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"]
_EXPECTED = {
    "_dot_product_attention_fwd": [*_ARGUMENTS, *_STATIC, "is_training"],
    "_dot_product_attention_bwd": [*_ARGUMENTS, "activation", "fwd_output", "grad_output", *_STATIC],
}
_ZERO_BLOCK = 64
_AMPERE, _HOPPER = (8, 0), (9, 0)


class Segments(NamedTuple):
    """Segment ids and what cuDNN needs to know about them; made by `segments`, once a step.

    Attributes:
      ids: int32 [B, T].
      offsets: int32 [B, M + 1], read flat: the flattened token at which each segment starts; B * T where there is none.
      lengths: int32 [B, M], read flat: tokens of each segment, in the same order; 0 where there is none.
      sequence: int32 [B, T], the segment of each token, an index into the above; any for padding.
      index: int32 [B, T], the token's place in its segment; any for padding.
      valid: bool [], whether the ids are such that the above describes them.
    """

    ids: jax.Array
    offsets: jax.Array
    lengths: jax.Array
    sequence: jax.Array
    index: jax.Array
    valid: jax.Array


def segments(segment_ids: jax.Array, max_segments: int) -> Segments:
    """Prepares segment ids for cuDNN's packed attention; give the result to `attention` as its `segment_ids`.

    The ids may be in any order, but a segment must be one run of tokens: an id that comes back after another one, or
    more than `max_segments` segments in a row, is invalid. Under `jit`, attention then runs without cuDNN.

    Args:
      segment_ids: int32 [B, T], 0 for padding.
      max_segments: the most segments of a row; static. Memory and time grow a little with it.

    Raises:
      ValueError: no int32 [B, T], max_segments below 1; outside of `jit` also: the ids of a row, named, are invalid.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import segments
    >>> packed = segments(jnp.array([[1, 1, 2, 2, 2, 0]], jnp.int32), max_segments=2)
    >>> print(packed.offsets, packed.lengths, packed.valid)
    [[0 2 6]] [[2 3]] True
    """
    if segment_ids.ndim != 2 or segment_ids.dtype != jnp.int32 or max_segments < 1:
        raise ValueError(
            f"segments: needs int32 [B, T] and max_segments >= 1, not {segment_ids.dtype} {segment_ids.shape} and "
            f"{max_segments}"
        )
    # cuDNN takes one segment a row for a program that is not packed.
    result, valid_rows = _segments(segment_ids, max(2, max_segments), max_segments)
    if not isinstance(valid_rows, Tracer) and not np.all(valid_rows):
        row = int(np.argmin(valid_rows))
        raise ValueError(
            f"segments: row {row} has more than {max_segments} segments, or one that is not a single run of tokens"
        )
    return result


def _segments(ids: jax.Array, slots: int, max_segments: int) -> tuple[Segments, jax.Array]:
    """Returns (segments with room for `slots` a row, which rows are valid [B])."""
    batch, length = ids.shape
    starts = (ids != 0) & jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    ends = (ids != 0) & jnp.concatenate([ids[:, 1:] != ids[:, :-1], jnp.ones_like(ids[:, :1], bool)], axis=1)
    runs = jnp.sum(starts, axis=1, dtype=jnp.int32)
    ordered = jnp.sort(ids, axis=1)
    distinct = (ordered[:, :1] != 0).astype(jnp.int32)[:, 0] if length else runs
    distinct += jnp.sum((ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] != 0), axis=1, dtype=jnp.int32)
    valid_rows = (runs == distinct) & (runs <= max_segments)
    find = functools.partial(jnp.nonzero, size=batch * slots)
    first = find(starts.reshape(-1), fill_value=batch * length)[0].astype(jnp.int32)
    last = find(ends.reshape(-1), fill_value=batch * length - 1)[0].astype(jnp.int32)
    offsets = jnp.concatenate([first, jnp.full((batch,), batch * length, jnp.int32)])
    sequence = jnp.maximum(jnp.cumsum(starts.reshape(-1), dtype=jnp.int32) - 1, 0)
    index = jnp.arange(batch * length, dtype=jnp.int32) - offsets.at[sequence].get(mode="clip")
    result = Segments(
        ids=ids,
        offsets=offsets.reshape(batch, slots + 1),
        lengths=(last - first + 1).reshape(batch, slots),
        sequence=sequence.reshape(ids.shape),
        index=index.reshape(ids.shape),
        valid=jnp.all(valid_rows),
    )
    return result, valid_rows


def compute_capability() -> tuple[int, int]:
    """The GPU's: of the machine, or where it has none of the abstract device that programs are made for."""
    if jax.default_backend() == "gpu":
        major, minor = str(jax.devices()[0].compute_capability).split(".")
        return int(major), int(minor)
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    if any(name in kind for name in ("B100", "B200", "B300")):
        return 10, 0
    return _HOPPER if any(name in kind for name in ("H100", "H200", "H800", "H20")) else _AMPERE


def refuses(
    platform: str,
    q: Any,
    k: Any,
    v: Any,
    *,
    segment_ids: Any = None,
    sinks: Any = None,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> str | None:
    """Why cuDNN cannot run these arguments, or None where it can."""
    if platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, not {platform!r}"
    if soft_cap is not None or sinks is not None:
        return "JAX's binding of cuDNN has no soft cap and no sinks"
    if q.dtype not in (jnp.float16, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must be all float16 or all bfloat16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in q.shape:
        return "it takes no empty arrays"
    capability = compute_capability()
    if capability < _AMPERE:
        return f"it needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    largest = 256 if capability >= _HOPPER else 128
    if q.shape[-1] % 8 or q.shape[-1] > largest:
        return f"the head size must be a multiple of 8 up to {largest}, not {q.shape[-1]}"
    if segment_ids is not None:
        reason = _refuses_packed(q, segment_ids, sliding_window, capability)
        if reason:
            return reason
    return _refuses_jax()


def _refuses_packed(q: Any, segment_ids: Any, window: int | None, capability: tuple[int, int]) -> str | None:
    if not isinstance(segment_ids, Segments):
        return "it must know the segments' offsets: pass what `segments(segment_ids, max_segments)` returns"
    if window is not None:
        return "packed rows with a sliding window were never tested on it"
    if capability < _HOPPER:
        return f"packed rows need compute capability 9.0, not {capability[0]}.{capability[1]}"
    if q.size >= 2**31:
        return f"packed offsets count elements in int32, and q has {q.size}"
    return None


@functools.cache
def _refuses_jax() -> str | None:
    """Whether this jax still has the private primitives that `_bind` calls, with the arguments that it gives them."""
    try:
        module = importlib.import_module(_MODULE)
        names = {name: list(inspect.signature(getattr(module, name + "_abstract")).parameters) for name in _EXPECTED}
        found = all(hasattr(module, name + "_p") for name in _EXPECTED)
        found &= hasattr(module.MaskType, "PADDING_CAUSAL") and hasattr(module.AttentionLayout, "BTNH")
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has no cuDNN attention where it is looked for: {error}"
    if names != _EXPECTED or not found:
        return f"the cuDNN attention of jax {jax.__version__} takes other arguments than it is given"
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: Segments | None,
    sinks: None,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, N, T]); both are zeros for padding."""

    def run(segments: Segments | None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, lse = _bind("_dot_product_attention_fwd", segments, (q, k, v), (), scale, sliding_window)
        if segments is None:
            return out, lse
        return _zero_padding(segments.ids, out)[0], _sparse_lse(segments, lse)

    return _over_batch(run)(segment_ids, q, k, v)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: Segments | None,
    sinks: None,
    out: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Returns (dq, dk, dv, None), from what `forward` returned and its output's cotangent g."""

    def run(segments: Segments | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v, out, lse, g = arrays
        saved = (lse if segments is None else _dense_lse(segments, lse), out, g)
        gradients = _bind("_dot_product_attention_bwd", segments, (q, k, v), saved, scale, sliding_window)
        return tuple(gradients) if segments is None else _zero_padding(segments.ids, *gradients)

    dq, dk, dv = _over_batch(run)(segment_ids, q, k, v, out, lse, g.astype(q.dtype))
    return dq, dk, dv, None


def _bind(
    name: str,
    segments: Segments | None,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    saved: tuple[jax.Array, ...],
    scale: float,
    sliding_window: int | None,
) -> Any:
    """Calls one of the private primitives; the public function around them fixes offsets again at every call."""
    module = importlib.import_module(_MODULE)
    unused = jnp.zeros((0,), qkv[0].dtype)
    ragged = (unused,) * 4
    if segments is not None:
        offsets = [segments.offsets * (x.shape[2] * x.shape[3]) for x in qkv[:2]]
        ragged = (segments.lengths, segments.lengths, *offsets)
    return getattr(module, name + "_p").bind(
        *qkv,
        unused,
        *ragged,
        unused,
        unused,
        *saved,
        scale=float(scale),
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=module.MaskType.CAUSAL if segments is None else module.MaskType.PADDING_CAUSAL,
        layout=module.AttentionLayout.BTNH.value,
        sliding_window_length=sliding_window,
        **({} if saved else {"is_training": True}),
    )


def _sparse_lse(segments: Segments, dense: jax.Array) -> jax.Array:
    """cuDNN's [B * M, N, T] by segment -> [B, N, T] by token."""
    heads = jnp.arange(dense.shape[1], dtype=jnp.int32)[None, :, None]
    lse = dense.at[segments.sequence[:, None, :], heads, segments.index[:, None, :]].get(mode="clip")
    return jnp.where(segments.ids[:, None, :] != 0, lse, 0)


def _dense_lse(segments: Segments, lse: jax.Array) -> jax.Array:
    """The inverse of `_sparse_lse`; what belongs to no token is any finite value."""
    _, num_heads, length = lse.shape
    first = segments.offsets.reshape(-1)[: segments.lengths.size]
    rows = (first // length)[:, None, None]
    tokens = (first % length)[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None, :]
    heads = jnp.arange(num_heads, dtype=jnp.int32)[None, :, None]
    return lse.at[rows, heads, tokens].get(mode="clip")


def _over_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(segments, *arrays) whose vmapped axis joins the batch: the primitives below have no rule for it."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def _(axis_size: int, batched: Any, segments: Segments | None, *arrays: jax.Array) -> tuple[Any, Any]:
        def merge(x: jax.Array, is_batched: bool) -> jax.Array:
            x = x if is_batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        if segments is not None:
            slots = segments.lengths.shape[-1]
            segments, _ = _segments(merge(segments.ids, batched[0].ids), slots, slots)
        results = _over_batch(function)(segments, *map(merge, arrays, batched[1:]))
        split = [x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]) for x in results]
        return tuple(split), (True,) * len(split)

    return run


def _zero_padding(ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays [B, T, heads, H] with zeros where ids are 0; in place, reads nothing but the ids."""
    batch, length = ids.shape
    return backend.call(
        _zero_attention_padding,
        ids,
        *arrays,
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays),
        grid=(batch, -(-length // _ZERO_BLOCK)),
        aliases={i + 1: i for i in range(len(arrays))},
    )


def _zero_attention_padding(ids_ref: Any, *refs: Any) -> None:
    row, first = backend.program_id(0), backend.program_id(1) * _ZERO_BLOCK
    tokens = backend.ds(first, _ZERO_BLOCK)
    inside = first + jnp.arange(_ZERO_BLOCK, dtype=jnp.int32) < ids_ref.shape[1]
    padding = backend.load(ids_ref.at[row, tokens], mask=inside, other=1) == 0
    for ref in refs[len(refs) // 2 :]:
        _, _, num_heads, head_dim = ref.shape
        width = 1 << (head_dim - 1).bit_length()
        mask = padding[:, None] & (jnp.arange(width, dtype=jnp.int32)[None, :] < head_dim)
        zeros = jnp.zeros((_ZERO_BLOCK, width), ref.dtype)

        def store_head(head: Any, _: Any, ref: Any = ref, zeros: Any = zeros, mask: Any = mask) -> None:
            backend.store(ref.at[row, tokens, head, backend.ds(0, zeros.shape[1])], zeros, mask=mask)

        jax.lax.fori_loop(0, num_heads, store_head, None)
