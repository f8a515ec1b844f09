"""What a train step needs of a GPU's memory, part by part, from shapes alone: nothing is allocated, no GPU is asked.

The peak is where the arrays that live all through the step (weights, adapters, optimizer state, what the remat policy
keeps) meet the largest of three working sets:

- the MLP's part of a layer's backward pass. For each token: the layer's input and its norm, q, k, v, what attention
  gave, the sum after it and its norm, the incoming gradient and the outgoing one; gate, up and the gradient of their
  product, of all tokens or of a tile; the layer's weights in the activations' dtype (two of the MLP's, with a tile all
  three; attention's where its forward pass was computed again) and a product's workspace;
- attention's part. For each token: the layer's input and its norm, the incoming gradient, q, k, v, attention's output
  and its gradient; cuDNN's scratch; what is fetched from host memory for the next layer;
- the loss. Hidden states, their gradient and the residual stream, and one chunk of logits.

The gradients of the adapters live through both backward parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from jaxft import lora
from jaxft.lora import LoraConfig
from jaxft.models import labels
from jaxft.models.config import DecoderConfig
from jaxft.models.decoded import decoded_bytes
from jaxft.models.decoder import Decoder
from jaxft.models.layers import EXPERTS, ROW_NORMS, is_quantizable
from jaxft.models.params import parameters
from jaxft.models.remat import LAYER_INPUT, MLP_OUT, LayerPolicy, keeps_weights, prefetches, spans
from jaxft.quant import QUANTIZATIONS, QTensor
from pallas_kernels.attention_cudnn import number_of_groups
from pallas_kernels.head_logits import default_chunk_size

GIB = 2**30
PRODUCT_WORKSPACE = 32 * 2**20  # bytes that cuBLAS takes on Hopper


class MemoryPlan(NamedTuple):
    """Bytes of each part.

    Attributes:
      weights, adapters, optimizer: live all through the run.
      gradients: of what trains.
      kept: activations that the policy keeps on the device.
      working_set: of one layer's backward pass, the larger of the MLP's and attention's.
      loss: what the loss needs at once.
      host: activations in pinned host memory.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    kept: int
    working_set: int
    loss: int
    host: int

    @property
    def peak(self) -> int:
        """Bytes of the device at the highest point of a step."""
        always = self.weights + self.adapters + self.optimizer + self.kept
        return always + max(self.gradients + self.working_set, self.loss)

    def per_step(self) -> dict[str, int]:
        """The parts of the device that settings of a run change."""
        names = ("optimizer", "gradients", "kept", "working_set", "loss")
        return {name: size for name, size in self._asdict().items() if name in names}

    def rows(self) -> list[tuple[str, str]]:
        """(part, GiB) of every part and of the peak, for a table."""
        parts = [(name.replace("_", " "), size) for name, size in self._asdict().items()]
        return [(name, f"{size / GIB:.2f}") for name, size in [*parts, ("peak on the device", self.peak)]]


