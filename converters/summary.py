"""What a path holds, for `jaxft-convert inspect`: any checkpoint or PEFT adapter, described from its headers."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape

from converters.checkpoint import Checkpoint, QuantizedCheckpoint
from converters.gguf_header import read_header, stored_bytes
from converters.open import format_of, gguf_file, open_checkpoint, resolve
from converters.peft_io import read_adapter
from converters.safetensors_io import nbytes
from jaxft.console import console, size, table, track, tree_bytes

_NAMES = {"hf": "Hugging Face checkpoint", "orbax": "Orbax checkpoint", "gguf": "GGUF file", "peft": "PEFT adapter"}


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """One tensor as it is stored.

    Attributes:
      dtype: numpy's name; GGUF's where the file is GGUF; NF4 for a weight that bitsandbytes quantized.
      bytes: what it takes in the file, with the scales of a quantized weight.
      sha256: of those bytes, where it was asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str | None = None

    @property
    def parameters(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a path holds.

    Attributes:
      format: "hf", "orbax", "gguf" or "peft".
      config: config.json or adapter_config.json; for GGUF, the HF config that its metadata amounts to.
      tensors: under their names in the file.
    """

    path: Path
    format: str
    config: dict[str, Any]
    tensors: list[TensorSummary]

    def as_json(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        return {
            "path": str(self.path),
            "format": self.format,
            "bytes_on_disk": tree_bytes(self.path),
            "parameters": sum(tensor.parameters for tensor in self.tensors),
            "dtypes": self._dtypes(),
            "config": self.config,
            "tensors": [
                {key: value for key, value in dataclasses.asdict(tensor).items() if value is not None}
                for tensor in self.tensors
            ],
        }

    def show(self) -> None:
        """Prints the same for people to read."""
        facts = self.as_json()
        fields = [(name, value) for name, value in self.config.items() if value not in (None, {}, [])]
        dtypes = [
            (dtype, total["tensors"], f"{total['parameters']:,}", size(total["bytes"]))
            for dtype, total in facts["dtypes"].items()
        ]
        tensors = [(t.name, list(t.shape), t.dtype, size(t.bytes), t.sha256 or "") for t in self.tensors]
        console.print(table("Config", ["field", "value"], fields))
        console.print(table("Tensors", ["name", "shape", "dtype", "size", "sha256"], tensors))
        console.print(table("Dtypes", ["dtype", "tensors", "parameters", "size"], dtypes))
        headline = (
            f"{_NAMES[self.format]} {self.path}: {facts['parameters']:,} parameters in {len(self.tensors)} tensors, "
            f"{size(facts['bytes_on_disk'])} on disk"
        )
        console.print(escape(headline), soft_wrap=True, highlight=False)

    def _dtypes(self) -> dict[str, dict[str, int]]:
        totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for tensor in self.tensors:
            totals[tensor.dtype].update(tensors=1, parameters=tensor.parameters, bytes=tensor.bytes)
        return {dtype: dict(total) for dtype, total in totals.items()}


def summarize(name: Path | str, *, hashes: bool = False) -> Summary:
    """Describes a local path or a name on the hub.

    Args:
      hashes: read every tensor, for the hash of its bytes.

    Raises:
      JaxftError: it cannot be opened.
    """
    path = resolve(name)
    found = format_of(path)
    if found == "peft":
        adapter = read_adapter(path)
        tensors = [_summary(name, a.shape, a.dtype.name, [a], hashes) for name, a in adapter.tensors.items()]
        return Summary(path, found, adapter.config, tensors)
    checkpoint = open_checkpoint(path)
    if found == "gguf":
        return Summary(gguf_file(path), found, checkpoint.config, _gguf_tensors(gguf_file(path), hashes))
    tensors = [_stored(checkpoint, name, hashes) for name in _tracked(list(checkpoint.tensors), hashes)]
    return Summary(path, found, checkpoint.config, tensors)


def _gguf_tensors(path: Path, hashes: bool) -> list[TensorSummary]:
    entries = read_header(path).tensors.values()
    return [
        _summary(entry.name, entry.shape, entry.type.name, [stored_bytes(path, entry)], hashes)
        for entry in _tracked(list(entries), hashes)
    ]


def _stored(checkpoint: Checkpoint, name: str, hashes: bool) -> TensorSummary:
    weight = checkpoint.quantized(name) if isinstance(checkpoint, QuantizedCheckpoint) else None
    info = checkpoint.tensors[name]
    if weight is not None:
        return _summary(name, info.shape, "NF4", list(map(np.asarray, jax.tree.leaves(weight))), hashes)
    if hashes:
        return _summary(name, info.shape, info.dtype.name, [checkpoint.read(name)], hashes)
    return TensorSummary(name, info.shape, info.dtype.name, nbytes(info))


def _summary(name: str, shape: tuple[int, ...], dtype: str, parts: list[np.ndarray], hashes: bool) -> TensorSummary:
    """`parts` are what stands for the tensor in the file."""
    digest = hashlib.sha256()
    for part in parts if hashes else ():
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    total = sum(part.nbytes for part in parts)
    return TensorSummary(name, shape, dtype, total, digest.hexdigest() if hashes else None)


def _tracked(items: list[Any], hashes: bool) -> Iterable[Any]:
    return track(items, "hashing") if hashes else items
