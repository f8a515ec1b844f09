"""Between the tensors of an HF checkpoint and those of a decoder, where they are not one and the same, and back.

A family's `ArchSpec.layout` lists what differs; every other tensor has the same name and the same values on both sides.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

Shape = tuple[int, ...]


class Source(NamedTuple):
    """Where a tensor comes from: `compute` of the tensors `names` of the other side, in their order."""

    shape: Shape
    names: tuple[str, ...]
    compute: Callable[..., np.ndarray]

    def read(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The tensor; `read` gives those of the other side."""
        return self.compute(*map(read, self.names))


class Layout(NamedTuple):
    """Every tensor of both sides: HF name -> its source in the decoder, decoder's name -> its source in HF."""

    hf: dict[str, Source]
    decoder: dict[str, Source]

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """HF name -> shape."""
        return {name: source.shape for name, source in self.hf.items()}

    def is_same(self, name: str) -> bool:
        """Whether this tensor of the decoder is a tensor of HF."""
        return self.decoder[name].compute is _same


@runtime_checkable
class LayoutOp(Protocol):
    """One difference between the two sides."""

    def sources(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, Source], dict[str, Source]]:
        """(HF tensors, decoder's tensors) that differ, out of the decoder's `shapes`, each by name with its source."""
        ...


def layout_of(shapes: Mapping[str, Shape], ops: Sequence[LayoutOp]) -> Layout:
    """The layout of a decoder with tensors of these shapes; each op is given those that none before it was about."""
    hf: dict[str, Source] = {}
    decoder: dict[str, Source] = {}
    for op in ops:
        to_hf, to_decoder = op.sources({name: shape for name, shape in shapes.items() if name not in decoder})
        hf |= to_hf
        decoder |= to_decoder
    same = {name: Source(shape, (name,), _same) for name, shape in shapes.items() if name not in decoder}
    return Layout({**hf, **same}, {**decoder, **same})


def _same(array: np.ndarray) -> np.ndarray:
    return array


@dataclasses.dataclass(frozen=True)
class Fuse:
    """HF keeps several linears as one, the rows of each under those of the one before; a single one is renamed.

    Attributes:
      hf: HF's name of the linear, as its path ends.
      parts: the decoder's names, likewise.
    """

    hf: str
    parts: tuple[str, ...]

    def sources(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, Source], dict[str, Source]]:
        """Of weights and biases."""
        to_hf: dict[str, Source] = {}
        to_decoder: dict[str, Source] = {}
        for name, shape in shapes.items():
            prefix, found, kind = name.partition(f".{self.parts[0]}.")
            if found:
                names = tuple(f"{prefix}.{part}.{kind}" for part in self.parts)
                fused = f"{prefix}.{self.hf}.{kind}"
                ends = [0, *itertools.accumulate(shapes[part][0] for part in names)]
                to_hf[fused] = Source((ends[-1], *shape[1:]), names, _one_under_the_other)
                for part, start, stop in zip(names, ends[:-1], ends[1:], strict=True):
                    to_decoder[part] = Source(shapes[part], (fused,), _Rows(start, stop))
        return to_hf, to_decoder


@dataclasses.dataclass(frozen=True)
class SplitHeads:
    """One side has the heads of keys and values in turn in one linear, the other two stacks, that of keys transposed.

    [N (k + v), in] is [N, in, k] and [N, v, in] there.

    Attributes:
      whole: the name of the linear on the side of `shapes`, as it ends.
      keys, values: those of the stacks.
      heads: N.
      key_dim: k.
    """

    whole: str
    keys: str
    values: str
    heads: int
    key_dim: int

    def sources(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, Source], dict[str, Source]]:
        """Of weights."""
        to_stacks: dict[str, Source] = {}
        to_whole: dict[str, Source] = {}
        for name, (rows, *inputs) in shapes.items():
            if name.endswith(self.whole):
                keys, values = (name.removesuffix(self.whole) + part for part in (self.keys, self.values))
                value_dim = rows // self.heads - self.key_dim
                to_stacks[keys] = Source((self.heads, *inputs, self.key_dim), (name,), self._keys_of)
                to_stacks[values] = Source((self.heads, value_dim, *inputs), (name,), self._values_of)
                to_whole[name] = Source((rows, *inputs), (keys, values), self._join)
        return to_stacks, to_whole

    def _keys_of(self, array: np.ndarray) -> np.ndarray:
        return self._by_head(array)[:, : self.key_dim].swapaxes(1, 2)

    def _values_of(self, array: np.ndarray) -> np.ndarray:
        return self._by_head(array)[:, self.key_dim :]

    def _by_head(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.heads, -1, array.shape[-1])

    def _join(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[-1])


def _one_under_the_other(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays)


class _Rows(NamedTuple):
    start: int
    stop: int

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return array[self.start : self.stop]