def plan(
    decoder: Decoder, tx: optax.GradientTransformation, *, rows: int, length: int, remat: str | None = None
) -> MemoryPlan:
    """The plan of one train step.

    Args:
      decoder: with its adapters attached; its parameters may be `jax.ShapeDtypeStruct`s.
      tx: the optimizer.
      rows, length: of one micro-batch.
      remat: None takes the decoder's own policy.

    Raises:
      JaxftError: `remat` is not a policy, or its counts do not fit the decoder.
    """
    policy = decoder.remat if remat is None else remat
    _, trainable, frozen = labels.split(decoder)
    adapters = _bytes(trainable)
    every = spans(policy, decoder.config.num_hidden_layers)
    tokens = rows * length
    per_token = _bytes_per_token(decoder)
    return MemoryPlan(
        weights=_bytes(frozen) + keeps_weights(policy) * decoded_bytes(decoder.config, frozen, _dtype(decoder))[0],
        adapters=adapters,
        optimizer=_bytes(jax.eval_shape(tx.init, trainable)),
        gradients=adapters,
        kept=tokens * sum((span.stop - span.start) * _kept(span.policy, per_token) for span in every),
        working_set=max(_working_set(decoder, span.policy, policy, rows, length, per_token) for span in every),
        loss=_loss(decoder, tokens),
        host=tokens * sum((s.stop - s.start) * sum(per_token[n] for n in s.policy.offloaded) for s in every),
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _dtype(decoder: Decoder) -> Any:
    """Of the activations."""
    return jnp.dtype(decoder.model.embed_tokens.dtype)


def _bytes_per_token(decoder: Decoder) -> dict[str, int]:
    """Bytes for each token and layer of everything that a policy can name."""
    c, size = decoder.config, _dtype(decoder).itemsize
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    ranks = sum(v.get_value().shape[-2] for path, v in parameters(decoder) if path[-1] == "lora_A")
    dora = any(path[-2:] == ("down_proj", "lora_magnitude_vector") for path, _ in parameters(decoder))
    sizes = {
        LAYER_INPUT: c.hidden_size,
        "q": heads,
        "k": kv_heads,
        "v": kv_heads,
        "attn_out": heads,
        "mid": c.hidden_size,
        "gate": c.mlp_width if c.gated_mlp else 0,
        "up": c.mlp_width,
        "lora_low_rank": ranks,
        MLP_OUT: c.hidden_size if dora else 0,
        ROW_NORMS: 0,  # nothing for a token
    }
    lse = 4 * c.num_attention_heads  # float32
    return {**{name: n * size for name, n in sizes.items()}, "attn_lse": lse}


def _kept(policy: LayerPolicy, per_token: dict[str, int]) -> int:
    """Bytes for each token that a layer keeps on the device.

    In straight code XLA sees both passes at once and also keeps some of what it could compute again. Between nothing
    and both norms' results were measured, so one of them is counted.
    """
    names = set(per_token) if policy.everything else {LAYER_INPUT, *policy.kept} - set(policy.offloaded)
    norm = per_token[LAYER_INPUT] if policy.everything or (policy.unroll is None and policy.kept) else 0
    return sum(per_token[name] for name in names) + norm


def _working_set(
    decoder: Decoder, layer: LayerPolicy, policy: str, rows: int, length: int, per_token: dict[str, int]
) -> int:
    c, dtype, tokens = decoder.config, _dtype(decoder), rows * length
    size = dtype.itemsize
    hidden = tokens * c.hidden_size * size
    heads, kv_heads = tokens * per_token["q"], tokens * per_token["k"]
    one_mlp_weight = c.hidden_size * c.intermediate_size * size
    # Of experts: a row for each choice, sorted and not, there and back; weights are read where they lie, or decoded.
    sorted_rows = 4 * hidden * c.moe.num_experts_per_tok if c.moe else 0
    decoded = _decoded_experts(decoder) if c.moe else 0
    attention_weights = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) * size
    recomputes_attention = not (layer.everything or {"q", "k", "v"} <= {*layer.kept, *layer.offloaded})
    weights = (3 if layer.tile else 2) * one_mlp_weight + recomputes_attention * attention_weights
    wide = 3 * min(layer.tile or tokens, tokens) * c.mlp_width * size
    mlp = 6 * hidden + 2 * heads + 2 * kv_heads + wide + weights + sorted_rows + decoded + PRODUCT_WORKSPACE
    fetched = tokens * sum(per_token[name] for name in layer.offloaded) if prefetches(policy) else 0
    attention = 3 * hidden + 3 * heads + 2 * kv_heads + attention_weights + fetched
    return max(mlp, attention + _attention_scratch(c, rows, length, dtype))


def _decoded_experts(decoder: Decoder) -> int:
    """Bytes of the largest matrix of a layer's experts in the activations' dtype, where they are quantized."""
    c = decoder.config
    quantized = any(EXPERTS in path and isinstance(v.get_value(), QTensor) for path, v in parameters(decoder))
    if c.moe is None or not quantized:
        return 0
    return c.moe.num_experts * c.moe.moe_intermediate_size * c.hidden_size * _dtype(decoder).itemsize


def _attention_scratch(config: Any, rows: int, length: int, dtype: Any) -> int:
    """cuDNN's: dq in float32, dk and dv for every query head, and the copies of a group of heads."""

    def heads(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, length, count, config.head_dim), dtype)

    q, k = heads(config.num_attention_heads), heads(config.num_key_value_heads)
    groups = number_of_groups(q, k)
    copies = (4 * q.size + 4 * k.size) * dtype.itemsize if groups > 1 else 0
    return (q.size * (4 + 2 * dtype.itemsize) + copies) // groups


def _loss(decoder: Decoder, tokens: int) -> int:
    c, dtype = decoder.config, _dtype(decoder)
    chunk = default_chunk_size(tokens, c.vocab_size, "gpu", dtype)
    return 3 * tokens * c.hidden_size * dtype.itemsize + chunk * c.vocab_size * dtype.itemsize


def abstract_model(config: DecoderConfig, dtype: DTypeLike, adapter: LoraConfig, quantization: str | None) -> Decoder:
    """A decoder with an adapter whose parameters are `jax.ShapeDtypeStruct`s; quantization as of `build_decoder`."""

    def make() -> Decoder:
        decoder = Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
        for path, variable in parameters(decoder):
            if quantization and is_quantizable(path):
                variable.set_value(jax.vmap(QUANTIZATIONS[quantization].quantize)(variable.get_value()))
        nnx.update(decoder, nnx.from_flat_state(parameters(decoder)))
        lora.attach(decoder, adapter, key=jax.random.key(0))
        return decoder

    return nnx.eval_shape(make)
