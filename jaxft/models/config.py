"""What a decoder is, as data: frozen, validated, named as Hugging Face names the fields.

Every architectural difference is one field here and one branch on it in the decoder; nothing ever asks for an
architecture's name. A fact that varies from layer to layer is a tuple with one entry a layer.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxft.errors import JaxftError

LayerType = Literal["full_attention", "sliding_attention"]


RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
      theta: base of the geometric series of frequencies.
      kind: how the frequencies are stretched for long contexts; `jaxft.models.rope` has the formulas.
      factor: the context extension factor of every kind but "default" and "longrope".
      low_freq_factor, high_freq_factor: of "llama3".
      beta_fast, beta_slow, truncate: of "yarn".
      short_factor, long_factor: of "longrope": a divisor for each frequency, of documents up to and beyond
        original_max_position_embeddings tokens.
      original_max_position_embeddings: the context that is extended; of "dynamic", "llama3", "yarn" and "longrope".
      attention_factor: multiplies cos and sin.
      partial_rotary_factor: the share of head_dim that is rotated.
      interleaved: value 2i is rotated with value 2i + 1, not value i with value i + R/2.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    partial_rotary_factor: float = 1.0
    interleaved: bool = False

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies of a token depend on how long its document is."""
        return self.kind in ("dynamic", "longrope")

    def rotated(self, head_dim: int) -> int:
        """R, how many values of a head are rotated."""
        return int(head_dim * self.partial_rotary_factor)


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """What is static about one layer; consecutive layers with a repeating pattern of facts share one scan.

    Attributes:
      sliding_window: keys that a query sees, itself included; None: all before it.
      rope: which of the config's rotations: "global", "local", or None for no positions at all.
    """

    sliding_window: int | None = None
    rope: Literal["global", "local"] | None = "global"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The static facts of a decoder-only transformer.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
        head_dim: V, D, F, L, N, K, H.
      max_position_embeddings: the longest sequence that the checkpoint was made for.
      hidden_act: activation of the MLP.
      gated_mlp: down(act(gate(x)) * up(x)); else down(act(up(x))).
      norm: "rms_norm", or "layer_norm", which also subtracts the mean.
      norm_bias: of "layer_norm".
      norm_weight_offset: added to the weight of "rms_norm" (gemma stores it less 1).
      rms_norm_eps: added to the mean square, or to the variance.
      norm_placement: where norms stand around attention and MLP: before ("pre"), behind ("post") or both ("sandwich").
      parallel_block: attention and MLP read the same norm, and their results are added together.
      tie_word_embeddings: the head is the embedding.
      qkv_bias, o_bias, mlp_bias: which linears have a bias.
      qk_norm: a norm of q and k before the rotation: over each "head", over each head with weights of its own
        ("each_head"), over all heads at once ("full"), or None.
      layer_types: one entry a layer.
      sliding_window: keys that a query of a "sliding_attention" layer sees, itself included.
      attention_scale: multiplies q.k; None means head_dim ** -0.5.
      attention_soft_cap, logit_soft_cap: c of c tanh(x / c), of attention's logits and of the head's.
      attention_sinks: each query head has a learned logit that takes probability and has no value.
      embedding_multiplier: of the embedding's result, rounded to its dtype.
      residual_multiplier: of what attention and MLP add to the residual stream.
      logit_scale: of the head's logits, before the soft cap.
      rope: positions.
      local_rope: positions of "sliding_attention" layers; None: as of the others.
      nope_layers: layers without positions.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_bias: bool = False
    norm_weight_offset: float = 0.0
    rms_norm_eps: float = 1e-6
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    parallel_block: bool = False
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "each_head", "full"] | None = None
    layer_types: tuple[LayerType, ...] = ()
    sliding_window: int | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    attention_sinks: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_scale: float = 1.0
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    nope_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise JaxftError(f"config field {name}", f"must be a positive integer, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise JaxftError(
                "config field num_key_value_heads",
                f"{self.num_key_value_heads} does not divide num_attention_heads {self.num_attention_heads}",
            )
        for rope in self.ropes.values():
            _check_rope(rope, self.head_dim)
        if len(self.layer_types) != self.num_hidden_layers:
            raise JaxftError(
                "config field layer_types",
                f"has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}",
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise JaxftError("config field sliding_window", "is missing, but layer_types has sliding_attention")

    @property
    def ropes(self) -> dict[str, RopeConfig]:
        """The rotations by the names that `LayerFacts.rope` has for them."""
        return {"global": self.rope} | ({} if self.local_rope is None else {"local": self.local_rope})

    def layer_facts(self, layer: int) -> LayerFacts:
        """The static facts of one layer."""
        sliding = self.layer_types[layer] == "sliding_attention"
        rope = "local" if sliding and self.local_rope is not None else "global"
        return LayerFacts(self.sliding_window if sliding else None, None if layer in self.nope_layers else rope)


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    rotated = rope.rotated(head_dim)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise JaxftError("config field head_dim", f"RoPE rotates {rotated} of its {head_dim} values; it needs an even number")
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        count = len(getattr(rope, name))
        if count != rotated // 2:
            raise JaxftError(f"config field {name}", f"has {count} values for {rotated // 2} rotated pairs")
