"""What a decoder is, as data: frozen, validated, named as Hugging Face names the fields.

Every architectural difference is one field here and one branch on it in the decoder; nothing ever asks for an
architecture's name. A fact that varies from layer to layer is a tuple with one entry a layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxft.errors import JaxftError

LayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]
MLPLayerType = Literal["dense", "sparse"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]
ExpertActivation = Literal["silu", "gelu", "gelu_pytorch_tanh", "clamped_swiglu"]
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
class MoEConfig:
    """A mixture of experts in place of an MLP: which experts a token goes to, and what they are.

    Attributes:
      num_experts, num_experts_per_tok, moe_intermediate_size: E, how many of them a token uses, F of each.
      scoring_func: what makes scores of the router's logits, over all experts; softmax over the chosen ones alone is
        "softmax" with `norm_topk_prob`.
      norm_topk_prob: the chosen experts' scores are divided by their sum.
      routed_scaling_factor: multiplies the scores of the chosen experts.
      router_bias: the router has a bias.
      score_correction_bias: a bias is added to the scores for the choice, not for the weights (arXiv:2412.19437).
      n_group, topk_group: the experts are in so many groups, of which so many may be chosen from.
      group_score: a group counts as its best expert ("max") or as the sum of its two best ("top2").
      expert_bias: the experts' linears have biases.
      expert_act: their activation, "clamped_swiglu" (with `swiglu_alpha` and `swiglu_limit`) or as of `hidden_act`.
      scale_inputs: a token's scores multiply what its experts get instead of what they give.
      shared_expert_intermediate_size: F of an MLP that every token goes through as well; 0: none.
      shared_expert_gate: the sigmoid of a linear of the token multiplies what that MLP gives.
      router_aux_loss_coef: factor of the load-balancing loss where the router trains.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    score_correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"
    expert_bias: bool = False
    expert_act: ExpertActivation = "silu"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    scale_inputs: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
        if self.num_experts % self.n_group:
            raise JaxftError("config field n_group", f"{self.n_group} does not divide num_experts {self.num_experts}")
        if self.topk_group > self.n_group:
            raise JaxftError("config field topk_group", f"{self.topk_group} exceeds n_group {self.n_group}")
        _check_choice("expert_act", self.expert_act, get_args(ExpertActivation))
        choices = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > choices:
            raise JaxftError(
                "config field num_experts_per_tok", f"{self.num_experts_per_tok} exceeds the {choices} to choose from"
            )


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1): small vectors that the heads are made of.

    Attributes:
      kv_lora_rank: values of the vector that k and v of all heads are made of.
      q_lora_rank: values of the one that q is made of; None: of the token itself.
      qk_nope_head_dim, qk_rope_head_dim: values of a head of q and k that are not rotated, and that are; the rotated
        ones of k are the same in all heads.
      v_head_dim: values of a head of v.
    """

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        sizes = [field.name for field in dataclasses.fields(self)]
        _check_sizes(self, *(name for name in sizes if name != "q_lora_rank" or self.q_lora_rank is not None))
        if self.v_head_dim > self.qk_head_dim:
            raise JaxftError("config field v_head_dim", f"{self.v_head_dim} exceeds q's and k's {self.qk_head_dim}")

    @property
    def qk_head_dim(self) -> int:
        """H: values of a head of q and k."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class TemperatureConfig:
    """How queries grow with their position p, by 1 + attn_scale ln(1 + floor((p + 1) / floor_scale)).

    It keeps attention sharp over many keys where no rotation does (arXiv:2501.19399, as Llama 4 has it).
    """

    floor_scale: int
    attn_scale: float

    def __post_init__(self) -> None:
        _check_sizes(self, "floor_scale")


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """What is static about one layer; consecutive layers with a repeating pattern of facts share one scan.

    Attributes:
      sliding_window: keys that a query sees, itself included; None: all before it.
      chunk_size: positions of a chunk, beyond whose beginning no query in it sees; None: there are none.
      rope: which of the config's rotations: "global", "local", or None for no positions at all.
      mlp: an MLP or a mixture of experts.
    """

    sliding_window: int | None = None
    chunk_size: int | None = None
    rope: Literal["global", "local"] | None = "global"
    mlp: MLPLayerType = "dense"


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
        ("each_head"), over all heads at once ("full"); behind it, where there is one, over each head and without
        weights ("rotated"); or None.
      layer_types: one entry a layer.
      sliding_window: keys that a query of a "sliding_attention" layer sees, itself included.
      attention_chunk_size: positions of a chunk, within which queries of a "chunked_attention" layer see.
      attention_scale: multiplies q.k; None means head_dim ** -0.5.
      attention_soft_cap, logit_soft_cap: c of c tanh(x / c), of attention's logits and of the head's.
      attention_sinks: each query head has a learned logit that takes probability and has no value.
      embedding_multiplier: of the embedding's result, rounded to its dtype.
      residual_multiplier: of what attention and MLP add to the residual stream.
      logit_scale: of the head's logits, before the soft cap.
      rope: positions.
      local_rope: positions of "sliding_attention" layers; None: as of the others.
      nope_layers: layers without positions.
      attn_temperature_tuning: of the queries of those layers.
      mla: latent attention; head_dim is then that of q and k, and there is a key head for each query head.
      moe: the mixture of experts of the layers that are "sparse".
      mlp_layer_types: one entry a layer; without any, all are "sparse" with `moe` and "dense" without.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: Activation = "silu"
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
    qk_norm: Literal["head", "each_head", "full", "rotated"] | None = None
    layer_types: tuple[LayerType, ...] = ()
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
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
    attn_temperature_tuning: TemperatureConfig | None = None
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    mlp_layer_types: tuple[MLPLayerType, ...] = ()

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        if not self.mlp_layer_types:
            kind = "sparse" if self.moe else "dense"
            object.__setattr__(self, "mlp_layer_types", (kind,) * self.num_hidden_layers)
        _check_sizes(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        )  # fmt: skip
        if self.num_attention_heads % self.num_key_value_heads:
            raise JaxftError(
                "config field num_key_value_heads",
                f"{self.num_key_value_heads} does not divide num_attention_heads {self.num_attention_heads}",
            )
        _check_choice("hidden_act", self.hidden_act, get_args(Activation))
        if self.mla is not None:
            _check_mla(self, self.mla)
        for rope in self.ropes.values():
            _check_rope(rope, self.rope_head_dim)
        for name in ("layer_types", "mlp_layer_types"):
            entries = len(getattr(self, name))
            if entries != self.num_hidden_layers:
                raise JaxftError(
                    f"config field {name}", f"has {entries} entries for num_hidden_layers {self.num_hidden_layers}"
                )
        if "sparse" in self.mlp_layer_types and self.moe is None:
            raise JaxftError("config field moe", "is missing, but mlp_layer_types has sparse")
        for kind, field in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
            if kind in self.layer_types and not getattr(self, field):
                raise JaxftError(f"config field {field}", f"is missing, but layer_types has {kind}")
        if self.attention_chunk_size is not None:
            _check_sizes(self, "attention_chunk_size")

    @property
    def ropes(self) -> dict[str, RopeConfig]:
        """The rotations by the names that `LayerFacts.rope` has for them."""
        return {"global": self.rope} | ({} if self.local_rope is None else {"local": self.local_rope})

    @property
    def rope_head_dim(self) -> int:
        """The values of a head that rotations are given."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    def layer_facts(self, layer: int) -> LayerFacts:
        """The static facts of one layer."""
        sliding, chunked = (self.layer_types[layer] == f"{kind}_attention" for kind in ("sliding", "chunked"))
        rope = "local" if sliding and self.local_rope is not None else "global"
        return LayerFacts(
            self.sliding_window if sliding else None,
            self.attention_chunk_size if chunked else None,
            None if layer in self.nope_layers else rope,
            self.mlp_layer_types[layer],
        )

    @property
    def mlp_width(self) -> int:
        """Columns that a token's gate and up have in the widest layer, all of its experts together."""
        dense = self.intermediate_size if "dense" in self.mlp_layer_types else 0
        if self.moe is None:
            return dense
        moe = self.moe
        return max(dense, moe.num_experts_per_tok * moe.moe_intermediate_size + moe.shared_expert_intermediate_size)

    def layers_of(self, kind: MLPLayerType) -> tuple[int, ...]:
        """The layers whose blocks are of one kind; each kind's parameters are one stack, in this order."""
        return tuple(layer for layer, each in enumerate(self.mlp_layer_types) if each == kind)

    @property
    def block_kinds(self) -> tuple[MLPLayerType, ...]:
        """The kinds of blocks, in the order in which they first appear."""
        return tuple(dict.fromkeys(self.mlp_layer_types))


def _check_sizes(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise JaxftError(f"config field {name}", f"must be a positive integer, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise JaxftError(f"config field {name}", f"must be one of {', '.join(choices)}, not {value!r}")


def _check_mla(config: DecoderConfig, mla: MLAConfig) -> None:
    for name, value in (("head_dim", mla.qk_head_dim), ("num_key_value_heads", config.num_attention_heads)):
        if getattr(config, name) != value:
            raise JaxftError(f"config field {name}", f"must be {value} with mla, not {getattr(config, name)}")
    for name in ("qk_norm", "attention_sinks", "attn_temperature_tuning"):
        if getattr(config, name):
            raise JaxftError(f"config field {name}", "does not go with mla")


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    rotated = rope.rotated(head_dim)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise JaxftError(
            "config field head_dim", f"RoPE rotates {rotated} of its {head_dim} values; it needs an even number"
        )
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        count = len(getattr(rope, name))
        if count != rotated // 2:
            raise JaxftError(f"config field {name}", f"has {count} values for {rotated // 2} rotated pairs")
