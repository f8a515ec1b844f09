"""Checkpoints that are computed as they are read: a decoder in memory, and a base with an adapter merged into it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from converters.archs import arch_of
from converters.checkpoint import Checkpoint, TensorInfo
from converters.expert_adapters import taken_apart
from converters.hf_files import without_tokenizer
from converters.load import EMBEDDING, HEAD
from converters.peft_io import Adapter, scale_of
from converters.resume import hash_of, origin_of
from jaxft.errors import JaxftError
from jaxft.models.decoder import Decoder
from jaxft.models.layers import EXPERTS
from jaxft.models.params import TensorView, tensor_views
from jaxft.quant import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DerivedCheckpoint:
    """What a computed checkpoint takes over from the one that it is computed from; others add `read`.

    Attributes:
      new_tokenizer: in place of the base's.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self.new_tokenizer: PreTrainedTokenizerBase | None = None
        self.where = base.where
        self.config = base.config
        self.tensors = base.tensors

    def origin(self) -> list[Any] | None:
        """See `converters.resume`; None: what else than the base the values come from is not known."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base's, or the new one."""
        return self.new_tokenizer or self._base.tokenizer()

    def sidecars(self) -> dict[str, bytes]:
        """The base's."""
        sidecars = self._base.sidecars()
        return sidecars if self.new_tokenizer is None else without_tokenizer(sidecars)


class DecoderCheckpoint(DerivedCheckpoint):
    """A decoder's base weights, without its adapter, in the dtypes of the checkpoint that it came from.

    Args:
      decoder: quantized weights come dequantized.
      source: where config, tokenizer and dtypes are taken from.
    """

    def __init__(self, decoder: Decoder, source: Checkpoint) -> None:
        super().__init__(source)
        self._views: dict[str, TensorView] = tensor_views(decoder)
        self._layout = arch_of(source.config["model_type"], source.where).tensors(decoder.config)
        self.tensors = {
            # A head that an adapter parted from the embedding is not in the source.
            name: TensorInfo(shape, source.tensors[name if name in source.tensors else EMBEDDING].dtype)
            for name, shape in self._layout.hf_shapes.items()
        }
        if HEAD in self.tensors and HEAD not in source.tensors:
            self.config = {**source.config, "tie_word_embeddings": False}

    def quantized(self, name: str) -> QTensor | None:
        """The weight as the decoder holds it; None where it is not quantized, or not a weight of its own."""
        return self._views[name].quantized() if name in self._views else None

    def expert(self, name: str) -> QTensor | None:
        """The decoder's weight of that name, which HF may hold as a part of another, as `quantized` gives it."""
        return self.quantized(name) if f".{EXPERTS}." in name else None

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the source's dtype."""
        array = self._layout.hf[name].read(lambda part: self._views[part].read())
        return array.astype(self.tensors[name].dtype)


