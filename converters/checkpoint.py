"""What every format on disk looks like to the rest: an HF config, tensors under HF names, and tokenizer files.

Sources (HF safetensors, GGUF, Orbax, a model in memory) implement `Checkpoint`; sinks (`hf_export`, `gguf_export`,
`orbax_io`, the loader of decoders) take any of them, so each format is read in one place and written in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

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


def stream(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (HF name, array) one tensor at a time."""
    for name in checkpoint.tensors:
        yield name, checkpoint.read(name)
