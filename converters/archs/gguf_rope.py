"""RoPE in GGUF, both ways: `rope.*` keys, and the tensor `rope_freqs.weight` that carries Llama 3's scaling.

GGUF has no keys for rope_type "llama3". llama.cpp's converter stores what it does to the frequencies instead: one
divisor for each rotated pair.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from converters.archs.base import MetadataReader
from converters.archs.rope import yarn_mscale
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.models.config import RopeConfig

FREQUENCIES = "rope_freqs.weight"
_ORIGINAL = "rope.scaling.original_context_length"
# LongRoPE's divisors: HF's field -> tensor.
FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
_BETA_FAST, _BETA_SLOW = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"

# What models have in rope_type "llama3", beside a `factor` of their own: Llama 3.1 to 3.3, and Llama 4.
_LLAMA3 = tuple(
    {"low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": 8192} for high in (4.0, 1.0)
)


def read_gguf_rope(reader: MetadataReader) -> dict[str, Any]:
    """`rope_parameters` as HF's config.json has them; refuses other scalings by name."""
    parameters = {"rope_theta": reader.number("rope.freq_base", 10000.0)}
    kind = reader.choice("rope.scaling.type", ("none", "linear", "yarn"), "none")
    reader.ignore("rope.scaling.finetuned")
    if kind == "none" and not set(FACTORS.values()) <= set(reader.tensors):
        return {**parameters, "rope_type": "default"}
    if kind == "none":
        return {
            **parameters,
            "rope_type": "longrope",
            "original_max_position_embeddings": reader.size(_ORIGINAL),
            "attention_factor": reader.number("rope.scaling.attn_factor", 1.0),
        }
    parameters |= {"rope_type": kind, "factor": reader.number("rope.scaling.factor")}
    if kind == "yarn":
        parameters |= {
            "original_max_position_embeddings": reader.size(_ORIGINAL),
            "beta_fast": reader.number(_BETA_FAST, 32.0),
            "beta_slow": reader.number(_BETA_SLOW, 1.0),
        }
    return parameters


def write_gguf_rope(
    rope: RopeConfig, *, truncate: bool = True, attention_factor: float | None = None
) -> dict[str, int | float | str]:
    """The `rope.*` keys; "llama3" has none beside its theta, see `rope_divisors`.

    Args:
      rope: the rotation.
      truncate: of the architecture's YaRN. llama.cpp rounds where the blend begins and ends in any case; a warning
        says so where the model does not.
      attention_factor: of the architecture's YaRN; None: the paper's.

    Raises:
      JaxftError: a YaRN whose attention factor or blend is not the paper's.
    """
    keys: dict[str, int | float | str] = {}
    if rope.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        expected = yarn_mscale(rope.factor, 1) if attention_factor is None else attention_factor
        if rope.truncate != truncate or not math.isclose(rope.attention_factor, expected, rel_tol=1e-6):
            raise JaxftError(
                "config field rope_parameters",
                f"GGUF's yarn has truncate = {truncate} and attention_factor = {expected:g}, not {rope.truncate} and "
                f"{rope.attention_factor:g}",
            )
        if not truncate:
            warn("llama.cpp rounds where YaRN's blend of frequencies begins and ends, which this model does not")
        keys |= {_ORIGINAL: rope.original_max_position_embeddings}
        keys |= {_BETA_FAST: float(rope.beta_fast)} if rope.beta_fast != 32 else {}
        keys |= {_BETA_SLOW: float(rope.beta_slow)} if rope.beta_slow != 1 else {}
    if rope.kind == "longrope":
        keys |= {_ORIGINAL: rope.original_max_position_embeddings}
        keys |= {"rope.scaling.attn_factor": float(rope.attention_factor)}
    return {**keys, "rope.freq_base": rope.theta}


def rope_tensors(rope: RopeConfig, head_dim: int) -> dict[str, np.ndarray]:
    """What GGUF stores as tensors and HF in the config, float32 [R/2] each."""
    if rope.kind == "llama3":
        return {FREQUENCIES: rope_divisors(rope, head_dim)}
    if rope.kind == "longrope":
        return {tensor: np.asarray(getattr(rope, field), np.float32) for field, tensor in FACTORS.items()}
    return {}


def rope_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """What "llama3" divides each frequency by: float32 [head_dim / 2], in llama.cpp's arithmetic.

    Wavelengths below original_max / high_freq_factor keep their frequency (1), those beyond original_max /
    low_freq_factor are divided by `factor`, the band between is blended.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.float32(2 * math.pi) * np.float32(rope.theta) ** exponents
    turns = rope.original_max_position_embeddings / wavelengths
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor or 1e-9), 0, 1)
    divisors = 1 / ((1 - smooth) / rope.factor + smooth)
    divisors[turns > rope.high_freq_factor] = 1
    divisors[turns < rope.low_freq_factor] = rope.factor
    return divisors.astype(np.float32)


def recognise_llama3(
    divisors: np.ndarray, rope_parameters: dict[str, Any], head_dim: int, where: object
) -> dict[str, Any]:
    """`rope_parameters` with the llama3 scaling that gives these divisors.

    Raises:
      JaxftError: no llama3 scaling gives them, or there is another scaling beside them.
    """
    tensor = f"{where}, tensor {FREQUENCIES}"
    if rope_parameters["rope_type"] != "default":
        raise JaxftError(tensor, f"cannot be combined with rope scaling {rope_parameters['rope_type']!r}")
    factor = float(divisors.max())
    for fields in _LLAMA3:
        expected = rope_divisors(RopeConfig(rope_parameters["rope_theta"], "llama3", factor, **fields), head_dim)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-5, atol=0):
            return {**rope_parameters, "rope_type": "llama3", "factor": factor, **fields}
    known = " or ".join(", ".join(f"{name} {value:g}" for name, value in fields.items()) for fields in _LLAMA3)
    raise JaxftError(
        tensor,
        f"holds frequency divisors of shape {list(divisors.shape)} up to {factor:g} that are not Llama 3's scaling "
        f"({known})",
    )
