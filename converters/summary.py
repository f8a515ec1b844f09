"""What a path holds, for `jaxft-convert inspect`: any checkpoint or PEFT adapter, described from its headers."""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.markup import escape

from converters.open import format_of, gguf_file, open_checkpoint, resolve
from jaxft.console import console, size, table, tree_bytes

_NAMES = {"hf": "Hugging Face checkpoint", "orbax": "Orbax checkpoint", "gguf": "GGUF file", "peft": "PEFT adapter"}


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """One tensor as it is stored; `dtype` is numpy's name, or GGUF's where the file is GGUF."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

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
            "tensors": [dataclasses.asdict(tensor) for tensor in self.tensors],
        }

    def show(self) -> None:
        """Prints the same for people to read."""
        facts = self.as_json()
        fields = [(name, value) for name, value in self.config.items() if value not in (None, {}, [])]
        dtypes = [
            (dtype, total["tensors"], f"{total['parameters']:,}", size(total["bytes"]))
            for dtype, total in facts["dtypes"].items()
        ]
        tensors = [(t.name, list(t.shape), t.dtype, size(t.bytes)) for t in self.tensors]
        console.print(table("Config", ["field", "value"], fields))
        console.print(table("Tensors", ["name", "shape", "dtype", "size"], tensors))
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


def summarize(name: Path | str) -> Summary:
    """Describes a local path or a name on the hub.

    Raises:
      JaxftError: it cannot be opened.
    """
    path = resolve(name)
    found = format_of(path)
    if found == "peft":
        return _adapter(path)
    checkpoint = open_checkpoint(path)
    if found == "gguf":
        return Summary(gguf_file(path), found, checkpoint.config, _gguf_tensors(gguf_file(path)))
    tensors = [_tensor(name, info.shape, info.dtype) for name, info in checkpoint.tensors.items()]
    return Summary(path, found, checkpoint.config, tensors)


def _adapter(path: Path) -> Summary:
    from converters.peft_io import read_adapter

    adapter = read_adapter(path)
    tensors = [_tensor(name, array.shape, array.dtype) for name, array in adapter.tensors.items()]
    return Summary(path, "peft", adapter.config, tensors)


def _gguf_tensors(path: Path) -> list[TensorSummary]:
    from converters.gguf_header import read_header

    entries = read_header(path).tensors.values()
    return [TensorSummary(entry.name, entry.shape, entry.type.name, entry.nbytes) for entry in entries]


def _tensor(name: str, shape: tuple[int, ...], dtype: Any) -> TensorSummary:
    return TensorSummary(name, shape, dtype.name, math.prod(shape) * dtype.itemsize)
