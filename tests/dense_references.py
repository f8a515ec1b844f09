"""Each op written down as plainly as its formula, dense and without a thought for speed, to be run in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.adamw_8bit import SIGNED_MAP, UNSIGNED_MAP
from pallas_kernels.dropout import keep_mask, kept_share, seed
from pallas_kernels.nf4 import NESTED_QUANT_MAP, QUANT_MAP, QuantizedArrays


def rms_norm(x, weight, *, eps, weight_offset):
    weight = jnp.broadcast_to(weight_offset + weight, x.shape)
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def add_rms_norm(x, residual, weight, *, eps, weight_offset):
    return rms_norm(x + residual, weight, eps=eps, weight_offset=weight_offset), x + residual


def rope(q, k, cos, sin):
    def rotate(x):
        half = cos.shape[-1]
        pairs = jax.lax.complex(x[..., :half], x[..., half : 2 * half])
        turned = pairs * jax.lax.complex(cos, sin)[:, :, None, :]
        return jnp.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)

    return rotate(q), rotate(k)


def gated_activation(gate, up, *, activation, alpha=1.702, limit=7.0):
    if activation == "clamped_swiglu":
        gate, up = jnp.where(gate > limit, limit, gate), jnp.where(jnp.abs(up) > limit, limit * jnp.sign(up), up) + 1
    cubic = gate + 0.044715 * gate**3
    factor = {
        "silu": 1 / (1 + jnp.exp(-gate)),
        "gelu": (1 + jax.lax.erf(gate / jnp.sqrt(2.0))) / 2,
        "gelu_pytorch_tanh": (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * cubic)) / 2,
        "clamped_swiglu": 1 / (1 + jnp.exp(-alpha * gate)),
    }[activation]
    return gate * factor * up


def gated_activation_backward(gate, up, g, *, activation):
    h, pull_back = jax.vjp(lambda gate, up: gated_activation(gate, up, activation=activation), gate, up)
    return h, *pull_back(g)


def attention(q, k, v, *, scale, segment_ids, sliding_window, soft_cap=None, sinks=None):
    batch, length = q.shape[:2]
    segment_ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    t, s = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen = (t >= s) & (t - s < (sliding_window or length))
    seen = seen[None] & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)
    return _masked_attention(q, k, v, scale, seen, soft_cap, sinks)


def cached_attention(q, k_cache, v_cache, q_positions, *, scale, layer, sliding_window, soft_cap=None, sinks=None):
    if layer is not None:
        k_cache, v_cache = k_cache[layer], v_cache[layer]
    slots = k_cache.shape[1]
    distance = q_positions[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    seen = (distance >= 0) & (distance < (sliding_window or slots))
    return _masked_attention(q, k_cache, v_cache, scale, seen, soft_cap, sinks)


def _masked_attention(q, k, v, scale, seen, soft_cap, sinks):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(seen[:, None], logits, -1e30)
    if sinks is not None:  # one more key, whose value is zero
        logits = jnp.append(logits, jnp.broadcast_to(sinks[None, :, None, None], (*logits.shape[:3], 1)), axis=-1)
        v = jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
        seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    p = jax.nn.softmax(logits, axis=-1) * jnp.where(seen[:, None], 1.0, 0.0)
    return jnp.einsum("bnts,bsnh->btnh", p, v)


def _head_logits(hidden, head, bias, soft_cap, logit_scale):
    z = logit_scale * (hidden @ head.T + jnp.broadcast_to(0.0 if bias is None else bias, (len(hidden), len(head))))
    return z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)


def linear_cross_entropy(
    hidden,
    head,
    targets,
    weights,
    *,
    chunk_size,
    bias=None,
    soft_cap=None,
    logit_scale=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
    ignore_index=-100,
):
    logits = _head_logits(hidden, head, bias, soft_cap, logit_scale)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    one_hot = (targets[:, None] == jnp.arange(len(head), dtype=targets.dtype)[None, :]).astype(log_p.dtype)
    wanted = (1 - label_smoothing) * one_hot + label_smoothing / len(head)
    loss = -jnp.sum(wanted * log_p, axis=-1) + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    # The weight of a token that is not computed has no gradient: see the op.
    weights = jnp.where(targets == ignore_index, 0, weights)
    return jnp.sum(jnp.where(weights != 0, weights * loss, 0)), jnp.sum(weights)


def selected_log_probs(hidden, head, targets, *, chunk_size, bias=None, soft_cap=None, logit_scale=1.0):
    logits = _head_logits(hidden, head, bias, soft_cap, logit_scale)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0], entropy, jax.nn.logsumexp(logits, axis=-1)


def dropout_low_rank(x, A, seeds, *, rate):
    masks = jnp.stack([keep_mask(seed, x.shape, rate) for seed in seeds])
    return jnp.einsum("ntk,nrk->ntr", jnp.where(masks, x[None], 0) / kept_share(rate), A)


def lora_linear(x, weight, bias, lora_A, lora_B, *, scale, dropout, dropout_key, row_scale=None):
    if hasattr(weight, "codes"):
        weight = nf4_dequantize(weight.codes, weight.absmax, None, None, layer=None, dtype=None)
    lora_x = x
    if dropout and lora_A is not None:
        mask = keep_mask(seed(dropout_key), x.reshape(-1, x.shape[-1]).shape, dropout)
        lora_x = jnp.where(mask.reshape(x.shape), x, 0) / (1 - dropout)
    y = x @ weight.T
    if lora_A is not None:
        y = y + scale * lora_x @ lora_A.T @ lora_B.T
    if row_scale is not None:  # peft's DoRA, whose base sees the dropped input, too, but for 1 of row_scale
        magnitude = jnp.broadcast_to(row_scale, y.shape)
        y = x @ weight.T + (magnitude - 1) * (lora_x @ weight.T) + magnitude * (scale * lora_x @ lora_A.T @ lora_B.T)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def _lora_part(x, name, parameters, dropout):
    mine = {key.removeprefix(f"{name}_"): p for key, p in parameters.items() if key.startswith(f"{name}_")}
    return lora_linear(x, **mine, dropout=dropout)


def lora_qkv(x, *, dropout, **parameters):
    return tuple(_lora_part(x, name, parameters, dropout) for name in "qkv")


def lora_mlp(x, *, activation, dropout, recompute, tile, keep_output, **parameters):
    gate, up = (_lora_part(x, name, parameters, dropout) for name in ("gate", "up"))
    return _lora_part(gated_activation(gate, up, activation=activation), "down", parameters, dropout)


def nf4_dequantize(codes, absmax, nested_absmax, nested_offset, layer, dtype, row_scale=None):
    if layer is not None:
        codes, absmax, nested_absmax, nested_offset = (x[layer] for x in (codes, absmax, nested_absmax, nested_offset))
    if nested_absmax is not None:
        scales = jnp.repeat(nested_absmax, 256)[: absmax.shape[0]]
        absmax = jnp.asarray(NESTED_QUANT_MAP, scales.dtype)[absmax] * scales + nested_offset
    values = jnp.asarray(QUANT_MAP, absmax.dtype)[jnp.stack([codes // 16, codes % 16], axis=-1)]
    w = values.reshape(codes.shape[0], -1) * jnp.repeat(absmax, 64)[: values.size].reshape(codes.shape[0], -1)
    return w if row_scale is None else w * row_scale[:, None]


def nf4_quantize(w, double_quantization):
    def nearest(values, quant_map, size):
        blocks = jnp.pad(values, (0, -values.size % size)).reshape(-1, size)
        absmax = jnp.max(jnp.abs(blocks), axis=1)
        scaled = (blocks / jnp.where(absmax == 0, 1, absmax)[:, None]).reshape(-1)[: values.size]
        midpoints = (quant_map[:-1] + quant_map[1:]).astype(w.dtype) / 2
        return jnp.searchsorted(midpoints, scaled).astype(jnp.uint8), absmax

    codes, absmax = nearest(w.reshape(-1), QUANT_MAP, 64)
    codes = codes[::2].reshape(w.shape[0], -1) * 16 + codes[1::2].reshape(w.shape[0], -1)
    if not double_quantization:
        return QuantizedArrays(codes, absmax, None, None)
    offset = jnp.mean(absmax)
    return QuantizedArrays(codes, *nearest(absmax - offset, NESTED_QUANT_MAP, 256), offset)


def grouped_matmul(x, weight, group_sizes, lora_A, lora_B, *, scale):
    w = weight if lora_A is None else weight + scale * lora_B @ lora_A
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    group = jnp.sum(rows[:, None] >= ends[None, :], axis=1)
    chosen = jax.nn.one_hot(group, weight.shape[0], dtype=x.dtype)
    return jnp.einsum("me,eoi,mi->mo", chosen, w, x)


def mxfp4_dequantize(codes, scales, layer, dtype):
    if layer is not None:
        codes, scales = codes[layer], scales[layer]
    nibbles = jnp.stack([codes % 16, codes // 16], axis=-1).reshape(*scales.shape, 32).astype(jnp.float64)
    exponent, mantissa = nibbles % 8 // 2, nibbles % 2 / 2
    magnitude = jnp.where(exponent == 0, mantissa, (1 + mantissa) * 2 ** (exponent - 1))
    values = jnp.where(nibbles < 8, magnitude, -magnitude) * 2 ** (scales[..., None].astype(jnp.float64) - 127)
    return values.reshape(*codes.shape[:-1], -1)


def nf4_matmul(x, codes, absmax, nested_absmax, nested_offset, layer):
    return x @ nf4_dequantize(codes, absmax, nested_absmax, nested_offset, layer, x.dtype).T


def nf4_linears(x, linears):
    def one(weight, bias, lora_A, lora_B, scale, *_):
        y = nf4_matmul(x, *weight[:5])
        y = y if lora_A is None else y + scale * x @ lora_A.T @ lora_B.T
        return y if bias is None else y + bias[None]

    return tuple(one(*linear) for linear in linears)


def adamw_8bit(parameter, gradient, step, learning_rate, b1, b2, eps, weight_decay, **state):
    g, t = gradient.reshape(-1), step.astype(gradient.dtype)

    def moment(name, quant_map, b, new):
        absmax = jnp.repeat(state[f"{name}_absmax"], 256)[: g.size]
        return b * jnp.asarray(quant_map, g.dtype)[state[f"{name}_codes"].reshape(-1)] * absmax + (1 - b) * new

    def quantized(values, quant_map):
        blocks = jnp.pad(values, (0, -g.size % 256)).reshape(-1, 256)
        absmax = jnp.max(jnp.abs(blocks), axis=1)
        scaled = (blocks / absmax[:, None]).reshape(-1)[: g.size]
        nearest = jnp.argmin(jnp.abs(scaled[:, None] - jnp.asarray(quant_map, g.dtype)[None, :]), axis=1)
        return nearest.astype(jnp.uint8).reshape(gradient.shape), absmax

    m, v = moment("m", SIGNED_MAP, b1, g), moment("v", UNSIGNED_MAP, b2, g**2)
    change = (m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps)).reshape(parameter.shape)
    p = parameter * (1 - learning_rate * weight_decay) - learning_rate * change
    return p, *quantized(m, SIGNED_MAP), *quantized(v, UNSIGNED_MAP)
