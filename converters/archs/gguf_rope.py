"""RoPE in GGUF, both ways: `rope.*` keys, and the tensor `rope_freqs.weight` that carries Llama 3's scaling.

GGUF has no keys for rope_type "llama3". llama.cpp's converter stores what it does to the frequencies instead: one
divisor for each rotated pair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from operator import itemgetter
from typing import Any

import numpy as np

from converters.archs.gguf_keys import Facts, Key, MetadataReader, check_fact
from converters.archs.rope import yarn_mscale
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.models.config import RopeConfig, RopeKind

FREQUENCIES = "rope_freqs.weight"
# LongRoPE's divisors: HF's field -> tensor.
FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}


def _unless(default: float, name: str, field: str) -> Key:
    """A key that is only written where it says something else."""

    def value(rope: Facts) -> float | None:
        return None if rope[field] == default else rope[field]

    return Key(name, field, kind="number", default=default, value=value)


# The kinds that a key names; tensors say the others.
_TYPE, _TYPES = "rope.scaling.type", ("linear", "yarn")
_FACTOR = Key("rope.scaling.factor", "factor", kind="number")
_ORIGINAL = Key("rope.scaling.original_context_length", "original_max_position_embeddings")
# The keys of each kind, which `rope_parameters` and RopeConfig call the same.
_SCALINGS: dict[str, tuple[Key, ...]] = {
    "linear": (_FACTOR,),
    "yarn": (
        _FACTOR,
        _ORIGINAL,
        _unless(32.0, "rope.scaling.yarn_beta_fast", "beta_fast"),
        _unless(1.0, "rope.scaling.yarn_beta_slow", "beta_slow"),
    ),
    "longrope": (_ORIGINAL, Key("rope.scaling.attn_factor", "attention_factor", kind="number", default=1.0)),
}

# What models have in rope_type "llama3", beside a `factor` of their own: Llama 3.1 to 3.3, and Llama 4.
_LLAMA3 = tuple(
    {"low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": 8192} for high in (4.0, 1.0)
)


@dataclasses.dataclass(frozen=True)
class Rope:
    """The row of the rotation: its keys, and what llama.cpp's graph of an architecture can rotate.

    "llama3" has no key beside its theta, see `rope_divisors`.

    Attributes:
      kinds, interleaved: as of `RopeConfig`.
      whole_heads: all of a head is rotated, and no other value of `rope.dimension_count` is possible.
      truncate: of the architecture's YaRN. llama.cpp rounds where the blend begins and ends in any case; a warning says
        so where the model does not.
      attention_factor: of the architecture's YaRN; None: the paper's.
      outer: parameters for which the HF config has a field, too.
    """

    kinds: Collection[RopeKind] = ("default", "linear", "llama3", "yarn")
    interleaved: bool = False
    whole_heads: bool = True
    truncate: bool = True
    attention_factor: float | None = None
    outer: tuple[str, ...] = ()

    name, hf, says = "rope", "rope_parameters", ("rope",)

    @property
    def dimension_count(self) -> Key:
        """The row of how many values of a head are rotated."""
        key = Key("rope.dimension_count", None, "rope", default=itemgetter("head_dim"), value=_rotated)
        return key if self.whole_heads else dataclasses.replace(key, hf=self.hf, read_as=_with_share)

    def read(self, reader: MetadataReader, fields: Facts) -> dict[str, Any]:
        """`rope_parameters` as HF's config.json has them; refuses other scalings by name."""
        parameters = {"rope_theta": reader.number("rope.freq_base", 10000.0), **_read_scaling(reader)}
        if parameters["rope_type"] == "yarn" and not self.truncate:
            parameters["truncate"] = False
        return {self.hf: parameters, **{name: parameters[name] for name in self.outer if name in parameters}}

    def write(self, facts: Facts) -> dict[str, int | float | str]:
        """The `rope.*` keys.

        Raises:
          JaxftError: a rotation that the graph does not have; a YaRN whose attention factor or blend is another.
        """
        rope: RopeConfig = facts["rope"]
        check_fact("rope_type", rope.kind, tuple(self.kinds))
        check_fact("interleaved rotation", rope.interleaved, (self.interleaved,))
        if self.whole_heads:
            check_fact("partial_rotary_factor", rope.partial_rotary_factor, (1.0,))
        if rope.kind == "yarn":
            self._check_yarn(rope)
        return {**_write_scaling(rope), "rope.freq_base": rope.theta}

    def _check_yarn(self, rope: RopeConfig) -> None:
        expected = yarn_mscale(rope.factor, 1) if self.attention_factor is None else self.attention_factor
        if rope.truncate != self.truncate or not math.isclose(rope.attention_factor, expected, rel_tol=1e-6):
            raise JaxftError(
                "config field rope_parameters",
                f"GGUF's yarn has truncate = {self.truncate} and attention_factor = {expected:g}, not {rope.truncate} "
                f"and {rope.attention_factor:g}",
            )
        if not self.truncate:
            warn("llama.cpp rounds where YaRN's blend of frequencies begins and ends, which this model does not")


def _rotated(facts: Facts) -> int:
    return facts["rope"].rotated(facts["head_dim"])


def _with_share(rotated: int, fields: Facts) -> dict[str, Any]:
    return {**fields["rope_parameters"], "partial_rotary_factor": rotated / fields["head_dim"]}


def _with_local(theta: float, fields: Facts) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": theta}
    return {"full_attention": fields["rope_parameters"], "sliding_attention": local}


# Of windows that have a rotation of their own.
LOCAL_THETA = Key(
    "rope.freq_base_swa",
    "rope_parameters",
    "local_rope",
    "number",
    default=10_000.0,
    read_as=_with_local,
    value=lambda facts: facts["local_rope"].theta,
)


def _read_scaling(reader: MetadataReader) -> dict[str, Any]:
    kind = reader.choice(_TYPE, ("none", *_TYPES), "none")
    if kind == "none":
        kind = "longrope" if set(FACTORS.values()) <= set(reader.tensors) else "default"
    reader.ignore("rope.scaling.finetuned")
    parameters = {"rope_type": kind}
    for key in _SCALINGS.get(kind, ()):
        parameters |= key.read(reader, parameters)
    return parameters


def _write_scaling(rope: RopeConfig) -> dict[str, int | float | str]:
    keys: dict[str, int | float | str] = {_TYPE: rope.kind} if rope.kind in _TYPES else {}
    for key in _SCALINGS.get(rope.kind, ()):
        keys |= key.write(vars(rope))
    return keys


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
    kind = rope_parameters.get("rope_type", "by kind of layer")  # Gemma 3 has parameters for each kind
    if kind != "default":
        raise JaxftError(tensor, f"cannot be combined with rope scaling {kind!r}")
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
