"""Checkpoints that are computed as they are read: a decoder in memory, and a base with an adapter merged into it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from converters.checkpoint import Checkpoint, TensorInfo
from converters.peft_io import Adapter, scale_of
from jaxft.errors import JaxftError
from jaxft.models.decoder import Decoder
from jaxft.models.params import TensorView, tensor_views
from jaxft.quant import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DerivedCheckpoint:
    """What a computed checkpoint takes over from the one that it is computed from; others add `read`."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self.where = base.where
        self.config = base.config
        self.tensors = base.tensors

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base's."""
        return self._base.tokenizer()

    def sidecars(self) -> dict[str, bytes]:
        """The base's."""
        return self._base.sidecars()


class DecoderCheckpoint(DerivedCheckpoint):
    """A decoder's base weights, without its adapter, in the dtypes of the checkpoint that it came from.

    Args:
      decoder: quantized weights come dequantized.
      source: where config, tokenizer and dtypes are taken from.
    """

    def __init__(self, decoder: Decoder, source: Checkpoint) -> None:
        super().__init__(source)
        self._views: dict[str, TensorView] = tensor_views(decoder)
        self.tensors = {name: TensorInfo(view.shape, source.tensors[name].dtype) for name, view in self._views.items()}

    def quantized(self, name: str) -> QTensor | None:
        """The weight as the decoder holds it; None where it is not quantized."""
        return self._views[name].quantized()

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the source's dtype."""
        return self._views[name].read().astype(self.tensors[name].dtype)


class MergedCheckpoint(DerivedCheckpoint):
    """W + scale * B A for every adapted weight of `base`, computed in float32 one tensor at a time, in W's dtype.

    Raises:
      JaxftError: adapted weights that the base does not have, or whose shape does not fit, all of them listed.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base)
        self._adapter = adapter
        self._adapted = frozenset(adapter.modules)
        problems = [problem for module in adapter.modules for problem in self._problems(module)]
        if problems:
            raise JaxftError(base.where, f"is not the base of this adapter: {'; '.join(problems)}")

    @property
    def base(self) -> Checkpoint:
        """What the adapter is merged into."""
        return self._base

    @property
    def adapted(self) -> list[str]:
        """The weights that the adapter changes."""
        return [f"{module}.weight" for module in self._adapter.modules]

    def _problems(self, module: str) -> list[str]:
        a, b = self._factors(module)
        info = self._base.tensors.get(f"{module}.weight")
        if info is None:
            return [f"it has no {module}.weight"]
        changed = (b.shape[0], a.shape[1])
        return [] if info.shape == changed else [f"{module}.weight is {list(info.shape)}, not {list(changed)}"]

    def _factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        a, b = (self._adapter.tensors[f"{module}.lora_{part}.weight"].astype(np.float32) for part in "AB")
        return a, b

    def read(self, name: str) -> np.ndarray:
        """One tensor, merged where the adapter has a pair for it."""
        weight = self._base.read(name)
        module = name.removesuffix(".weight")
        if module not in self._adapted:
            return weight
        a, b = self._factors(module)
        merged = weight.astype(np.float32) + np.float32(scale_of(self._adapter, module)) * (b @ a)
        return merged.astype(weight.dtype)


@dataclasses.dataclass(frozen=True)
class RoundingLoss:
    """What storing merged weights in fewer bits loses, over all adapted weights (root mean squares).

    Attributes:
      of_weights: the rounding errors over the merged weights.
      of_change: the rounding errors over what the adapter changed.
    """

    of_weights: float
    of_change: float


def rounding_loss(merged: MergedCheckpoint, stored: Checkpoint) -> RoundingLoss:
    """Compares the merged weights with what a checkpoint holds of them, one tensor at a time."""
    errors, weights, changes = np.zeros(3)
    for name in merged.adapted:
        exact = merged.read(name).astype(np.float64)
        errors += np.square(stored.read(name) - exact).sum()
        weights += np.square(exact).sum()
        changes += np.square(exact - merged.base.read(name)).sum()
    return RoundingLoss(*(float(np.sqrt(errors / max(of, np.finfo(float).tiny))) for of in (weights, changes)))


class CastCheckpoint(DerivedCheckpoint):
    """`base` with its tensors of more than 16 bits in bfloat16, and config.json saying so where there are any."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        if any(info.dtype.itemsize > 2 for info in base.tensors.values()):
            self.config = {**base.config, "dtype": "bfloat16"}
            self.config.pop("torch_dtype", None)
        self.tensors = {
            name: info._replace(dtype=np.dtype(ml_dtypes.bfloat16)) if info.dtype.itemsize > 2 else info
            for name, info in base.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, cast where it is wider than 16 bits."""
        return self._base.read(name).astype(self.tensors[name].dtype)
