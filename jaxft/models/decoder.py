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
from jaxft.models.config import DecoderConfig, LayerFacts, MLPLayerType
from jaxft.models.decoded import is_decoded, layers_of, straight_scan
from jaxft.models.labels import is_trainable
from jaxft.models.layers import Embedding, Linear, Norm, at_layer, make_norm
from jaxft.models.mla import LatentAttention
from jaxft.models.mlp import MLP
from jaxft.models.moe import Load, MoE
from jaxft.models.remat import LAYER_INPUT, MID, LayerPolicy, rematerialise, spans
from jaxft.models.rope import rope_tables
from pallas_kernels.head_logits import Cap

# The norms of a block by HF's names: (before attention, behind it, before the MLP, behind it).
_NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm", None, None, None),
}


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); or as `norm_placement` and `parallel_block` say.

    The MLP of a "sparse" one is a mixture of experts.
    """

    def __init__(
        self, config: DecoderConfig, kind: MLPLayerType, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.norms = _NORMS["parallel" if config.parallel_block else config.norm_placement]
        for name in self.norms:
            if name is not None:
                setattr(self, name, make_norm(config, config.hidden_size, stack=stack, dtype=dtype))
        attention = Attention if config.mla is None else LatentAttention
        self.self_attn = attention(config, stack=stack, dtype=dtype, rngs=rngs)
        self.mlp = (MoE if kind == "sparse" else MLP)(config, stack=stack, dtype=dtype, rngs=rngs)

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
    ) -> tuple[jax.Array, KVCache | None, Load | None]:
        before_attention, behind_attention, before_mlp, behind_mlp = map(self._norm, self.norms)
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        normed_BTD = before_attention(x_BTD) if before_attention else x_BTD
        attended_BTD, cache = self.self_attn(normed_BTD, info, facts, layer=layer, cache=cache, dropout_key=dropout_key)
        attended_BTD = self._scaled(behind_attention(attended_BTD) if behind_attention else attended_BTD)
        if before_mlp:
            normed_BTD, x_BTD = before_mlp.add(attended_BTD, x_BTD)
        else:
            x_BTD = checkpoint_name(x_BTD + attended_BTD, MID)
            normed_BTD = normed_BTD if self.config.parallel_block else x_BTD
        settings = {"recompute": policy.recomputes_mlp, "tile": policy.tile}
        if isinstance(self.mlp, MoE):
            mlp_BTD, load = self.mlp(normed_BTD, info.present, dropout_key, **settings)
        else:
            mlp_BTD, load = self.mlp(normed_BTD, dropout_key, keep_output=policy.keeps_mlp_out, **settings), None
        return x_BTD + self._scaled(behind_mlp(mlp_BTD) if behind_mlp else mlp_BTD), cache, load

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else getattr(self, name)

    def _scaled(self, x: jax.Array) -> jax.Array:
        multiplier = self.config.residual_multiplier
        return x if multiplier == 1 else (x.astype(jnp.float32) * multiplier).astype(x.dtype)


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
        start = span.start
        while start < span.stop:
            facts = tuple(config.layer_facts(i) for i in range(start, span.stop))
            period, layers = _longest_repetition(facts)
            found.append(Segment(start, start + layers, facts[:period], span.policy))
            start += layers
    return tuple(found)


def _longest_repetition(facts: tuple[LayerFacts, ...]) -> tuple[int, int]:
    """(period, layers) of the longest run from the first layer on that repeats a pattern; one layer if none does."""
    best = (1, 1)
    for period in range(1, len(facts) // 2 + 1):
        matches = next((i for i in range(len(facts)) if facts[i] != facts[i % period]), len(facts))
        layers = matches - matches % period
        if layers >= 2 * period and layers > best[1]:
            best = (period, layers)
    return best


class Blocks(nnx.Module):
    """The layers where they are of several kinds: for each kind, an attribute of its name, a Block of its layers."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        for kind in config.block_kinds:
            stack = (len(config.layers_of(kind)),)
            setattr(self, kind, Block(config, kind, stack=stack, dtype=dtype, rngs=rngs))


