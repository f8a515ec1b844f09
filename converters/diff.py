"""Compares two checkpoints or adapters of any format, tensor by tensor, by their values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from converters.checkpoint import TensorInfo
from converters.open import format_of, open_checkpoint, resolve
from converters.peft_io import Adapter, read_adapter
from jaxft.console import console, table, track

Status = Literal["equal", "differs", "shape", "only in a", "only in b"]

# Values that are compared at a time.
_CHUNK = 1 << 22
# Says where a value was stored, not what the model computes.
_UNCOMPARED = frozenset({"dtype", "torch_dtype", "transformers_version", "_name_or_path", "quantization_config"})


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """One tensor in both.

    Attributes:
      status: "equal" is by value, whatever the dtypes; NaN equals NaN.
      a, b: "bfloat16 [64, 160]", or None where it is missing.
      largest: the largest absolute difference; NaN where only one side is NaN.
      relative: the root mean square of the difference over that of a.
    """

    name: str
    status: Status
    a: str | None
    b: str | None
    largest: float = 0.0
    relative: float = 0.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """All tensors of both, and the config fields that differ: name -> [value in a, value in b]."""

    tensors: list[TensorDifference]
    config: dict[str, list[Any]]

    @property
    def equal(self) -> bool:
        """Whether every tensor is in both with the same values, and the configs say the same."""
        return not self.config and all(tensor.status == "equal" for tensor in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        return {
            "equal": self.equal,
            "largest": float(np.max([tensor.largest for tensor in self.tensors], initial=0.0)),
            "config": self.config,
            "tensors": [dataclasses.asdict(tensor) for tensor in self.tensors],
        }

    def show(self) -> None:
        """Prints the same for people to read; equal tensors only as a number."""
        if self.config:
            console.print(table("Config", ["field", "a", "b"], [(name, *pair) for name, pair in self.config.items()]))
        changed = [tensor for tensor in self.tensors if tensor.status != "equal"]
        rows = [(t.name, t.status, t.a or "", t.b or "", f"{t.largest:.6g}", f"{t.relative:.3g}") for t in changed]
        if rows:
            columns = ["name", "status", "a", "b", "largest", "relative rms"]
            console.print(table("Tensors that differ", columns, rows))
        largest = np.max([tensor.largest for tensor in self.tensors], initial=0.0)
        console.print(
            f"{len(self.tensors) - len(changed)} of {len(self.tensors)} tensors are equal; "
            f"largest difference {largest:.6g}"
        )


@runtime_checkable
class _Side(Protocol):
    """What is compared: a checkpoint, or an adapter."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray: ...


class _AdapterSide:
    def __init__(self, adapter: Adapter) -> None:
        self.config = adapter.config
        self._arrays = adapter.tensors
        self.tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in adapter.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def diff(a: Path | str, b: Path | str) -> Difference:
    """Compares what two paths (or names on the hub) hold; quantized weights are decoded first.

    Raises:
      JaxftError: one of them cannot be opened.
    """
    sides = [_open(a), _open(b)]
    names = dict.fromkeys([*sides[0].tensors, *sides[1].tensors])
    tensors = [_compare(name, *sides) for name in track(list(names), "comparing tensors")]
    return Difference(tensors, _config_difference(sides[0].config, sides[1].config))


def _open(name: Path | str) -> _Side:
    path = resolve(name)
    return _AdapterSide(read_adapter(path)) if format_of(path) == "peft" else open_checkpoint(path)


def _config_difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    fields = [name for name in dict.fromkeys([*a, *b]) if name not in _UNCOMPARED]
    return {name: [a.get(name), b.get(name)] for name in fields if a.get(name) != b.get(name)}


def _compare(name: str, a: _Side, b: _Side) -> TensorDifference:
    info_a, info_b = a.tensors.get(name), b.tensors.get(name)
    words = (_in_words(info_a), _in_words(info_b))
    if info_a is None or info_b is None:
        return TensorDifference(name, "only in b" if info_a is None else "only in a", *words)
    if info_a.shape != info_b.shape:
        return TensorDifference(name, "shape", *words)
    equal, largest, relative = compare_arrays(a.read(name), b.read(name))
    return TensorDifference(name, "equal" if equal else "differs", *words, largest, relative)


def _in_words(info: TensorInfo | None) -> str | None:
    return None if info is None else f"{info.dtype} {list(info.shape)}"


def compare_arrays(a: np.ndarray, b: np.ndarray) -> tuple[bool, float, float]:
    """(equal by value, largest absolute difference, rms of the difference over rms of a) of two arrays of one shape."""
    equal, largest, squares, base = True, 0.0, 0.0, 0.0
    a, b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, _CHUNK):
        chunks = (a[start : start + _CHUNK], b[start : start + _CHUNK])
        if a.dtype == b.dtype and chunks[0].tobytes() == chunks[1].tobytes():
            base += float(np.square(chunks[0].astype(np.float64)).sum())
            continue
        x, y = (chunk.astype(np.float64) for chunk in chunks)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(same, 0.0, np.abs(x - y))
            squares += float(np.square(difference).sum())
            base += float(np.square(x).sum())
        equal &= bool(same.all())
        largest = float(np.maximum(largest, difference.max()))
    relative = float(np.sqrt(squares / base)) if base else float(np.inf if squares else 0.0)
    return equal, largest, relative
