"""Reads RoPE from HF configs in both spellings: `rope_parameters` (transformers 5), `rope_theta` + `rope_scaling`."""

from __future__ import annotations

from converters.archs.base import ConfigReader
from jaxft.models.config import RopeConfig

_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(reader: ConfigReader, default_theta: float = 10000.0) -> RopeConfig:
    """Consumes the RoPE fields of `reader`; refuses a kind that is not implemented, by name.

    Raises:
      JaxftError: an unknown rope_type, or a field that the type does not have.
    """
    theta = reader.take("rope_theta", default_theta)
    fields = dict(reader.take("rope_parameters", {}) or reader.take("rope_scaling", {}))
    inner = ConfigReader(fields, "config field rope_parameters")
    theta = inner.take("rope_theta", theta)
    kind = inner.take("rope_type", None) or inner.take("type", "default")
    inner.take("type", None)
    partial = inner.take("partial_rotary_factor", 1.0)
    if kind not in _FIELDS:
        raise inner.refuse("rope_type", kind, f"one of {', '.join(_FIELDS)}")
    values = {name: inner.take(name) for name in _FIELDS[kind]}
    inner.finish()
    return RopeConfig(theta=float(theta), kind=kind, partial_rotary_factor=partial, **values)
