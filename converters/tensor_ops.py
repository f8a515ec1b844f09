"""Reversible changes of one tensor between two formats, each with its inverse: one table, used in both directions."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class TensorOp(Protocol):
    """A change of the tensors whose HF name ends in `suffix`; `config` is the HF config dict."""

    @property
    def suffix(self) -> str: ...

    def apply(self, array: np.ndarray, config: dict[str, Any]) -> np.ndarray: ...

    def invert(self, array: np.ndarray, config: dict[str, Any]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class PermuteRope:
    """Reorders the output rows of each head from HF's halves (0..H/2, H/2..H) to llama.cpp's pairs (0, H/2, 1, ...).

    HF rotates value i with value i + H/2, llama.cpp's "llama" architecture value 2i with value 2i + 1.
    Works on weights [heads * H, in] and on biases [heads * H].

    Attributes:
      suffix: end of the HF tensor names that it applies to.
      heads_field: the config field that counts the heads.
    """

    suffix: str
    heads_field: str

    def apply(self, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """HF order -> llama.cpp order."""
        heads = config[self.heads_field]
        parts = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return parts.swapaxes(1, 2).reshape(array.shape)

    def invert(self, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """llama.cpp order -> HF order."""
        heads = config[self.heads_field]
        parts = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        return parts.swapaxes(1, 2).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class AddOne:
    """Weights that HF stores less 1 and llama.cpp as they multiply; exact where the sum is (see `invert`).

    Attributes:
      suffix: end of the HF tensor names that it applies to.
    """

    suffix: str

    def apply(self, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """w -> 1 + w, in float32, as llama.cpp's converter stores norms."""
        return array.astype(np.float32) + np.float32(1)

    def invert(self, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """1 + w -> w: what `apply` rounded away is lost, nothing of 16-bit weights above 2^-8 or so."""
        return array - np.float32(1)


# q and k of architectures that llama.cpp rotates in pairs though HF rotates halves.
PERMUTE_QK = tuple(
    PermuteRope(f"self_attn.{projection}.{kind}", heads)
    for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
    for kind in ("weight", "bias")
)

# The norms of architectures that multiply by 1 + weight.
ADD_ONE_TO_NORMS = (AddOne("norm.weight"),)