class Model(nnx.Module):
    """What HF calls ``model``: everything but the head.

    Its layers are one Block whose parameters are stacked, or one for each kind (`Blocks`).
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers: Block | Blocks
        if len(config.block_kinds) == 1:
            stack = (config.num_hidden_layers,)
            self.layers = Block(config, config.block_kinds[0], stack=stack, dtype=dtype, rngs=rngs)
        else:
            self.layers = Blocks(config, dtype=dtype, rngs=rngs)
        self.norm = make_norm(config, config.hidden_size, stack=(), dtype=dtype)


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
          positions: int32 [B, T], without segment_ids negative in the padding; None: they count from 0 in each segment.
          dropout_key: a PRNG key switches LoRA dropout on.

        Returns:
          [B, T, D] in the embedding's dtype.
        """
        return self.with_load(tokens, segment_ids=segment_ids, positions=positions, dropout_key=dropout_key)[0]

    def with_load(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Load | None]:
        """`__call__`, and what each layer's experts were asked for: a Load with a leading [L] of the "sparse" layers.

        None without experts.
        """
        if positions is None:
            positions = segment_positions(tokens, segment_ids)
        hidden_BTD, _, load = self._run(tokens, positions, segment_ids, dropout_key=dropout_key)
        return hidden_BTD, load

    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Runs tokens int32 [B, T] at `positions` [B, T] after what `cache` holds: (hidden [B, T, D], the new cache).

        A query sees the slots up to its own position, so rows of different lengths need no padding on the left.
        `lengths` int32 [B] are those of the documents, for rotations that depend on them; None: up to the last
        position.
        """
        hidden_BTD, new_cache, _ = self._run(tokens, positions, None, cache=cache, lengths=lengths)
        assert new_cache is not None
        return hidden_BTD, new_cache

    def head(self) -> jax.Array:
        """The output matrix [V, D], adapter and all: the head's weight, or the embedding where they are tied."""
        embedding = self.model.embed_tokens
        if self.lm_head is None:
            return embedding.weight.get_value().astype(embedding.dtype)
        if self.lm_head.lora_A is None:
            return self.lm_head.weight.get_value().astype(embedding.dtype)
        return self.lm_head.effective_weight().astype(embedding.dtype)

    def head_settings(self, temperature: float = 1.0) -> dict[str, Any]:
        """What ops over the head need beside its matrix: `soft_cap` and `logit_scale`, of logits / temperature."""
        cap = self.config.logit_soft_cap
        return {
            "soft_cap": None if cap is None else cap / temperature,
            "logit_scale": self.config.logit_scale / temperature,
        }

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] of hidden states. Losses use `pallas_kernels.linear_cross_entropy` instead."""
        precision = jax.lax.Precision.HIGHEST if hidden_BTD.dtype == jnp.float32 else None
        logits_BTV = jnp.einsum(
            "btd,vd->btv",
            hidden_BTD,
            self.head().astype(hidden_BTD.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return Cap(**self.head_settings()).logits(logits_BTV)

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        *,
        cache: KVCache | None = None,
        lengths: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, Load | None]:
        hidden_BTD, cache, load = self.run_layers(
            self.embed(tokens), positions, segment_ids, cache=cache, lengths=lengths, dropout_key=dropout_key
        )
        return self.model.norm(hidden_BTD), cache, load

    def embed(self, tokens: jax.Array) -> jax.Array:
        """What the first layer reads, [B, T, D], of tokens int32 [B, T]."""
        x_BTD = self.model.embed_tokens(tokens)
        if self.config.embedding_multiplier != 1:
            x_BTD = x_BTD * jnp.asarray(self.config.embedding_multiplier, x_BTD.dtype)
        return x_BTD

    def run_layers(
        self,
        hidden_BTD: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        lengths: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, Load | None]:
        """The layers alone, from `embed` to the final norm: (hidden [B, T, D], the new cache, the load of experts)."""
        info = SequenceInfo(self._rotations(positions, segment_ids, lengths), positions, segment_ids)
        carry = (hidden_BTD, cache)
        loads = []
        for segment in segments(self.config, self.remat):
            carry, load = self._run_segment(segment, carry, info, dropout_key)
            loads += load
        every = jax.tree.map(lambda *parts: jnp.concatenate(parts), *loads) if loads else None
        return carry[0], carry[1], every

    def _rotations(
        self, positions: jax.Array, segment_ids: jax.Array | None, lengths: jax.Array | None
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """cos and sin of each of the config's rotations."""
        ropes = self.config.ropes
        if not any(rope.depends_on_length for rope in ropes.values()):
            lengths = None
        elif lengths is None:
            lengths = segment_lengths(positions, segment_ids)
        else:
            lengths = lengths[:, None]
        return {name: rope_tables(rope, self.config.rope_head_dim, positions, lengths) for name, rope in ropes.items()}

    def _run_segment(
        self, segment: Segment, carry: tuple[jax.Array, Any], info: SequenceInfo, dropout_key: jax.Array | None
    ) -> tuple[tuple[jax.Array, Any], list[Load]]:
        """Frozen stacks are loop constants, read by layer index inside the body, so that nothing copies or saves a
        slice of them; trainable leaves are scanned over, so that their gradients come out stacked. Weights that were
        decoded once are arrays of their own: straight code reads those where they lie."""
        period = len(segment.pattern)
        iterations = (segment.stop - segment.start) // period
        unroll = min(-(-(segment.policy.unroll or iterations * period) // period), iterations)
        kinds = self.config.block_kinds
        stacks = {kind: nnx.split(self._blocks(kind), is_trainable, is_decoded, ...) for kind in kinds}
        straight = any(decoded for _, _, decoded, _ in stacks.values())
        in_scan = unroll < iterations and not straight

        def run_block(x, cache, trainable_layer, decoded_layer, layer, index, facts):
            graphdef, _, _, frozen = stacks[facts.mlp]
            frozen_layer = at_layer(frozen, layer if index is None else index)
            block = nnx.merge(graphdef, trainable_layer, decoded_layer, frozen_layer)
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer)
            return block(x, info, facts, layer=layer, policy=segment.policy, cache=cache, dropout_key=key)

        def body(carry, inputs):
            loads = []
            for run, (layer, index, trainable_layer, decoded_layer) in zip(runs, inputs, strict=True):
                *carry, load = run(*carry, trainable_layer, decoded_layer, layer, index)
                loads.append(load)
            return tuple(carry), loads

        # Each block's leaves are scanned as they are: the backward pass reads them where they lie, while of anything
        # computed from them inside the body it would keep a copy of the whole stack.
        def block_inputs(i: int) -> tuple[jax.Array, jax.Array | None, Any, Any]:
            every = slice(segment.start + i, segment.stop, period)
            layers = jnp.arange(every.start, every.stop, period, dtype=jnp.int32)
            kind = segment.pattern[i].mlp
            _, trainable, decoded, _ = stacks[kind]
            # Where in the stack of its kind each of these layers is: as far from the last one as in every iteration.
            of_kind = self.config.layers_of(kind)
            indices = [of_kind.index(layer) for layer in range(every.start, every.stop, period)]
            every = slice(indices[0], indices[-1] + 1, sum(facts.mlp == kind for facts in segment.pattern))
            index = None if len(stacks) == 1 else jnp.asarray(indices, jnp.int32)
            return layers, index, jax.tree.map(lambda leaf: leaf[every], trainable), layers_of(decoded, every)

        inputs = tuple(block_inputs(i) for i in range(period))
        runs = [rematerialise(partial(run_block, facts=f), segment.policy, in_scan=in_scan) for f in segment.pattern]
        if straight:
            runs = [jax.jit(run) for run in runs]  # so that they are traced once and not once a layer
            carry, loads = straight_scan(body, carry, inputs)
        else:
            carry, loads = jax.lax.scan(body, carry, inputs, unroll=unroll)
        return carry, [load for load in loads if load is not None]

    def _blocks(self, kind: MLPLayerType) -> Block:
        """The stack of a kind's layers."""
        layers = self.model.layers
        return layers if isinstance(layers, Block) else getattr(layers, kind)


def segment_positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """int32 positions [B, T] that count from 0 at the start of every segment of a row."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def segment_lengths(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """int32 [B, T], or [B, 1] for one document a row: the last position of each token's segment, plus 1."""
    if segment_ids is None:
        return jnp.max(positions, axis=1, keepdims=True) + 1
    index = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32), positions.shape)
    ends = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, index, positions.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def abstract_decoder(config: DecoderConfig, dtype: DTypeLike) -> Decoder:
    """A Decoder whose parameters are ShapeDtypeStructs: shapes and names without memory."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
