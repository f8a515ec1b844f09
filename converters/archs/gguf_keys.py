"""The metadata of an architecture in GGUF, declared key by key: each is read into an HF config, and written from a
decoder's, by the same row.

Where a row or an architecture has "a value or a function", the function is of facts by their names: of the fields of an
HF config that were read before, or of the decoder's (`facts_of`). What both call the same needs one function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig, MLAConfig, MoEConfig

Facts = Mapping[str, Any]


class MetadataReader:
    """Reads an architecture's keys of a GGUF file so that none goes unnoticed, as ConfigReader does for config.json.

    Attributes:
      tensors: names of the tensors in the file; what is missing says something too (no "output.weight": a tied head).
    """

    def __init__(self, metadata: dict[str, Any], arch: str, tensors: Collection[str], where: object) -> None:
        self.tensors = tensors
        self._prefix = f"{arch}."
        self._left = {k.removeprefix(self._prefix): v for k, v in metadata.items() if k.startswith(self._prefix)}
        self._where = where

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; a missing one is `default`, or refused without it."""
        value = self._take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._refuse(key, f"must be a positive integer, not {value!r}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """An integer that may be 0."""
        value = self._take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._refuse(key, f"must be an integer, and not negative: {value!r}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._refuse(key, f"must be true or false, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive float32, as the shortest decimal that means it: 9.999999747378752e-06 is 1e-05."""
        value = self._take(key, default)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise self._refuse(key, f"must be a positive number, not {value!r}")
        return float(str(np.float32(value)))

    def choice(self, key: str, choices: Collection[str], default: str) -> str:
        """One of the `choices`."""
        value = self._take(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self._refuse(key, f"the value {value!r} is not supported (only {', '.join(choices)})")
        return value

    def expect(self, key: str, default: Any) -> None:
        """What the key could say is not implemented: it may only say `default`."""
        value = self._left.pop(key, default)
        if isinstance(value, np.ndarray) or value != default:
            raise self._refuse(key, f"the value {value!r} is not supported (only {default!r})")

    def ignore(self, *keys: str) -> None:
        """These say nothing about what the model computes."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Refuses whatever was not asked for."""
        if self._left:
            keys = ", ".join(f"{self._prefix}{key} = {value!r}" for key, value in sorted(self._left.items()))
            raise JaxftError(self._where, f"unknown metadata: {keys}", "It may change what the model computes")

    def _take(self, key: str, default: Any) -> Any:
        value = self._left.pop(key, default)
        if value is None:
            raise self._refuse(key, "is missing")
        return value

    def _refuse(self, key: str, what: str) -> JaxftError:
        return JaxftError(f"{self._where}, key {self._prefix}{key}", what)


@runtime_checkable
class Row(Protocol):
    """Something that a file says, both ways.

    Attributes:
      name: tells it from the other rows of an architecture.
      hf: the field of an HF config that it says; None: of none.
      says: the fields of the decoder's config that it says.
    """

    @property
    def name(self) -> str: ...

    @property
    def hf(self) -> str | None: ...

    @property
    def says(self) -> tuple[str, ...]: ...

    def read(self, reader: MetadataReader, fields: Facts) -> dict[str, Any]:
        """Fields of an HF config; `fields` are those of the rows before."""
        ...

    def write(self, facts: Facts) -> dict[str, int | float | str]:
        """Keys with their values; raises JaxftError for a fact that llama.cpp's graph does not have."""
        ...


@dataclasses.dataclass(frozen=True)
class Key:
    """A key with one value.

    Attributes:
      name: without the architecture's prefix.
      hf: the field of an HF config; None: there is none, and a file may only say `default`, or anything where that is
        None.
      of: the fields of the decoder's config, with spaces between, where HF calls them something else; the first is what
        is written.
      kind: the method of MetadataReader that reads it.
      default: what a file without it means, a value or a function; None: a file must have it.
      read_as: (the file's value, the fields before) -> the field, where it is not the value.
      value: what is written, a value or a function, where it is not the field; None is not written.
    """

    name: str
    hf: str | None
    of: str = ""
    kind: Literal["size", "count", "flag", "number"] = "size"
    default: Any = None
    read_as: Callable[[Any, Facts], Any] = lambda value, fields: value
    value: Any = None

    @property
    def says(self) -> tuple[str, ...]:
        """The fields of the decoder's config."""
        return tuple((self.of or self.hf or "").split())

    def read(self, reader: MetadataReader, fields: Facts) -> dict[str, Any]:
        """The field, or a check where there is none."""
        default = value_of(self.default, fields)
        if self.hf is not None:
            return {self.hf: self.read_as(getattr(reader, self.kind)(self.name, default), fields)}
        if default is None:
            reader.ignore(self.name)
        else:
            reader.expect(self.name, default)
        return {}

    def write(self, facts: Facts) -> dict[str, int | float | str]:
        """The key."""
        value = value_of(self.value, facts) if self.value is not None or not self.says else facts[self.says[0]]
        if value is None:
            return {}
        return {self.name: float(value) if self.kind == "number" else value}


@dataclasses.dataclass(frozen=True)
class Present:
    """A tensor whose presence says that a field is true, or whose absence does.

    Attributes:
      name: the tensor's.
      hf, of: as of `Key`.
      absent: the field is true where there is no such tensor.
    """

    name: str
    hf: str
    of: str = ""
    absent: bool = False

    @property
    def says(self) -> tuple[str, ...]:
        """The fields of the decoder's config."""
        return tuple((self.of or self.hf).split())

    def read(self, reader: MetadataReader, fields: Facts) -> dict[str, Any]:
        """The field."""
        return {self.hf: (self.name in reader.tensors) != self.absent}

    def write(self, facts: Facts) -> dict[str, int | float | str]:
        """Nothing: the tensor is there or not."""
        return {}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A field of which llama.cpp's graph has one value, and no key says it.

    Attributes:
      name: the field of the decoder's config.
      hf: that of an HF config.
      value: of both.
    """

    name: str
    hf: str
    value: Any

    @property
    def says(self) -> tuple[str, ...]:
        """The field of the decoder's config."""
        return (self.name,)

    def read(self, reader: MetadataReader, fields: Facts) -> dict[str, Any]:
        """The value."""
        return {self.hf: self.value}

    def write(self, facts: Facts) -> dict[str, int | float | str]:
        """Nothing, after a check."""
        check_fact(self.name, facts[self.name], (self.value,))
        return {}


def value_of(value: Any, facts: Facts) -> Any:
    """The value, or what the function gives."""
    return value(facts) if callable(value) else value


def values_of(values: Facts, facts: Facts) -> dict[str, Any]:
    """The same of several, by name."""
    return {name: value_of(value, facts) for name, value in values.items()}


def facts_of(config: DecoderConfig) -> dict[str, Any]:
    """Every field by its name, those of `moe` and `mla` in their place."""
    return {field.name: value for field, value in _fields(config)}


def usual_facts(config: DecoderConfig) -> dict[str, Any]:
    """The defaults of the same fields, where those of the layers are without experts or with them, as the config is."""
    kind = "dense" if config.moe is None else "sparse"
    defaults = {field.name: field.default for field, _ in _fields(config)}
    return {**defaults, "mlp_layer_types": (kind,) * config.num_hidden_layers}


def _fields(config: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Each with its value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, MoEConfig | MLAConfig):
            yield from _fields(value)
        else:
            yield field, value


def check_fact(name: str, value: Any, supported: Sequence[Any]) -> None:
    """Raises JaxftError where llama.cpp's graph has only the `supported` values."""
    if value not in supported:
        only = " or ".join(map(repr, supported))
        raise JaxftError(f"config field {name}", f"this GGUF architecture cannot say {value!r} (only {only})")
