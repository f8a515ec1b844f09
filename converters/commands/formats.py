"""Commands from one format to another, and `imatrix`, which serves `to-gguf` and `requantize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from converters.commands.base import Writes
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.files import new_files

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
    """Any checkpoint to GGUF files for llama.cpp; a PEFT adapter to one of llama.cpp's adapters.

    Attributes:
      source: a Hugging Face or Orbax folder, a .gguf file, a name on the Hugging Face hub, or the folder of an adapter.
      destination: the new file; where several types are asked for, the folder of the files model.TYPE.gguf.
      type: one or more of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m,
        q5_k_s, q5_k_m, q6_k, iq4_nl, iq4_xs, mxfp4, tq1_0, tq2_0. Without it q8_0, and f32 of an adapter.
      imatrix: an importance matrix, as `imatrix` or llama.cpp writes it, which makes 2 to 5 bits more accurate.
      base: the base model of an adapter; without it, what the adapter names as its base.
      modelfile: write a Modelfile for Ollama beside each file.
    """

    source: Positional[str]
    destination: Positional[Path]
    type: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--quantization"])] = ()
    imatrix: Path | None = None
    base: str | None = None
    modelfile: bool = False

    def run(self) -> None:
        """Converts."""
        from converters.open import is_adapter

        types = self.type or (("f32",) if is_adapter(self.source) else ("q8_0",))
        targets = gguf_targets(self.destination, types, overwrite=self.overwrite)
        if is_adapter(self.source):
            self._adapter(targets)
        else:
            self._model(targets)

    def _model(self, targets: Mapping[str, Path]) -> None:
        from converters.gguf_export import check_quantization, write_ggufs
        from converters.imatrix import read_imatrix
        from converters.open import open_checkpoint
        from converters.resume import resume_key

        for name in targets:
            check_quantization(name)
        if self.base is not None:
            raise JaxftError("base", f"is for an adapter, and {self.source} is none")
        checkpoint = open_checkpoint(self.source)
        _warn_if_quantized(checkpoint)
        importance = None if self.imatrix is None else (self.imatrix, read_imatrix(self.imatrix))

        matrix = self.imatrix and (str(self.imatrix), self.imatrix.stat().st_mtime_ns)
        key = resume_key(checkpoint, [matrix, *targets])
        name = self.destination.name if len(targets) == 1 else ""
        with new_files(next(iter(targets.values())).parent, resume_key=key, name=name) as folder:
            new = {name: folder / target.name for name, target in targets.items()}
            write_ggufs(checkpoint, new, importance=importance, resumable=True)
        written = {target: f"GGUF, {name}" for name, target in targets.items()}
        if self.modelfile:
            from converters.modelfile import write_modelfile

            files = [write_modelfile(checkpoint, target, overwrite=self.overwrite) for target in targets.values()]
            written |= dict.fromkeys(files, "Modelfile for Ollama")
        self.report(written)

    def _adapter(self, targets: Mapping[str, Path]) -> None:
        from converters.gguf_adapter import write_gguf_adapter
        from converters.open import base_of, open_checkpoint
        from converters.peft_io import read_adapter

        if self.imatrix is not None:
            raise JaxftError("imatrix", f"is for a model, and {self.source} is an adapter")
        adapter = read_adapter(self.source)
        base = open_checkpoint(self.base or base_of(adapter.config, self.source))
        for name, target in targets.items():
            write_gguf_adapter(adapter, base, target, name, overwrite=self.overwrite)
        self.report({target: f"llama.cpp's adapter, {name}" for name, target in targets.items()}, base=base.where)


@dataclasses.dataclass(frozen=True)
class Requantize(Writes):
    """A GGUF file of any architecture to other types; what the first quantization lost stays lost.

    Attributes:
      source: the .gguf file.
      destination: the new file; where several types are asked for, the folder of the files model.TYPE.gguf.
      type: one or more of the types of to-gguf.
      imatrix: an importance matrix.
    """

    source: Positional[Path]
    destination: Positional[Path]
    type: tuple[str, ...]
    imatrix: Path | None = None

    def run(self) -> None:
        """Requantizes."""
        from converters.gguf_requantize import requantize
        from converters.imatrix import read_imatrix

        targets = gguf_targets(self.destination, self.type, overwrite=self.overwrite)
        importance = None if self.imatrix is None else (self.imatrix, read_imatrix(self.imatrix))

        def write(name: str, target: Path) -> None:
            requantize(self.source, target, name, importance=importance, overwrite=self.overwrite)

        _write_each(write, targets)
        self.report({target: f"GGUF, {name}, from {self.source}" for name, target in targets.items()})


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
    """A GGUF file to Hugging Face safetensors or an Orbax checkpoint, quantized tensors to float32; one of llama.cpp's
    adapters to PEFT's.

    Attributes:
      source: the .gguf file.
      destination: the new folder.
      to: hf for Hugging Face, jax for Orbax.
      base: the base model of an adapter.
    """

    source: Positional[Path]
    destination: Positional[Path]
    to: Literal["hf", "jax"] = "hf"
    base: str | None = None

    def run(self) -> None:
        """Converts."""
        from converters.gguf_adapter import is_gguf_adapter, read_gguf_adapter
        from converters.gguf_import import GGUFCheckpoint
        from converters.open import open_checkpoint
        from converters.peft_io import write_adapter

        if is_gguf_adapter(self.source):
            if self.base is None:
                raise JaxftError(self.source, "is an adapter, and its base model is not named", "Add --base")
            adapter = read_gguf_adapter(self.source, open_checkpoint(self.base), self.base)
            write_adapter(adapter, self.destination, overwrite=self.overwrite)
            self.report({self.destination: "PEFT adapter"}, base=self.base)
            return
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
      JaxftError: one of the files exists, or several types are to go into one file.
    """
    targets = {name: destination / f"model.{name.upper()}.gguf" for name in types}
    if len(types) == 1:
        targets = {types[0]: destination}
    elif destination.suffix == ".gguf":
        raise JaxftError(destination, f"is one file, for the types {', '.join(types)}", "Name a folder")
    for target in targets.values():
        if target.exists() and not overwrite:
            raise JaxftError(target, "exists already", "Choose another name, or ask for overwriting")
    return targets


def _write_each(write: Callable[[str, Path], None], targets: Mapping[str, Path]) -> None:
    """Writes one file in place, and several so that they appear together."""
    if len(targets) == 1:
        write(*next(iter(targets.items())))
        return
    with new_files(next(iter(targets.values())).parent) as folder:
        for name, target in targets.items():
            write(name, folder / target.name)


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
