"""The train step as a contract: step(trainable, frozen, opt_state, batch) -> (trainable, opt_state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxft import optim
from jaxft.losses import LossOutput
from jaxft.models.decoder import Decoder
from jaxft.models.remat import offloads, prefetches

LossFunction = Callable[[Decoder, Any], LossOutput]
Step = Callable[[nnx.State, nnx.State, optax.OptState, Any], tuple[nnx.State, optax.OptState, dict[str, jax.Array]]]

_TINY = jnp.finfo(jnp.float32).tiny  # in place of a weight of 0: an empty batch has loss 0
_GPU_OPTIONS = {
    # cuBLAS instead of XLA's Triton products: an adapter's low-rank term is then added in the epilogue of the large
    # product (q, k and v of Llama-3.1-8B over NF4, forward and backward on an H100: 1.38 ms instead of 1.53).
    "xla_gpu_enable_triton_gemm": False,
    # Products that write into a scan's stack of results take a slower kernel: a step of 2 x 2048 tokens that keeps its
    # activations takes 283 ms without them, and 332 with them.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}
# What is offloaded is copied beside the computation, and never in a command buffer, which has one stream, so those hold
# kernels only: of 46 ms of copies in a step of 2 x 2048 tokens 2 are not hidden (without these options 40). Without any
# command buffers the step takes 350 ms instead of 345.
_OFFLOAD_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN",
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
_PREFETCH_OPTIONS = {"xla_gpu_enable_pipelined_host_offloading": True}  # fetched one layer ahead


def make_train_step(
    graphdef: nnx.GraphDef, loss: LossFunction, tx: optax.GradientTransformation, *, remat: str = "none"
) -> Step:
    """The jitted step; `trainable` and `opt_state` are donated.

    Args:
      graphdef: of the Decoder, from `jaxft.models.labels.split`.
      loss: (decoder, micro-batch) -> (sum, weight, sums of metrics).
      tx: applied to the trainable leaves.
      remat: the Decoder's policy: one that moves activations to host memory is compiled with other options.

    Returns:
      step(trainable, frozen, opt_state, batch): every leaf of `batch` has a leading [A], the micro-batches that are
      accumulated. The gradient is that of (sum of sums) / (sum of weights). metrics: "loss" (that quotient), "weight",
      "grad_norm" (before clipping), and what `loss` reported: sums, and the quotients of its (sum, weight) pairs;
      float32 scalars on the device. And "finite", bool: whether loss and gradient are; where they are not, trainable
      and opt_state come back as they were.
    """

    def loss_sum(trainable: nnx.State, frozen: nnx.State, micro: Any) -> tuple[jax.Array, Any]:
        total, weight, sums = loss(nnx.merge(graphdef, trainable, frozen), micro)
        return total, {"loss": total, "weight": weight, **sums}

    def step(trainable, frozen, opt_state, batch):
        def accumulate(carry, micro):
            grads, sums = jax.grad(loss_sum, has_aux=True)(trainable, frozen, micro)
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        first = jax.tree.map(lambda leaf: leaf[0], batch)
        if jax.tree.leaves(batch)[0].shape[0] == 1:  # without the sums' copy of the gradient
            grads, sums = jax.grad(loss_sum, has_aux=True)(trainable, frozen, first)
        else:
            _, sums = jax.eval_shape(loss_sum, trainable, frozen, first)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (trainable, sums))
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, batch)
        weight = jnp.maximum(sums["weight"], _TINY)
        grads = jax.tree.map(lambda g: (g / weight.astype(g.dtype)).astype(g.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        # What is kept for a step that is not finite is copied now, and not while the layers need the memory.
        grads, trainable, opt_state, finite = jax.lax.optimization_barrier((grads, trainable, opt_state, finite))
        # optax mixes its int32 step count with floats: leave that to it, also where the caller promotes strictly.
        with jax.numpy_dtype_promotion("standard"):
            on_device = optim.fetched(opt_state)  # where the optimizer is a paged one
            updates, new_state = tx.update(grads, on_device, trainable)
            new = (optax.apply_updates(trainable, updates), new_state)
        trainable, new_state = jax.tree.map(partial(jnp.where, finite), new, (trainable, on_device))
        reported = {name: _quotient(*x) if isinstance(x, tuple) else x for name, x in sums.items()}
        metrics = {**reported, "loss": sums["loss"] / weight, "grad_norm": grad_norm, "finite": finite}
        return trainable, optim.put_back(new_state, opt_state), metrics

    return jax.jit(step, donate_argnums=(0, 2), compiler_options=_compiler_options(remat))


def _quotient(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / jnp.maximum(weight, _TINY)


def _compiler_options(remat: str) -> dict[str, Any] | None:
    if jax.default_backend() != "gpu":
        return None
    if not offloads(remat):
        return _GPU_OPTIONS
    return _GPU_OPTIONS | _OFFLOAD_OPTIONS | (_PREFETCH_OPTIONS if prefetches(remat) else {})
