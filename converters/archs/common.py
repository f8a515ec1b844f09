"""What most families share: how config.json spells the sizes, and how GGUF does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from converters.archs.base import ConfigReader, MetadataReader
from converters.archs.gguf_rope import read_gguf_rope, write_gguf_rope
from converters.archs.rope import read_rope
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig, LayerType, RopeKind

RMS_EPS, LAYER_NORM_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
WINDOW = "attention.sliding_window"


def read_common(
    reader: ConfigReader,
    *,
    activation: str = "hidden_act",
    eps: str = "rms_norm_eps",
    interleaved: bool = False,
    attention_bias: bool | None = None,
) -> dict[str, Any]:
    """The fields of DecoderConfig that nearly every family has.

    Args:
      reader: of the model's config.
      activation, eps: how the family spells those.
      interleaved: as of `RopeConfig`.
      attention_bias: whether all of attention's linears have a bias where no field says it; None: the family has no
        such field.
    """
    hidden, heads = reader.take("hidden_size"), reader.take("num_attention_heads")
    longest = reader.take("max_position_embeddings")
    reader.expect("attention_dropout", 0.0)
    bias = None if attention_bias is None else reader.take("attention_bias", attention_bias)
    return {
        **({} if bias is None else {"qkv_bias": bias, "o_bias": bias}),
        "vocab_size": reader.take("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.take("intermediate_size"),
        "num_hidden_layers": reader.take("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.take("num_key_value_heads", heads),
        "head_dim": reader.take("head_dim", hidden // heads),
        "max_position_embeddings": longest,
        "hidden_act": reader.take(activation),
        "rms_norm_eps": reader.take(eps),
        "tie_word_embeddings": reader.take("tie_word_embeddings", False),
        "rope": read_rope(reader, longest, interleaved=interleaved),
    }


def every(layers: int, period: int) -> tuple[LayerType, ...]:
    """Sliding attention, with full attention in every `period`-th layer."""
    return tuple("sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers))


def read_windows(reader: ConfigReader, layers: int, types: Sequence[LayerType] | None = None) -> dict[str, Any]:
    """`sliding_window` and `layer_types`, which are `types` where the config lists none (None: all sliding).

    Without a window no layer is a sliding one, whatever the config lists.
    """
    window = reader.take("sliding_window", None)
    listed = reader.take("layer_types", None) or types or ("sliding_attention",) * layers
    return {"sliding_window": window, "layer_types": tuple(listed)} if window else {}


def read_optional_windows(reader: ConfigReader, layers: int, types: Sequence[LayerType]) -> dict[str, Any]:
    """The same where `use_sliding_window` says so, and else nothing."""
    used = reader.take("use_sliding_window", False)
    windows = read_windows(reader, layers, types)
    return windows if used else {}


def read_rotating_layers(reader: ConfigReader, layers: int) -> list[bool]:
    """`no_rope_layers`, where a 1 is a layer that does rotate; without it all but every `no_rope_layer_interval`-th."""
    period = reader.take("no_rope_layer_interval", 4)
    rotates = reader.take("no_rope_layers", None) or [(i + 1) % period for i in range(layers)]
    return [bool(rotates[i]) for i in range(layers)]


def read_common_gguf(
    reader: MetadataReader,
    *,
    hidden_act: str = "silu",
    activation: str = "hidden_act",
    eps: str = "rms_norm_eps",
    eps_key: str = RMS_EPS,
    whole_heads: bool = True,
    moe: bool = False,
) -> dict[str, Any]:
    """The fields of an HF config that nearly every family has, from the keys of `write_common_gguf`.

    Args:
      reader: of the file's metadata.
      hidden_act: what llama.cpp's graph of the architecture computes.
      activation, eps: how the family's HF config spells those.
      eps_key: the key of the norms' epsilon.
      whole_heads: all of a head is rotated, and no other value of `rope.dimension_count` is possible.
      moe: the architecture has experts, which are for `read_moe_gguf`.
    """
    hidden, heads = reader.size("embedding_length"), reader.size("attention.head_count")
    head_dim = reader.size("attention.key_length", hidden // heads)
    reader.expect("attention.value_length", head_dim)
    for experts in () if moe else ("expert_count", "expert_used_count"):
        reader.expect(experts, 0)
    reader.ignore("tensor_data_layout")
    rope = read_gguf_rope(reader)
    if whole_heads:
        reader.expect("rope.dimension_count", head_dim)
    else:
        rope["partial_rotary_factor"] = reader.size("rope.dimension_count", head_dim) / head_dim
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.size("feed_forward_length"),
        "num_hidden_layers": reader.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        activation: hidden_act,
        "max_position_embeddings": reader.size("context_length"),
        eps: reader.number(eps_key),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in reader.tensors,
    }


# What the keys of `write_common_gguf`, or the tensors that are there, say of any architecture.
_SAID = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps tie_word_embeddings sliding_window rope mlp_layer_types""".split()  # noqa: SIM905
)


def write_common_gguf(
    config: DecoderConfig,
    *,
    eps_key: str = RMS_EPS,
    said: Sequence[str] = (),
    whole_heads: bool = True,
    interleaved: bool = False,
    rope_kinds: Sequence[RopeKind] = ("default", "linear", "llama3", "yarn"),
    yarn_truncate: bool = True,
    yarn_attention_factor: float | None = None,
    **graph: Any,
) -> dict[str, int | float | str]:
    """The keys that nearly every architecture has, after a check that GGUF can say everything else, too.

    Args:
      config: the decoder's facts.
      eps_key: as of `read_common_gguf`.
      said: fields of the config that the architecture's own keys, or its tensors, say.
      whole_heads, interleaved, rope_kinds, yarn_truncate, yarn_attention_factor: what llama.cpp's graph of the
        architecture can rotate.
      **graph: the values of fields that it fixes; other fields must have DecoderConfig's default.

    Raises:
      JaxftError: a field that llama.cpp's graph of the architecture does not have.
    """
    without_windows = () if "layer_types" in graph else ("layer_types",)
    for field in dataclasses.fields(config):
        if field.name in graph or field.name not in {*_SAID, *said, *without_windows}:
            check_fact(field.name, getattr(config, field.name), (graph.get(field.name, field.default),))
    check_fact("rope_type", config.rope.kind, rope_kinds)
    check_fact("interleaved rotation", config.rope.interleaved, (interleaved,))
    if whole_heads:
        check_fact("partial_rotary_factor", config.rope.partial_rotary_factor, (1.0,))
    return {
        "block_count": config.num_hidden_layers,
        "context_length": _context_within_window(config) if without_windows else config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **write_gguf_rope(config.rope, truncate=yarn_truncate, attention_factor=yarn_attention_factor),
        eps_key: config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.rope.rotated(config.head_dim),
    }


def _context_within_window(config: DecoderConfig) -> int:
    """The longest context in which a window, that llama.cpp's graph does not have, makes no difference."""
    window, longest = config.sliding_window, config.max_position_embeddings
    if window is None or window >= longest or "sliding_attention" not in config.layer_types:
        return longest
    warn(
        f"llama.cpp has no sliding window for this architecture: context_length is written as {window}, the window, "
        f"instead of {longest}; beyond it llama.cpp would compute something else"
    )
    return window


def check_fact(name: str, value: Any, supported: Sequence[Any]) -> None:
    """Raises JaxftError where llama.cpp's graph has only the `supported` values."""
    if value not in supported:
        only = " or ".join(map(repr, supported))
        raise JaxftError(f"config field {name}", f"this GGUF architecture cannot say {value!r} (only {only})")
