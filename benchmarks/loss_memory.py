"""`python -m benchmarks.loss_memory`: what GRPO's loss of 8 x 20,000 tokens at 128,256 words adds to the memory.

From the final hidden states to the loss and the hidden states' gradient: everything beside these two and the head is
the loss's own. Once with the default chunks of tokens, then with twice and four times as many. One JSON line each;
with --run the allocator's peak in it, of chunks in this order, because it cannot be reset.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from benchmarks.train import GIB, memory, policy_batch
from jaxft.data.batch import Batch, PolicyBatch
from jaxft.losses import PolicyLoss
from jaxft.losses.policy import of_tokens
from jaxft.losses.tokens import TokenLogProbs
from pallas_kernels.head_logits import default_chunk_size


def loss(hidden: jax.Array, head: jax.Array, batch: PolicyBatch, chunk_size: int, settings: PolicyLoss) -> jax.Array:
    """The policy loss of hidden states [B, T, D] under a head [V, D]."""
    log_prob, entropy, _ = pk.selected_log_probs(
        hidden.reshape(-1, hidden.shape[-1]), head, batch.text.targets.reshape(-1), chunk_size=chunk_size
    )
    shape = hidden.shape[:2]
    tokens = TokenLogProbs(log_prob.reshape(shape), entropy.reshape(shape))
    total, weight, _ = of_tokens(tokens, batch.reference, batch, settings)
    return total / weight


def inputs(rows: int, length: int, size: int, vocab: int) -> tuple[Any, ...]:
    """Shapes of hidden states, head and batch."""
    i32, f32 = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    one = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    hidden = jax.ShapeDtypeStruct((rows, length, size), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((vocab, size), jnp.bfloat16)
    return hidden, head, PolicyBatch(Batch(i32, i32, f32, None, i32), one, one, f32, f32)


def main() -> None:
    arguments = parse_arguments()
    rows, length = map(int, arguments.shape.split("x"))
    shapes = inputs(rows, length, arguments.hidden, arguments.vocab)
    default = default_chunk_size(rows * length, arguments.vocab, jax.default_backend())
    settings = PolicyLoss(beta=0.04)
    for factor in (1, 2, 4):
        gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(3, 4))
        program = gradient.lower(*shapes, default // factor, settings).compile()
        analysis = program.memory_analysis()
        hidden_gib = rows * length * arguments.hidden * 2 / GIB
        record: dict[str, Any] = {
            "kind": "loss_memory",
            **{name: getattr(arguments, name) for name in ("shape", "hidden", "vocab")},
            "chunk_size": default // factor,
            "hidden_gib": round(hidden_gib, 3),
            "added_gib": round((analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / GIB - hidden_gib, 3),
        }
        if arguments.run:
            given = random_inputs(shapes)
            loaded = memory("bytes_in_use")
            value, gradient = jax.block_until_ready(program(*given))
            record |= {"loss": float(value), "in_use_gib": loaded, "peak_alloc_gib": memory("peak_bytes_in_use")}
            del given, gradient
        print(json.dumps(record | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}), flush=True)


def random_inputs(shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values of these shapes, drawn without anything larger on the device."""
    hidden, head, batch = shapes
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, head.shape[0], batch.text.tokens.shape).astype(np.int32)
    text = Batch(tokens, tokens, np.ones(tokens.shape, np.float32), None, np.zeros_like(tokens))
    given = policy_batch(text._replace(**{k: v[None] for k, v in text._asdict().items() if v is not None}))
    given = jax.tree.map(lambda x: x[0], given)._replace(reference=given.old_log_probs[0])
    normal = jax.jit(lambda shape: 0.02 * jax.random.normal(jax.random.key(1), shape, jnp.bfloat16), static_argnums=0)
    return jnp.ones(hidden.shape, hidden.dtype), normal(head.shape), given


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.loss_memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="8x20000", help="rows x tokens")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--run", action="store_true", help="run it, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
