"""Each op written down as plainly as its formula, dense and without a thought for speed, to be run in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.nf4 import NESTED_QUANT_MAP, QUANT_MAP


def rms_norm(x, weight, *, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * jnp.broadcast_to(weight, x.shape)


def rope(q, k, cos, sin):
    def rotate(x):
        half = cos.shape[-1]
        pairs = jax.lax.complex(x[..., :half], x[..., half : 2 * half])
        turned = pairs * jax.lax.complex(cos, sin)[:, :, None, :]
        return jnp.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)

    return rotate(q), rotate(k)


def gated_activation(gate, up, *, activation):
    cubic = gate + 0.044715 * gate**3
    factor = {
        "silu": 1 / (1 + jnp.exp(-gate)),
        "gelu": (1 + jax.lax.erf(gate / jnp.sqrt(2.0))) / 2,
        "gelu_pytorch_tanh": (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * cubic)) / 2,
    }[activation]
    return gate * factor * up


def attention(q, k, v, *, scale, segment_ids, sliding_window):
    batch, length = q.shape[:2]
    segment_ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    t, s = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen = (t >= s) & (t - s < (sliding_window or length))
    seen = seen[None] & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)
    return _masked_attention(q, k, v, scale, seen)


def cached_attention(q, k_cache, v_cache, q_positions, *, scale, sliding_window):
    slots = k_cache.shape[1]
    distance = q_positions[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    return _masked_attention(q, k_cache, v_cache, scale, (distance >= 0) & (distance < (sliding_window or slots)))


def _masked_attention(q, k, v, scale, seen):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.where(seen[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) * scale, -1e30)
    p = jax.nn.softmax(logits, axis=-1) * jnp.where(seen[:, None], 1.0, 0.0)
    return jnp.einsum("bnts,bsnh->btnh", p, v)


def linear_cross_entropy(hidden, head, targets, weights, *, chunk_size):
    log_p = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    loss = -jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    # The weight of a token that is not computed has no gradient: see the op.
    return jnp.sum(jnp.where(weights != 0, weights * loss, 0)), jnp.sum(weights)


def lora_linear(x, weight, bias, lora_A, lora_B, *, scale):
    w = weight if lora_A is None else weight + scale * lora_B @ lora_A
    y = x @ w.T
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def nf4_dequantize(codes, absmax, nested_absmax, nested_offset, layer, dtype):
    if layer is not None:
        codes, absmax, nested_absmax, nested_offset = (x[layer] for x in (codes, absmax, nested_absmax, nested_offset))
    if nested_absmax is not None:
        scales = jnp.repeat(nested_absmax, 256)[: absmax.shape[0]]
        absmax = jnp.asarray(NESTED_QUANT_MAP, scales.dtype)[absmax] * scales + nested_offset
    values = jnp.asarray(QUANT_MAP, absmax.dtype)[jnp.stack([codes // 16, codes % 16], axis=-1)]
    return values.reshape(codes.shape[0], -1) * jnp.repeat(absmax, 64)[: values.size].reshape(codes.shape[0], -1)
