"""What every format on disk looks like to the rest: an HF config, tensors under HF names, and tokenizer files.

Sources (HF safetensors, GGUF, Orbax, a model in memory) implement `Checkpoint`; sinks (`hf_export`, `gguf_export`,
`orbax_io`, the loader of decoders) take any of them, so each format is read in one place and written in one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxft.errors import JaxftError
from jaxft.quant import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TensorInfo(NamedTuple):
    """Shape and numpy dtype (bfloat16 is ml_dtypes') of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype


@runtime_checkable
class Checkpoint(Protocol):
    """An open checkpoint. Opening validates headers; tensor data is read only by `read`.

    Attributes:
      where: the file or folder, for messages.
      config: the HF config.json as a dict, key by key as stored (or derived, for formats that hold none).
      tensors: every tensor under its HF name, in the order of the file; one entry a layer, never stacked.
    """

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype (quantized GGUF types: dequantized to float32)."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer with its chat template; None when the checkpoint has no tokenizer files."""
        ...

    def sidecars(self) -> dict[str, bytes]:
        """File name -> content of what travels along unchanged: generation_config.json, tokenizer files ...

        Empty for formats that keep no such files; sinks then write what `tokenizer()` gives.
        """
        ...


@runtime_checkable
class QuantizedCheckpoint(Checkpoint, Protocol):
    """A checkpoint that holds some weights in a form of `jaxft.quant`."""

    def quantized(self, name: str) -> QTensor | None:
        """The weight as it is stored, of numpy arrays; None where it is not quantized."""
        ...


def quantization_of(checkpoint: Checkpoint) -> str | None:
    """What reading undoes, in words ("GGUF Q4_K, Q6_K"); None where every tensor is read as it is stored.

    Formats that quantize say so in an attribute `quantization`.
    """
    return getattr(checkpoint, "quantization", None)


def stream(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (HF name, array) one tensor at a time."""
    for name in checkpoint.tensors:
        yield name, checkpoint.read(name)


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raises one JaxftError that lists every tensor that is missing, unexpected or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        raise JaxftError(where, f"its tensors do not fit its config: {'; '.join(problems)}")
