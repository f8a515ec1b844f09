"""Values as the bytes of a GGUF file: a few rows after the other, large models' in processes of their own."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from converters.gguf_quants import QUANTIZABLE, Quantize, quantize
from converters.gguf_workers import Workers, n_workers, worth_compiling
from jaxft.errors import JaxftError

# Values that are encoded at once: what lies in memory beside the tensor is a few of these for each process.
_BLOCK = 1 << 18


class Matrix(NamedTuple):
    """A tensor, or a part of one, and how it is stored.

    Attributes:
      values: [..., columns].
      kind: its type in the file.
      importance: see `gguf_quants.quantize`; or [experts, columns] for values [experts, rows, columns].
      where: for messages.
    """

    values: np.ndarray
    kind: GGMLQuantizationType
    importance: np.ndarray | None
    where: str

    def blocks(self) -> Iterator[Matrix]:
        """A few rows each, in order."""
        if self.importance is not None and self.importance.ndim == 2:
            for expert, weights in zip(self.values, self.importance, strict=True):
                yield from self._replace(values=expert, importance=weights).blocks()
            return
        rows = self.values.reshape(-1, self.values.shape[-1])
        step = max(1, _BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            yield self._replace(values=rows[start : start + step])


Data = Matrix | bytes | np.ndarray  # the latter two: as they are in the file


def write_data(data: Iterable[tuple[io.BufferedIOBase, Data]], n_values: int) -> None:
    """Appends to files; bytes and uint8 arrays as they are.

    Args:
      data: what goes to which file, taken as it is needed, in order, so that one matrix at a time need be in memory.
      n_values: so many of all values are to be quantized, which says whether other processes help.

    Raises:
      JaxftError: see `encode`; or one of the processes was ended.
    """
    n = n_workers(n_values)
    with contextlib.closing(_encoded(data, n, worth_compiling(n_values, n))) as blocks:
        for file, block in blocks:
            file.write(block)


def _encoded(
    data: Iterable[tuple[io.BufferedIOBase, Data]], n: int, compiled: bool
) -> Generator[tuple[io.BufferedIOBase, bytes | memoryview]]:
    blocks = ((file, part) for file, item in data for part in _blocks(item))
    if n == 1 and not compiled:
        yield from map(partial(_bytes, quantize), blocks)
        return
    with Workers(n, compiled=compiled) as workers:
        yield from workers.map(partial(_bytes, workers.quantize), blocks)


def _blocks(item: Data) -> Iterable[Data]:
    return item.blocks() if isinstance(item, Matrix) else (item,)


def _bytes(by: Quantize, block: tuple[io.BufferedIOBase, Data]) -> tuple[io.BufferedIOBase, bytes | memoryview]:
    file, part = block
    if isinstance(part, Matrix):
        part = encode(*part, by=by).reshape(-1).view(np.uint8)
    return file, part if isinstance(part, bytes) else part.data


def encode(
    array: np.ndarray,
    kind: GGMLQuantizationType,
    importance: np.ndarray | None,
    where: object,
    *,
    by: Quantize = quantize,
) -> np.ndarray:
    """The values in a type, as an array whose bytes are those of the file.

    Raises:
      JaxftError: a value is not finite or too large for the type.
    """
    if kind == GGMLQuantizationType.BF16:
        return np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))
    try:
        if kind in QUANTIZABLE:
            return by(array, kind, importance)
        with np.errstate(over="raise", invalid="raise"):
            return np.ascontiguousarray(gguf.quants.quantize(array.astype(np.float32, copy=False), kind))
    except FloatingPointError as error:
        raise JaxftError(
            where,
            f"has values that {kind.name} cannot hold (NaN, infinite, or a scale beyond float16's 65504)",
            "Write f32 or bf16 instead",
        ) from error
