"""Reads RoPE from HF configs in both spellings: `rope_parameters` (transformers 5), `rope_theta` + `rope_scaling`.

The defaults are those of transformers' modeling_rope_utils.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from converters.archs.base import ConfigReader
from jaxft.models.config import RopeConfig, RopeKind


def read_rope(reader: ConfigReader, max_position_embeddings: int, *, interleaved: bool = False) -> RopeConfig:
    """Consumes the RoPE fields of `reader`; refuses a kind that is not implemented, by name.

    Args:
      reader: of the model's config.
      max_position_embeddings: of the same config.
      interleaved: as of `RopeConfig`; the family knows it, no field says it.

    Raises:
      JaxftError: an unknown rope_type, or a field that the type does not have.
    """
    outer = {
        "rope_theta": reader.take("rope_theta"),
        "partial_rotary_factor": reader.take("partial_rotary_factor", 1.0),
        "original_max_position_embeddings": reader.take("original_max_position_embeddings", None),
    }
    parameters = reader.take("rope_parameters", {}) or reader.take("rope_scaling", {})
    return rope_of(parameters, outer, max_position_embeddings, interleaved=interleaved)


def rope_of(
    parameters: dict[str, Any], outer: dict[str, Any], max_position_embeddings: int, *, interleaved: bool = False
) -> RopeConfig:
    """The rotation of one `rope_parameters` dict; what it lacks is in `outer`, the config around it."""
    reader = ConfigReader(parameters, "config field rope_parameters")
    kind = reader.take("rope_type", None) or reader.take("type", "default")
    reader.take("type", None)
    kind = {"su": "longrope"}.get(kind, kind)  # LongRoPE's first name
    if kind not in _KINDS:
        raise reader.refuse("rope_type", kind, f"one of {', '.join(_KINDS)}")
    original = reader.take("original_max_position_embeddings", None)
    original = outer.get("original_max_position_embeddings") or original or max_position_embeddings
    rope = RopeConfig(
        theta=float(reader.take("rope_theta", outer["rope_theta"])),
        kind=cast(RopeKind, kind),
        partial_rotary_factor=reader.take("partial_rotary_factor", outer.get("partial_rotary_factor", 1.0)),
        interleaved=interleaved,
        **_KINDS[kind](reader, original, max_position_embeddings),
    )
    reader.finish()
    return rope


def _default(reader: ConfigReader, original: int, longest: int) -> dict[str, Any]:
    return {}


def _linear(reader: ConfigReader, original: int, longest: int) -> dict[str, Any]:
    return {"factor": reader.take("factor")}


def _dynamic(reader: ConfigReader, original: int, longest: int) -> dict[str, Any]:
    return {"factor": reader.take("factor"), "original_max_position_embeddings": longest}


def _llama3(reader: ConfigReader, original: int, longest: int) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {**{name: reader.take(name) for name in names}, "original_max_position_embeddings": original}


def _yarn(reader: ConfigReader, original: int, longest: int) -> dict[str, Any]:
    factor = reader.take("factor", longest / original)
    mscale, mscale_all_dim = reader.take("mscale", 0), reader.take("mscale_all_dim", 0)
    attention_factor = yarn_mscale(factor, 1)
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return {
        "factor": factor,
        "beta_fast": reader.take("beta_fast", 0) or 32,
        "beta_slow": reader.take("beta_slow", 0) or 1,
        "truncate": reader.take("truncate", True),
        "attention_factor": reader.take("attention_factor", attention_factor),
        "original_max_position_embeddings": original,
    }


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention factor (arXiv:2309.00071, equation 22), with DeepSeek's weight `mscale` of the logarithm."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(reader: ConfigReader, original: int, longest: int) -> dict[str, Any]:
    factor = reader.take("factor", longest / original)
    return {
        "short_factor": tuple(map(float, reader.take("short_factor"))),
        "long_factor": tuple(map(float, reader.take("long_factor"))),
        "attention_factor": reader.take("attention_factor", longrope_attention_factor(factor, original)),
        "original_max_position_embeddings": original,
    }


def longrope_attention_factor(factor: float, original: int) -> float:
    """LongRoPE's (arXiv:2402.13753) where the config has none."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


_KINDS: dict[str, Callable[[ConfigReader, int, int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
