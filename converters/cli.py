"""`jaxft-convert`: between Hugging Face, JAX (Orbax) and GGUF checkpoints; `inspect` shows what a path holds.

Each command is a dataclass whose fields are its arguments. Its imports wait until it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from jaxft.console import run_command, wrote
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class HfToJax:
    """Hugging Face safetensors to an Orbax checkpoint for JAX programs; every tensor keeps its dtype.

    Attributes:
      source: a folder, or a name on the Hugging Face hub.
      destination: the new folder.
      overwrite: replace a folder that is not empty.
    """

    source: Positional[str]
    destination: Positional[Path]
    overwrite: bool = False

    def run(self) -> None:
        """Converts."""
        from converters.hf_load import HFCheckpoint
        from converters.open import resolve

        _to_jax(HFCheckpoint(resolve(self.source)), self.destination, self.overwrite)


@dataclasses.dataclass(frozen=True)
class JaxToHf:
    """An Orbax checkpoint that hf-to-jax or from-gguf wrote to Hugging Face safetensors, bit by bit.

    Attributes:
      source: the folder.
      destination: the new folder.
      overwrite: replace a folder that is not empty.
    """

    source: Positional[Path]
    destination: Positional[Path]
    overwrite: bool = False

    def run(self) -> None:
        """Converts."""
        from converters.orbax_io import OrbaxCheckpoint

        _to_hf(OrbaxCheckpoint(self.source), self.destination, self.overwrite)


@dataclasses.dataclass(frozen=True)
class ToGguf:
    """Any checkpoint to GGUF files for llama.cpp.

    Attributes:
      source: a Hugging Face or Orbax folder, a .gguf file, or a name on the Hugging Face hub.
      destination: the new file; where several types are asked for, the folder of the files model.TYPE.gguf.
      type: one or more of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m,
        q5_k_s, q5_k_m, q6_k, iq4_nl, iq4_xs, mxfp4, tq1_0, tq2_0.
      overwrite: replace existing files.
    """

    source: Positional[str]
    destination: Positional[Path]
    type: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--quantization"])] = ("q8_0",)
    overwrite: bool = False

    def run(self) -> None:
        """Converts."""
        from converters.gguf_export import check_quantization, write_gguf
        from converters.open import open_checkpoint

        for name in self.type:
            check_quantization(name)
        targets = self._targets()
        checkpoint = open_checkpoint(self.source)
        for name, target in targets.items():
            write_gguf(checkpoint, target, name, overwrite=self.overwrite)
            wrote(target, f"GGUF, {name}")

    def _targets(self) -> dict[str, Path]:
        """Type -> file; refused before any work if it exists."""
        if len(self.type) == 1:
            return {self.type[0]: self.destination}
        if self.destination.suffix == ".gguf":
            raise JaxftError(self.destination, f"is one file, for the types {', '.join(self.type)}", "Name a folder")
        targets = {name: self.destination / f"model.{name.upper()}.gguf" for name in self.type}
        for target in targets.values():
            if target.exists() and not self.overwrite:
                raise JaxftError(target, "exists already", "Choose another folder, or ask for overwriting")
        return targets


@dataclasses.dataclass(frozen=True)
class FromGguf:
    """A GGUF file to Hugging Face safetensors or an Orbax checkpoint; quantized tensors become float32.

    Attributes:
      source: the .gguf file.
      destination: the new folder.
      to: hf for Hugging Face, jax for Orbax.
      overwrite: replace a folder that is not empty.
    """

    source: Positional[Path]
    destination: Positional[Path]
    to: Literal["hf", "jax"] = "hf"
    overwrite: bool = False

    def run(self) -> None:
        """Converts."""
        from converters.gguf_import import GGUFCheckpoint

        sink = {"hf": _to_hf, "jax": _to_jax}[self.to]
        sink(GGUFCheckpoint(self.source), self.destination, self.overwrite)


@dataclasses.dataclass(frozen=True)
class ToBnb:
    """Any checkpoint to bitsandbytes' 4-bit layout (NF4, double quantization), as transformers loads it.

    Attributes:
      source: a Hugging Face or Orbax folder, a .gguf file, or a name on the Hugging Face hub.
      destination: the new folder.
      overwrite: replace a folder that is not empty.
    """

    source: Positional[str]
    destination: Positional[Path]
    overwrite: bool = False

    def run(self) -> None:
        """Converts."""
        from converters.bnb import write_bnb
        from converters.open import open_checkpoint

        write_bnb(open_checkpoint(self.source), self.destination, overwrite=self.overwrite)
        wrote(self.destination, "checkpoint in bitsandbytes' NF4")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Shows config, tensors, dtypes and sizes of a checkpoint in any format, or of a PEFT adapter.

    Attributes:
      path: a folder, a .gguf file, or a name on the Hugging Face hub.
      json: print one JSON object to standard output instead of tables to standard error.
    """

    path: Positional[str]
    json: bool = False

    def run(self) -> None:
        """Shows it."""
        from converters.summary import summarize

        summary = summarize(self.path)
        if self.json:
            print(json.dumps(summary.as_json(), indent=2))
        else:
            summary.show()


Command = HfToJax | JaxToHf | ToGguf | FromGguf | ToBnb | Inspect


def _to_jax(checkpoint: Checkpoint, destination: Path, overwrite: bool) -> None:
    from converters.load import check
    from converters.orbax_io import write_orbax

    check(checkpoint)
    wrote(write_orbax(checkpoint, destination, overwrite=overwrite), "Orbax checkpoint")


def _to_hf(checkpoint: Checkpoint, destination: Path, overwrite: bool) -> None:
    from converters.hf_export import write_hf
    from converters.load import check

    check(checkpoint)
    wrote(write_hf(checkpoint, destination, overwrite=overwrite), "Hugging Face checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives the exit status: 0, or 2 for what the user has to mend."""
    command = tyro.cli(Command, args=argv, prog="jaxft-convert", description=__doc__)
    return run_command(command.run)


if __name__ == "__main__":
    raise SystemExit(main())
