"""What the two ops over a language-model head share: logits of a chunk of tokens, and walking a row in a kernel.

    raw = hidden @ head^T + bias                                    hidden [N, D], head [V, D], bias [V]
    z = soft_cap * tanh(logit_scale * raw / soft_cap)               without a soft cap: z = logit_scale * raw
    dz / draw = logit_scale * (1 - (z / soft_cap)^2)

Gemma 2 caps (after no scale), Cohere scales and Granite divides (no cap); no model does both, and `nn.Linear` adds the
bias first of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend

# Bytes of one chunk's logits. A CPU's GEMM is fast from 128 rows on, and a chunk that few active tokens leave half
# empty is wasted work; a GPU reads the whole head twice a chunk, and fills its multiprocessors from 1,024 rows on.
CHUNK_BYTES = {"cpu": 2**24}
CHUNK_BYTES_ACCELERATOR = 2**28
MIN_CHUNK_SIZE = 128

# A logit that counts for nothing: finite, so that differences of two of them are no NaN.
NO_LOGIT = -1e30


class Cap(NamedTuple):
    """How raw products become logits."""

    soft_cap: float | None = None
    logit_scale: float = 1.0

    def logits(self, raw: jax.Array) -> jax.Array:
        """raw float32 -> logits."""
        z = raw if self.logit_scale == 1 else raw * jnp.float32(self.logit_scale)
        if self.soft_cap is None:
            return z
        return jnp.float32(self.soft_cap) * jnp.tanh(z * jnp.float32(1 / self.soft_cap))

    def pull_back(self, d_logits: jax.Array, logits: jax.Array) -> jax.Array:
        """The gradient of the raw products from that of the logits."""
        if self.soft_cap is not None:
            d_logits = d_logits * (1 - jnp.square(logits * jnp.float32(1 / self.soft_cap)))
        return d_logits if self.logit_scale == 1 else d_logits * jnp.float32(self.logit_scale)


def check(
    op: str,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None,
    soft_cap: float | None,
    chunk_size: int | None,
) -> None:
    """Raises ValueError, in words, for arguments that do not fit."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"{op}: hidden {hidden.shape}, head {head.shape} and targets {targets.shape} do not fit [N, D], [V, D], [N]"
        )
    if head.shape[0] == 0:
        raise ValueError(f"{op}: the vocabulary is empty")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"{op}: bias {bias.shape} does not fit the head's rows, {head.shape[:1]}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"{op}: soft_cap must be above 0, not {soft_cap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, not {chunk_size}")


def default_chunk_size(num_tokens: int, vocab_size: int, platform: str, dtype: Any = jnp.float32) -> int:
    """Tokens a chunk: what the platform's budget holds of logits, in multiples of 128; no more than there are."""
    budget = CHUNK_BYTES.get(platform, CHUNK_BYTES_ACCELERATOR) // (vocab_size * jnp.dtype(dtype).itemsize)
    return max(1, min(num_tokens, max(MIN_CHUNK_SIZE, budget // MIN_CHUNK_SIZE * MIN_CHUNK_SIZE)))


def refuses_kernel(platform: str, hidden: jax.Array, head: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    """Why a kernel over logits cannot run, or None; the `refuses` of both ops' kernels."""
    for name, array in (("hidden", hidden), ("head", head)):
        if array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{name} is {array.dtype}; it takes bfloat16, float16 and float32"
    return backend.refuses_platform(platform)


def fold_row(step: Callable[..., Any], carry: Any, length: int, block: int) -> Any:
    """In a kernel: `carry = step(columns, mask, carry)` over a row, a block of columns (a `ds`) at a time.

    Only the last, ragged block has a mask; for the others it is None.
    """
    full, rest = divmod(length, block)

    def ragged(i: jax.Array, carry: Any) -> Any:
        return step(i * block, jnp.arange(block, dtype=jnp.int32) < rest, carry)

    if full:
        carry = jax.lax.fori_loop(0, full, lambda i, carry: step(i * block, None, carry), carry)
    # A loop of one round, because a block that begins at a Python number must lie within the row.
    return jax.lax.fori_loop(full, full + 1, ragged, carry) if rest else carry


def load_logits(
    raw_ref: Any, bias_ref: Any, row: jax.Array, start: Any, mask: jax.Array | None, block: int, cap: Cap
) -> jax.Array:
    """In a kernel: float32 logits [block] of a row from column `start` on, NO_LOGIT where masked."""
    columns = backend.ds(start, block)
    other = None if mask is None else 0.0
    raw = backend.load(raw_ref.at[row, columns], mask=mask, other=other).astype(jnp.float32)
    if bias_ref is not None:
        raw = raw + backend.load(bias_ref.at[columns], mask=mask, other=other).astype(jnp.float32)
    logits = cap.logits(raw)
    return logits if mask is None else jnp.where(mask, logits, NO_LOGIT)
