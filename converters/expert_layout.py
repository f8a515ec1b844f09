"""Reversible changes between experts as HF checkpoints hold them and as a decoder names them, one by one."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from converters.layout import Shape, Source


@dataclasses.dataclass(frozen=True)
class Rename:
    """The same tensors under other names.

    Attributes:
      hf, decoder: a part of the name on either side, with {} where the number of an expert stands.
    """

    hf: str
    decoder: str

    def sources(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, Source], dict[str, Source]]:
        """Of every tensor whose name holds `decoder` as whole parts."""
        to_hf: dict[str, Source] = {}
        to_decoder: dict[str, Source] = {}
        for name, shape in shapes.items():
            found = _pattern(self.decoder).search(name)
            if found:
                start, stop = found.span()
                hf = f"{name[:start]}.{self.hf.format(*found.groups())}.{name[stop:]}"
                to_hf[hf] = Source(shape, (name,), _same)
                to_decoder[name] = Source(shape, (hf,), _same)
        return to_hf, to_decoder


@dataclasses.dataclass(frozen=True)
class StackExperts:
    """All experts of a layer in one tensor, several linears' (gate and up) side by side or interleaved.

    The decoder's tensors, P for each of E experts, are an array [E, P, out, ...], whose axes come in the order `axes`;
    then those of P and of `out`, which are neighbours, are joined: P first is one linear's rows under the other's (or
    its columns beside them), P last is rows or columns in turn.

    Attributes:
      hf: the end of HF's name.
      parts: the ends of the decoder's names, with {} for the expert's number.
      axes: a permutation of (0, 1, 2, ...), which stand for E, P and the axes of the decoder's tensors.
      peft_exchanges: peft takes the tensor, which is [E, in, out], for [E, out, in]: its A is another's B transposed,
        and its B another's A.
    """

    hf: str
    parts: tuple[str, ...]
    axes: tuple[int, ...]
    peft_exchanges: bool = False

    def sources(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, Source], dict[str, Source]]:
        """Of every layer that has such experts."""
        to_hf: dict[str, Source] = {}
        to_decoder: dict[str, Source] = {}
        for prefix, experts in self.layers(shapes).items():
            names = tuple(f"{prefix}{part.format(e)}" for e in range(experts) for part in self.parts)
            stack = self.stack(experts, shapes[names[0]])
            hf = prefix + self.hf
            to_hf[hf] = Source(stack.hf_shape, names, stack.join)
            for index, name in enumerate(names):
                take = functools.partial(stack.take, *divmod(index, len(self.parts)))
                to_decoder[name] = Source(shapes[name], (hf,), take)
        return to_hf, to_decoder

    def stack(self, experts: int, shape: Shape) -> Stack:
        """The array of so many experts' linears, each of them of this shape."""
        return Stack((experts, len(self.parts), *shape), self.axes)

    def layers(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        """What stands before the parts' names -> how many experts there are."""
        pattern = re.compile(re.escape(self.parts[0]).replace(r"\{\}", r"(\d+)") + "$")
        found = (pattern.search(name) for name in shapes)
        layers: dict[str, int] = {}
        for match in filter(None, found):
            prefix = match.string[: match.start()]
            layers[prefix] = max(layers.get(prefix, 0), int(match.group(1)) + 1)
        return layers


class Stack(NamedTuple):
    """The array [E, P, ...] of the decoder's tensors, and the order of its axes in HF's."""

    shape: Shape
    axes: tuple[int, ...]

    @property
    def permuted(self) -> Shape:
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def hf_shape(self) -> Shape:
        first = min(self.axes.index(1), self.axes.index(2))
        shape = self.permuted
        return (*shape[:first], math.prod(shape[first : first + 2]), *shape[first + 2 :])

    def with_rows_first(self, array: np.ndarray) -> np.ndarray:
        """HF's tensor [E, in, out] as [E, out, in], or the inverse, where it is not so already."""
        return array if self.axes.index(2) < self.axes.index(3) else array.transpose(0, 2, 1)

    def join(self, *arrays: np.ndarray) -> np.ndarray:
        """HF's tensor."""
        return np.stack(arrays).reshape(self.shape).transpose(self.axes).reshape(self.hf_shape)

    def take(self, expert: int, part: int, array: np.ndarray) -> np.ndarray:
        """One of the decoder's, a view into HF's."""
        return array.reshape(self.permuted).transpose(np.argsort(self.axes))[expert, part]


def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(r"\." + re.escape(part).replace(r"\{\}", r"(\d+)") + r"\.")


def _same(array: np.ndarray) -> np.ndarray:
    return array
