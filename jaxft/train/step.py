"""The train step as a contract: step(trainable, frozen, opt_state, batch) -> (trainable, opt_state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxft.losses import LossOutput
from jaxft.models.decoder import Decoder

LossFunction = Callable[[Decoder, Any], LossOutput]
Step = Callable[[nnx.State, nnx.State, optax.OptState, Any], tuple[nnx.State, optax.OptState, dict[str, jax.Array]]]

# cuBLAS instead of XLA's Triton products: an adapter's low-rank term is then added in the epilogue of the large product
# (q, k and v of Llama-3.1-8B over NF4, forward and backward on an H100: 1.38 ms instead of 1.53).
COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def make_train_step(graphdef: nnx.GraphDef, loss: LossFunction, tx: optax.GradientTransformation) -> Step:
    """The jitted step; `trainable` and `opt_state` are donated.

    Args:
      graphdef: of the Decoder, from `jaxft.models.labels.split`.
      loss: (decoder, micro-batch) -> (sum, weight, sums of metrics).
      tx: applied to the trainable leaves.

    Returns:
      step(trainable, frozen, opt_state, batch): every leaf of `batch` has a leading [A], the micro-batches that are
      accumulated. The gradient is that of (sum of sums) / (sum of weights). metrics: "loss" (that quotient), "weight",
      "grad_norm" (before clipping), and the sums that `loss` reported; float32 scalars on the device.
    """

    def loss_sum(trainable: nnx.State, frozen: nnx.State, micro: Any) -> tuple[jax.Array, Any]:
        total, weight, sums = loss(nnx.merge(graphdef, trainable, frozen), micro)
        return total, {"loss": total, "weight": weight, **sums}

    def step(trainable, frozen, opt_state, batch):
        def accumulate(carry, micro):
            grads, sums = jax.grad(loss_sum, has_aux=True)(trainable, frozen, micro)
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        first = jax.tree.map(lambda leaf: leaf[0], batch)
        _, sums = jax.eval_shape(loss_sum, trainable, frozen, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (trainable, sums))
        (grads, sums), _ = jax.lax.scan(accumulate, zeros, batch)
        weight = jnp.maximum(sums["weight"], jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: (g / weight.astype(g.dtype)).astype(g.dtype), grads)
        # optax mixes its int32 step count with floats: leave that to it, also where the caller promotes strictly.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, trainable)
        metrics = {**sums, "loss": sums["loss"] / weight, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(trainable, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 2), compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
