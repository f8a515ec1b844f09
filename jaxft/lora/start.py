"""What A and B of a fresh adapter hold.

By default (and "gaussian") A is random and B zero, so that the model computes what it did. The other starts take both
factors from the weight W, [out, in]:

- "pissa" (Meng et al. 2024, arXiv:2404.02948): with the largest r singular values, s B A = U_r S_r V_r^T, and the base
  becomes W - s B A. "pissa_niter_N" finds them by N steps of subspace iteration (Halko et al. 2011, arXiv:0909.4061),
  much faster for large weights.
- "olora" (Büyükakyüz 2024, arXiv:2406.01775): B A = Q_r R_r of W = Q R; the base becomes W - s B A.
- "loftq" (Li et al. 2023, arXiv:2310.08659), over a quantized base Q, one iteration: B A = the r largest singular
  values of W - Q; the base stays. As in peft the scale is left out of it, so lora_alpha = r (or sqrt(r) with rsLoRA) is
  what brings Q + s B A closest to W.

"pissa" and "olora" over a quantized base quantize W - s B A.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from jaxft.errors import JaxftError
from jaxft.lora.config import LoraConfig
from jaxft.lora.targets import Target
from jaxft.models.layers import Embedding
from jaxft.models.params import stack
from jaxft.quant import QTensor

ReadWeight = Callable[[str], np.ndarray]


class Start(NamedTuple):
    """What an adapter starts from.

    Attributes:
      A, B: float32 [*stack, r, in] and [*stack, out, r].
      weight: the base's new weights, or None where they stay.
      is_base: B A is part of what the model was before, so it must be taken out of what was learnt.
    """

    A: jax.Array
    B: jax.Array
    weight: Any = None
    is_base: bool = False


def start(target: Target, config: LoraConfig, key: jax.Array, weights: ReadWeight | None) -> Start:
    """The first values of one module's adapter.

    Args:
      weights: HF name -> the original weight, for starts that depend on it; None takes the decoder's own.

    Raises:
      JaxftError: "loftq" over a base that is not quantized, or without the original weights.
    """
    if isinstance(target.module, Embedding) or config.init_lora_weights in (True, "gaussian"):
        return _random(target, config, key)
    return _from_weights(target, config, key, weights)


def _random(target: Target, config: LoraConfig, key: jax.Array) -> Start:
    """As peft: a linear's A uniform in +-1/sqrt(in), or normal with deviation 1/r, and B zero; an embedding's A zero
    and B normal.
    """
    module, rank = target.module, max(target.ranks)
    shape_A, shape_B = (*target.stack, rank, module.in_features), (*target.stack, module.out_features, rank)
    if isinstance(module, Embedding):
        return Start(jnp.zeros(shape_A), jax.random.normal(key, shape_B))
    if config.init_lora_weights == "gaussian":
        A = jax.random.normal(key, shape_A)
    else:
        bound = 1.0 / math.sqrt(module.in_features)
        A = jax.random.uniform(key, shape_A, jnp.float32, -bound, bound)
    if len(set(target.ranks)) > 1 or config.init_lora_weights == "gaussian":
        A = A * jnp.asarray(_row_factors(target, config)).reshape(*target.stack, rank, 1)
    return Start(A, jnp.zeros(shape_B))


def _row_factors(target: Target, config: LoraConfig) -> np.ndarray:
    """float32 [modules, r]: what each row of A is multiplied by; 0 from a module's own rank on."""
    ranks = np.asarray(target.ranks)[:, None]
    size = 1 / np.maximum(ranks, 1) if config.init_lora_weights == "gaussian" else np.ones_like(ranks)
    return np.where(np.arange(max(target.ranks))[None] < ranks, size, 0).astype(np.float32)


