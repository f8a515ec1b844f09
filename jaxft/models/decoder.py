"""The decoder: embedding, a scan over layers, a final norm. Tokens in, hidden states out; `logits` is its own step.

One class for every architecture: what differs is data in `DecoderConfig`. Parameter paths are the Hugging Face names,
with the layers stacked: ``model.layers.self_attn.q_proj.weight`` is [L, out, in].

Shape letters: B rows, T tokens, D hidden_size, L layers, V vocab_size (docs of `jaxft.models.config` have the rest).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxft.models.attention import Attention, KVCache, SequenceInfo
from jaxft.models.config import DecoderConfig, LayerFacts
from jaxft.models.labels import is_trainable
from jaxft.models.layers import Embedding, Linear, RMSNorm, at_layer
from jaxft.models.mlp import MLP
from jaxft.models.remat import LAYER_INPUT, LayerPolicy, rematerialise, spans
from jaxft.models.rope import rope_tables


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, stack=stack, dtype=dtype)
        self.self_attn = Attention(config, stack=stack, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, stack=stack, dtype=dtype)
        self.mlp = MLP(config, stack=stack, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        info: SequenceInfo,
        facts: LayerFacts,
        *,
        layer: jax.Array,
        policy: LayerPolicy,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        attended_BTD, cache = self.self_attn(
            self.input_layernorm(x_BTD), info, facts, layer=layer, cache=cache, dropout_key=dropout_key
        )
        normed_BTD, x_BTD = self.post_attention_layernorm.add(attended_BTD, x_BTD)
        mlp_BTD = self.mlp(normed_BTD, dropout_key, recompute=policy.recomputes_mlp, tile=policy.tile)
        return x_BTD + mlp_BTD, cache


class Segment(NamedTuple):
    """Layers `start` to `stop` (exclusive), run by one scan whose body is one block for each entry of `pattern`."""

    start: int
    stop: int
    pattern: tuple[LayerFacts, ...]
    policy: LayerPolicy


def segments(config: DecoderConfig, remat: str = "none") -> tuple[Segment, ...]:
    """The layers as few scans as their static facts and remat policies allow."""
    found: list[Segment] = []
    for span in spans(remat, config.num_hidden_layers):
        facts = tuple(config.layer_facts(i) for i in range(span.start, span.stop))
        n = len(facts)
        # The shortest repeating pattern, then the remainder.
        period = next(p for p in range(1, n + 1) if all(facts[i] == facts[i % p] for i in range(n)))
        whole = n - n % period
        found.append(Segment(span.start, span.start + whole, facts[:period], span.policy))
        if whole < n:
            found.append(Segment(span.start + whole, span.stop, facts[whole:], span.policy))
    return tuple(found)


class Model(nnx.Module):
    """What HF calls ``model``: everything but the head. Its layers are one Block whose parameters are stacked."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = Block(config, stack=(config.num_hidden_layers,), dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, stack=(), dtype=dtype)


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Args:
      config: its static facts.
      dtype: of the randomly initialised parameters; activations follow the embedding's dtype.
      rngs: for the random initialisation.

    Attributes:
      remat: what each layer keeps for the backward pass; see `jaxft.models.remat`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxft.models.config import DecoderConfig
      >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
      ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)
      >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
      >>> decoder.logits(decoder(jnp.arange(6)[None])).shape
      (1, 6, 32)
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.remat = "none"
        self.model = Model(config, dtype=dtype, rngs=rngs)
        self.lm_head: Linear | None = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                "lm_head", config.hidden_size, config.vocab_size, bias=False, stack=(), dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          tokens: int32 [B, T].
          segment_ids: int32 [B, T]; a token sees only its own segment; 0 marks padding. None: one document a row.
          positions: int32 [B, T]; None: they count from 0 in each segment.
          dropout_key: a PRNG key switches LoRA dropout on.

        Returns:
          [B, T, D] in the embedding's dtype.
        """
        if positions is None:
            positions = segment_positions(tokens, segment_ids)
        hidden_BTD, _ = self._run(tokens, positions, segment_ids, None, dropout_key)
        return hidden_BTD

    def extend(self, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Runs tokens int32 [B, T] at `positions` [B, T] after what `cache` holds: (hidden [B, T, D], the new cache).

        A query sees the slots up to its own position, so rows of different lengths need no padding on the left.
        """
        hidden_BTD, new_cache = self._run(tokens, positions, None, cache, None)
        assert new_cache is not None
        return hidden_BTD, new_cache

    def head(self) -> jax.Array:
        """The output matrix [V, D]: the head's weight, or the embedding where they are tied."""
        module = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return module.weight.get_value()

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] of hidden states. Losses use `pallas_kernels.linear_cross_entropy` instead."""
        precision = jax.lax.Precision.HIGHEST if hidden_BTD.dtype == jnp.float32 else None
        return jnp.einsum(
            "btd,vd->btv",
            hidden_BTD,
            self.head().astype(hidden_BTD.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: KVCache | None,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        hidden_BTD, cache = self.run_layers(self.embed(tokens), positions, segment_ids, cache, dropout_key)
        return self.model.norm(hidden_BTD), cache

    def embed(self, tokens: jax.Array) -> jax.Array:
        """What the first layer reads, [B, T, D], of tokens int32 [B, T]."""
        return self.model.embed_tokens(tokens)

    def run_layers(
        self,
        hidden_BTD: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The layers alone, between `embed` and the final norm: (hidden [B, T, D], the new cache)."""
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)
        info = SequenceInfo(cos, sin, positions, segment_ids)
        carry = (hidden_BTD, cache)
        for segment in segments(self.config, self.remat):
            carry = self._run_segment(segment, carry, info, dropout_key)
        return carry

    def _run_segment(
        self, segment: Segment, carry: tuple[jax.Array, Any], info: SequenceInfo, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Frozen stacks are loop constants, read by layer index inside the body, so that nothing copies or saves a
        slice of them; trainable leaves are scanned over, so that their gradients come out stacked."""
        period = len(segment.pattern)
        iterations = (segment.stop - segment.start) // period
        unroll = min(-(-(segment.policy.unroll or iterations * period) // period), iterations)
        graphdef, trainable, frozen = nnx.split(self.model.layers, is_trainable, ...)

        def run_block(x, cache, trainable_layer, layer, facts):
            block = nnx.merge(graphdef, trainable_layer, at_layer(frozen, layer))
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer)
            return block(x, info, facts, layer=layer, policy=segment.policy, cache=cache, dropout_key=key)

        def body(carry, inputs):
            for facts, (layer, trainable_layer) in zip(segment.pattern, inputs, strict=True):
                run = rematerialise(partial(run_block, facts=facts), segment.policy, in_scan=unroll < iterations)
                carry = run(*carry, trainable_layer, layer)
            return carry, None

        # Each block's leaves are scanned as they are: the backward pass reads them where they lie, while of anything
        # computed from them inside the body it would keep a copy of the whole stack.
        def block_inputs(i: int) -> tuple[jax.Array, Any]:
            every = slice(segment.start + i, segment.stop, period)
            layers = jnp.arange(every.start, every.stop, period, dtype=jnp.int32)
            return layers, jax.tree.map(lambda leaf: leaf[every], trainable)

        inputs = tuple(block_inputs(i) for i in range(period))
        return jax.lax.scan(body, carry, inputs, unroll=unroll)[0]


def segment_positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """int32 positions [B, T] that count from 0 at the start of every segment of a row."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def abstract_decoder(config: DecoderConfig, dtype: DTypeLike) -> Decoder:
    """A Decoder whose parameters are ShapeDtypeStructs: shapes and names without memory."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
