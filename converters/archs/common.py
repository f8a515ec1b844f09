"""What most families share: how config.json spells the sizes, and how GGUF does."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from converters.archs.base import ConfigReader
from converters.archs.gguf_keys import Facts, Fixed, Key, Present, Row, check_fact
from converters.archs.gguf_rope import Rope
from converters.archs.rope import read_rope
from jaxft.console import warn
from jaxft.models.config import LayerType

RMS_EPS = Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", kind="number")
LAYER_NORM_EPS = Key("attention.layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", kind="number")
# What tensors say of linears.
ATTENTION_BIAS = Present("blk.0.attn_q.bias", "attention_bias", "qkv_bias o_bias")
MLP_BIAS = Present("blk.0.ffn_up.bias", "mlp_bias")
# What the context's length says of a graph without windows: that none is shorter.
_WINDOWLESS = "max_position_embeddings sliding_window layer_types"
# Of graphs that have a window, or chunks.
WHOLE_CONTEXT, WINDOW = Key("context_length", "max_position_embeddings"), "attention.sliding_window"


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


def every_fourth(facts: Facts) -> tuple[int, ...]:
    """`nope_layers` of llama.cpp's graphs: it knows no other layers without positions."""
    return tuple(range(3, facts["num_hidden_layers"], 4))


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


def read_nope_layers(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """`nope_layers`: where `no_rope_layers` has a 0; without it every `no_rope_layer_interval`-th."""
    period = reader.take("no_rope_layer_interval", 4)
    rotates = reader.take("no_rope_layers", None) or [(i + 1) % period for i in range(layers)]
    return tuple(i for i in range(layers) if not rotates[i])


def _context_within_window(facts: Facts) -> int:
    """The longest context in which a window, that llama.cpp's graph does not have, makes no difference."""
    window, longest = facts["sliding_window"], facts["max_position_embeddings"]
    if window is None or window >= longest or "sliding_attention" not in facts["layer_types"]:
        return longest
    warn(
        f"llama.cpp has no sliding window for this architecture: context_length is written as {window}, the window, "
        f"instead of {longest}; beyond it llama.cpp would compute something else"
    )
    return window


def gguf_rows(*own: Row, eps: Key = RMS_EPS, rope: Rope = Rope()) -> tuple[Row, ...]:
    """The rows that nearly every architecture has, in the order of llama.cpp's converter, and its own behind them.

    Args:
      *own: a row whose name is that of another one before takes its place.
      eps: of the norms' epsilon.
      rope: what llama.cpp's graph of the architecture can rotate.
    """
    common: tuple[Row, ...] = (
        Key("block_count", "num_hidden_layers"),
        Key("context_length", "max_position_embeddings", _WINDOWLESS, value=_context_within_window),
        Key("embedding_length", "hidden_size"),
        Key("feed_forward_length", "intermediate_size"),
        Key("attention.head_count", "num_attention_heads"),
        Key("attention.head_count_kv", "num_key_value_heads", default=itemgetter("num_attention_heads")),
        rope,
        eps,
        Key(
            "attention.key_length",
            "head_dim",
            default=lambda fields: fields["hidden_size"] // fields["num_attention_heads"],
        ),
        Key("attention.value_length", None, default=itemgetter("head_dim"), value=itemgetter("head_dim")),
        Key("vocab_size", "vocab_size"),
        rope.dimension_count,
        Fixed("hidden_act", "hidden_act", "silu"),
        Present("output.weight", "tie_word_embeddings", absent=True),
        Key("tensor_data_layout", None),
    )
    rows = {row.name: row for row in (*common, *own)}
    no_experts = (Key(name, None, default=0) for name in ("expert_count", "expert_used_count"))
    return (*rows.values(), *(row for row in no_experts if row.name not in rows))


def window_keys(period: int, *, default: int | None = None) -> tuple[Key, ...]:
    """Of graphs with windows in all but every `period`-th layer; `default` is that of files that say none."""

    def window(facts: Facts) -> int:
        check_fact("layer_types", facts["layer_types"], (every(facts["num_hidden_layers"], period),))
        return facts["sliding_window"]

    said = "sliding_window layer_types"
    return (WHOLE_CONTEXT, Key(WINDOW, "sliding_window", said, default=default, value=window))
