"""Converted weights on disk: a checkpoint that was quantized while it loaded need not be quantized a second time.

The copy is a folder as bitsandbytes stores NF4 (`converters.bnb`), so that other programs read it too. Its name says
which files, of which sizes and times, it was made from: a checkpoint that changed is converted again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from converters.archs import arch_of
from converters.bnb import write_bnb
from converters.checkpoint import Checkpoint, QuantizedCheckpoint
from converters.load import load_decoder
from converters.merge import DerivedCheckpoint
from converters.open import open_checkpoint
from converters.safetensors_io import nbytes
from jaxft import console
from jaxft.errors import JaxftError
from jaxft.models.decoder import Decoder
from jaxft.models.params import TensorView, tensor_views
from jaxft.quant import QTensor

# Smaller checkpoints are quantized about as fast as a copy is read.
MIN_BYTES = 2**30
_VERSION = 1


def load_nf4(source: Checkpoint, *, dtype: DTypeLike, cache: Path, min_bytes: int = MIN_BYTES) -> Decoder:
    """A Decoder with the linears of its layers in NF4, from the converted copy where there is one.

    Args:
      dtype: of every parameter that is not quantized.
      cache: the folder of the copies.
      min_bytes: checkpoints with less than that are neither looked up nor kept.

    Raises:
      JaxftError: see `converters.load.check`; or the copy is damaged.
    """
    small = sum(map(nbytes, source.tensors.values())) < min_bytes
    # A copy holds whole quantized tensors of the checkpoint, and a part of one cannot be loaded.
    has_parts = bool(arch_of(source.config.get("model_type"), source.where).layout)
    if isinstance(source, QuantizedCheckpoint) or small or has_parts:
        return load_decoder(source, dtype=dtype, quantization="nf4")
    copy = cache / _name(source)
    if copy.is_dir():
        console.console.print(f"reading the converted copy {copy}")
        return load_decoder(open_checkpoint(copy), dtype=dtype, quantization="nf4")
    decoder = load_decoder(source, dtype=dtype, quantization="nf4")
    try:
        console.wrote(write_bnb(_Converted(source, decoder), copy), "NF4 copy, which loads faster the next time")
    except (JaxftError, OSError) as error:
        console.warn(f"no converted copy was kept: {error}")
    return decoder


class _Converted(DerivedCheckpoint):
    """`source` with the weights that `decoder` holds in NF4; everything else as the source has it."""

    def __init__(self, source: Checkpoint, decoder: Decoder) -> None:
        super().__init__(source)
        self._views: dict[str, TensorView] = tensor_views(decoder)

    def quantized(self, name: str) -> QTensor | None:
        """The decoder's weight; None where it is not quantized."""
        return self._views[name].quantized() if name in self._views else None

    def read(self, name: str) -> np.ndarray:
        """The source's tensor."""
        return self._base.read(name)


def _name(source: Checkpoint) -> str:
    """A folder's name that changes with the checkpoint's files."""
    path = Path(source.where).resolve()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{path.name}-{hashlib.sha256(repr((_VERSION, stats)).encode()).hexdigest()[:16]}"
