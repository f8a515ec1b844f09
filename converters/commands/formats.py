"""Commands from one format to another: `hf-to-jax`, `jax-to-hf`, `to-gguf`, `imatrix`, `from-gguf`, `to-bnb`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from converters.commands.base import Writes
from jaxft.console import warn
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class HfToJax(Writes):
    """Hugging Face safetensors to an Orbax checkpoint for JAX programs; every tensor keeps its dtype.

    Attributes:
      source: a folder, or a name on the Hugging Face hub.
      destination: the new folder.
    """

    source: Positional[str]
    destination: Positional[Path]

    def run(self) -> None:
        """Converts."""
        from converters.hf_load import HFCheckpoint
        from converters.open import resolve

        self.report(_to_jax(HFCheckpoint(resolve(self.source)), self.destination, self.overwrite))


@dataclasses.dataclass(frozen=True)
class JaxToHf(Writes):
    """An Orbax checkpoint that hf-to-jax or from-gguf wrote to Hugging Face safetensors, bit by bit.

    Attributes:
      source: the folder.
      destination: the new folder.
    """

    source: Positional[Path]
    destination: Positional[Path]

    def run(self) -> None:
        """Converts."""
        from converters.orbax_io import OrbaxCheckpoint

        self.report(_to_hf(OrbaxCheckpoint(self.source), self.destination, self.overwrite))


@dataclasses.dataclass(frozen=True)
class ToGguf(Writes):
    """Any checkpoint to GGUF files for llama.cpp.

    Attributes:
      source: a Hugging Face or Orbax folder, a .gguf file, or a name on the Hugging Face hub.
      destination: the new file; where several types are asked for, the folder of the files model.TYPE.gguf.
      type: one or more of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m,
        q5_k_s, q5_k_m, q6_k, iq4_nl, iq4_xs, mxfp4, tq1_0, tq2_0.
      imatrix: an importance matrix, as `imatrix` or llama.cpp writes it, which makes 2 to 5 bits more accurate.
    """

    source: Positional[str]
    destination: Positional[Path]
    type: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--quantization"])] = ("q8_0",)
    imatrix: Path | None = None

    def run(self) -> None:
        """Converts."""
        from converters.gguf_export import check_quantization, write_gguf
        from converters.imatrix import read_imatrix
        from converters.open import open_checkpoint

        for name in self.type:
            check_quantization(name)
        targets = gguf_targets(self.destination, self.type, overwrite=self.overwrite)
        checkpoint = open_checkpoint(self.source)
        _warn_if_quantized(checkpoint)
        importance = None if self.imatrix is None else (self.imatrix, read_imatrix(self.imatrix))
        for name, target in targets.items():
            write_gguf(checkpoint, target, name, importance=importance, overwrite=self.overwrite)
        self.report({target: f"GGUF, {name}" for name, target in targets.items()})


@dataclasses.dataclass(frozen=True)
class Imatrix(Writes):
    """Collects an importance matrix for `to-gguf --imatrix`, in llama.cpp's format: one forward pass over a text.

    Attributes:
      source: a Hugging Face or Orbax folder, a .gguf file, or a name on the Hugging Face hub.
      destination: the new file.
      text: what the model will be used for, in its own words: chats in the chat template, code, prose.
      chunk_size: tokens of a row; longer rows take more memory.
      max_chunks: rows, at most.
    """

    source: Positional[str]
    destination: Positional[Path]
    text: Path
    chunk_size: int = 512
    max_chunks: int = 100

    def run(self) -> None:
        """Collects."""
        from converters.commands.checks import read_text
        from converters.imatrix import collect, write_imatrix
        from converters.open import open_checkpoint

        for name, value in (("chunk_size", self.chunk_size), ("max_chunks", self.max_chunks)):
            if value < 1:
                raise JaxftError(name, f"must be at least 1, not {value}")
        text = read_text(self.text)
        matrix = collect(
            open_checkpoint(self.source),
            text,
            dataset=self.text.name,
            chunk_size=self.chunk_size,
            max_chunks=self.max_chunks,
        )
        write_imatrix(matrix, self.destination, overwrite=self.overwrite)
        note = (
            f"importance matrix of {len(matrix.sums)} tensors, from {matrix.chunks} rows of {matrix.chunk_size} tokens"
        )
        self.report({self.destination: note})


@dataclasses.dataclass(frozen=True)
class FromGguf(Writes):
    """A GGUF file to Hugging Face safetensors or an Orbax checkpoint; quantized tensors become float32.

    Attributes:
      source: the .gguf file.
      destination: the new folder.
      to: hf for Hugging Face, jax for Orbax.
    """

    source: Positional[Path]
    destination: Positional[Path]
    to: Literal["hf", "jax"] = "hf"

    def run(self) -> None:
        """Converts."""
        from converters.gguf_import import GGUFCheckpoint

        sink = {"hf": _to_hf, "jax": _to_jax}[self.to]
        self.report(sink(GGUFCheckpoint(self.source), self.destination, self.overwrite))


@dataclasses.dataclass(frozen=True)
class ToBnb(Writes):
    """Any checkpoint to bitsandbytes' 4-bit layout (NF4, double quantization), as transformers loads it.

    Attributes:
      source: a Hugging Face or Orbax folder, a .gguf file, or a name on the Hugging Face hub.
      destination: the new folder.
    """

    source: Positional[str]
    destination: Positional[Path]

    def run(self) -> None:
        """Converts."""
        from converters.bnb import write_bnb
        from converters.open import open_checkpoint

        write_bnb(open_checkpoint(self.source), self.destination, overwrite=self.overwrite)
        self.report({self.destination: "checkpoint in bitsandbytes' NF4"})


def gguf_targets(destination: Path, types: tuple[str, ...], *, overwrite: bool) -> dict[str, Path]:
    """Type -> file; several types make a folder of files.

    Raises:
      JaxftError: one of several files exists, or several types are to go into one file.
    """
    if len(types) == 1:
        return {types[0]: destination}
    if destination.suffix == ".gguf":
        raise JaxftError(destination, f"is one file, for the types {', '.join(types)}", "Name a folder")
    targets = {name: destination / f"model.{name.upper()}.gguf" for name in types}
    for target in targets.values():
        if target.exists() and not overwrite:
            raise JaxftError(target, "exists already", "Choose another folder, or ask for overwriting")
    return targets


def _warn_if_quantized(checkpoint: Checkpoint) -> None:
    from converters.checkpoint import quantization_of

    quantization = quantization_of(checkpoint)
    if quantization:
        warn(f"{checkpoint.where} is quantized ({quantization}); what that lost stays lost")


def _to_jax(checkpoint: Checkpoint, destination: Path, overwrite: bool) -> dict[Path, str]:
    from converters.load import check
    from converters.orbax_io import write_orbax

    check(checkpoint)
    return {write_orbax(checkpoint, destination, overwrite=overwrite): "Orbax checkpoint"}


def _to_hf(checkpoint: Checkpoint, destination: Path, overwrite: bool) -> dict[Path, str]:
    from converters.hf_export import write_hf
    from converters.load import check

    check(checkpoint)
    return {write_hf(checkpoint, destination, overwrite=overwrite): "Hugging Face checkpoint"}
