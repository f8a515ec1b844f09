"""What a decoder is, as data: frozen, validated, named as Hugging Face names the fields.

Every architectural difference is one field here and one branch on it in the decoder; nothing ever asks for an
architecture's name. A fact that varies from layer to layer is a tuple with one entry a layer.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxft.errors import JaxftError

LayerType = Literal["full_attention", "sliding_attention"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
      theta: base of the geometric series of frequencies.
      kind: "default", "linear" (positions divided by `factor`) or "llama3" (long wavelengths divided by `factor`,
        the band between `low_freq_factor` and `high_freq_factor` blended).
      factor: the context extension factor of "linear" and "llama3".
      low_freq_factor, high_freq_factor, original_max_position_embeddings: "llama3" only.
      partial_rotary_factor: the share of head_dim that is rotated.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial_rotary_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """What is static about one layer; consecutive layers with a repeating pattern of facts share one scan."""

    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The static facts of a decoder-only transformer.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
        head_dim: V, D, F, L, N, K, H.
      hidden_act: activation of the gated MLP.
      rms_norm_eps: added to the mean square.
      max_position_embeddings: the longest sequence that the checkpoint was made for.
      tie_word_embeddings: the head is the embedding.
      qkv_bias, o_bias, mlp_bias: which linears have a bias.
      qk_norm: RMSNorm over each head of q and k before the rotation.
      layer_types: one entry a layer.
      sliding_window: keys that a query of a "sliding_attention" layer sees, itself included.
      attention_scale: multiplies q.k; None means head_dim ** -0.5.
      rope: positions.
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
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_types: tuple[LayerType, ...] = ()
    sliding_window: int | None = None
    attention_scale: float | None = None
    rope: RopeConfig = RopeConfig()

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
        rotated = self.head_dim * self.rope.partial_rotary_factor
        if rotated != int(rotated) or int(rotated) % 2:
            raise JaxftError(
                "config field head_dim", f"RoPE rotates {rotated:g} of its values; it needs an even number"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise JaxftError(
                "config field layer_types",
                f"has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}",
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise JaxftError("config field sliding_window", "is missing, but layer_types has sliding_attention")

    def layer_facts(self, layer: int) -> LayerFacts:
        """The static facts of one layer."""
        return LayerFacts(self.sliding_window if self.layer_types[layer] == "sliding_attention" else None)