class MergedCheckpoint(DerivedCheckpoint):
    """`base` with an adapter: W + scale * B A for every adapted weight, and what was trained whole in its place.

    With DoRA the rows of W + scale * B A (the columns of an embedding) are brought to the adapter's magnitudes. It is
    computed in float32 one tensor at a time, and comes in W's dtype. Where head and embedding were one and the adapter
    parts them, the head is a tensor of its own.

    Raises:
      JaxftError: tensors that the base does not have, or whose shape does not fit, all of them listed.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base)
        spec = arch_of(base.config["model_type"], base.where)
        self._layout = spec.tensors(spec.decoder_config(base.config, base.where))
        self._adapter = adapter = taken_apart(adapter, self._layout, spec)
        self._adapted = frozenset(adapter.modules)
        self._whole = frozenset(adapter.whole)
        tied = HEAD not in base.tensors
        if tied and adapter.config.get("ensure_weight_tying"):
            self._whole -= {HEAD}
        elif tied and {EMBEDDING, HEAD} & ({f"{module}.weight" for module in self._adapted} | self._whole):
            self.config = {**base.config, "tie_word_embeddings": False}
            self.tensors = {**base.tensors, HEAD: base.tensors[EMBEDDING]}
        problems = [problem for module in adapter.modules for problem in self._module_problems(module)]
        for name in sorted(self._whole):
            problems += self._problems(name, adapter.tensors[name].shape)
        if problems:
            raise JaxftError(base.where, f"is not the base of this adapter: {'; '.join(problems)}")

    def origin(self) -> list[Any] | None:
        """The base's and the adapter."""
        base, adapter = origin_of(self._base), self._adapter
        return base and ["merged", base, adapter.config, hash_of(adapter.tensors)]

    @property
    def adapted(self) -> list[str]:
        """The weights that the adapter changes."""
        names = (f"{module}.weight" for module in self._adapter.modules)
        return list(dict.fromkeys(self._layout.decoder[n].names[0] if self._is_part(n) else n for n in names))

    def _is_part(self, name: str) -> bool:
        """Whether a weight is an expert's that the base has in one tensor with the others'."""
        return name not in self.tensors and name in self._layout.decoder

    def _module_problems(self, module: str) -> list[str]:
        tensors = self._adapter.tensors
        if self._is_embedding(module):
            shape = (tensors[f"{module}.lora_embedding_A"].shape[1], tensors[f"{module}.lora_embedding_B"].shape[0])
        else:
            shape = (tensors[f"{module}.lora_B.weight"].shape[0], tensors[f"{module}.lora_A.weight"].shape[1])
        if self._is_part(f"{module}.weight"):
            expected = self._layout.decoder[f"{module}.weight"].shape
            return [] if shape == expected else [f"{module} is {list(expected)}, not {list(shape)}"]
        return self._problems(f"{module}.weight", shape)

    def _problems(self, name: str, shape: tuple[int, ...]) -> list[str]:
        info = self.tensors.get(name)
        if info is None:
            return [f"it has no {name}"]
        return [] if info.shape == shape else [f"{name} is {list(info.shape)}, not {list(shape)}"]

    def read(self, name: str) -> np.ndarray:
        """One tensor, with all that the adapter says of it."""
        dtype = self.tensors[name].dtype
        weight = self.before(name)
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._adapted:
            weight = self._merged(module, weight.astype(np.float32))
        elif name in self._layout.hf and self._of_parts(name):
            weight = weight.astype(np.float32) + self._layout.hf[name].compute(*self._changes_of_parts(name))
        return weight.astype(dtype)

    def _of_parts(self, name: str) -> bool:
        parts = self._layout.hf[name].names
        return any(part.removesuffix(".weight") in self._adapted and self._is_part(part) for part in parts)

    def _changes_of_parts(self, name: str) -> list[np.ndarray]:
        """What the adapter adds to each of the linears that a tensor of the base holds."""
        changes = []
        for part in self._layout.hf[name].names:
            module = part.removesuffix(".weight")
            if module in self._adapted:
                changes.append(np.float32(scale_of(self._adapter, module)) * self._change(module))
            else:
                changes.append(np.zeros(self._layout.decoder[part].shape, np.float32))
        return changes

    def before(self, name: str) -> np.ndarray:
        """One tensor without its low-rank change."""
        if name in self._whole:
            return self._adapter.tensors[name]
        return self._base.read(name if name in self._base.tensors else EMBEDDING)

    def _merged(self, module: str, weight: np.ndarray) -> np.ndarray:
        merged = weight + np.float32(scale_of(self._adapter, module)) * self._change(module)
        magnitude = self._adapter.tensors.get(f"{module}.lora_magnitude_vector")
        if magnitude is None:
            return merged
        of_features = 0 if self._is_embedding(module) else 1
        norms = np.linalg.norm(merged, axis=of_features, keepdims=True)
        wanted = np.expand_dims(magnitude.astype(np.float32), of_features)
        return merged * (wanted / np.where(norms == 0, np.float32(1), norms))

    def _change(self, module: str) -> np.ndarray:
        """B A, in the shape of the module's weight: float32."""
        if self._is_embedding(module):
            parts = (self._adapter.tensors[f"{module}.lora_embedding_{part}"] for part in "AB")
            a, b = (part.astype(np.float32) for part in parts)
            return (b @ a).T
        a, b = (self._adapter.tensors[f"{module}.lora_{part}.weight"].astype(np.float32) for part in "AB")
        return b @ a

    def _is_embedding(self, module: str) -> bool:
        return f"{module}.lora_embedding_A" in self._adapter.tensors


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
        changes += np.square(exact - merged.before(name)).sum()
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

    def origin(self) -> list[Any] | None:
        """The base's."""
        base = origin_of(self._base)
        return base and ["cast", base]

    def read(self, name: str) -> np.ndarray:
        """One tensor, cast where it is wider than 16 bits."""
        return self._base.read(name).astype(self.tensors[name].dtype)