def _from_weights(target: Target, config: LoraConfig, key: jax.Array, weights: ReadWeight | None) -> Start:
    kept = target.module.weight.get_value()
    loftq = config.init_lora_weights == "loftq"
    if loftq and (not isinstance(kept, QTensor) or weights is None):
        missing = "the original weights" if isinstance(kept, QTensor) else "a quantized base"
        raise JaxftError("init_lora_weights", f"loftq needs {missing}", "Load with load_in_4bit=True")
    factors, bases = [], []
    for index, (name, rank, scale) in enumerate(zip(target.names, target.ranks, target.scales, strict=True)):
        base = layer_of(kept, index) if target.stack else kept
        original = jnp.asarray(weights(f"{name}.weight"), jnp.float32) if weights else pk.decoded(base, jnp.float32)
        if rank == 0:
            out_features, in_features = original.shape
            A, B = jnp.zeros((1, in_features)), jnp.zeros((out_features, 1))
        elif loftq:
            A, B = _loftq(original, base, rank)
        else:
            steps = config.pissa_steps
            decompose = _olora if config.init_lora_weights == "olora" else functools.partial(_pissa, steps=steps)
            A, B = decompose(original, rank, scale, jax.random.fold_in(key, index))
            bases.append(_like(kept, original - scale * jnp.matmul(B, A, precision="highest")))
        factors.append(_padded(A, B, max(target.ranks)))
        if rank == 0 and not loftq:
            bases.append(_like(kept, original) if isinstance(kept, QTensor) else base)
    A, B = (jnp.stack(each) if target.stack else each[0] for each in zip(*factors, strict=True))
    weight = None if loftq else stack(bases, target.stack) if target.stack else bases[0]
    return Start(A, B, weight, is_base=True)


def layer_of(weights: Any, layer: jax.Array | int) -> Any:
    """One weight of a stack of arrays or QTensors."""
    if isinstance(weights, QTensor):
        return weights.at_layer(layer)
    return jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False)


def _like(kept: Any, weight: jax.Array) -> Any:
    """float32 [out, in] as the base holds its weights."""
    return type(kept).quantize(weight) if isinstance(kept, QTensor) else weight.astype(kept.dtype)


def _padded(A: jax.Array, B: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    missing = rank - A.shape[0]
    return jnp.pad(A, ((0, missing), (0, 0))), jnp.pad(B, ((0, 0), (0, missing)))


@functools.partial(jax.jit, static_argnums=(1,), static_argnames=("steps",))
def _pissa(
    weight: jax.Array, rank: int, scale: float | jax.Array, key: jax.Array, steps: int | None = None
) -> tuple[jax.Array, jax.Array]:
    if steps is None:
        U, S, Vt = jnp.linalg.svd(weight, full_matrices=False)
    else:
        U, S, Vt = _subspace_svd(weight, rank, steps, key)
    root = jnp.sqrt(S[:rank] / scale)
    return root[:, None] * Vt[:rank], U[:, :rank] * root[None]


def _subspace_svd(weight: jax.Array, rank: int, steps: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values, by algorithms 4.4 and 5.1 of Halko et al., without oversampling, as torch does."""
    with jax.default_matmul_precision("highest"):
        Q = jnp.linalg.qr(weight @ jax.random.normal(key, (weight.shape[1], rank)))[0]
        for _ in range(steps):
            Q = jnp.linalg.qr(weight.T @ Q)[0]
            Q = jnp.linalg.qr(weight @ Q)[0]
        U, S, Vt = jnp.linalg.svd(Q.T @ weight, full_matrices=False)
        return Q @ U, S, Vt


@functools.partial(jax.jit, static_argnums=(1,))
def _olora(weight: jax.Array, rank: int, scale: float | jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    Q, R = jnp.linalg.qr(weight)
    return R[:rank], Q[:, :rank]


@functools.partial(jax.jit, static_argnums=(2,))
def _loftq(weight: jax.Array, quantized: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    U, S, Vt = jnp.linalg.svd(weight - quantized.dequantize(jnp.float32), full_matrices=False)
    root = jnp.sqrt(S[:rank])
    return root[:, None] * Vt[:rank], U[:, :rank] * root[None]
