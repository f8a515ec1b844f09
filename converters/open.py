"""Recognises what a path holds and opens it; fetches names on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from converters.checkpoint import Checkpoint
from converters.hf_files import ADAPTER_CONFIG, CARD, ORBAX_MANIFEST, SIDECARS
from jaxft.errors import JaxftError

Format = Literal["hf", "orbax", "gguf", "peft"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_checkpoint(name: Path | str) -> Checkpoint:
    """Opens a GGUF file, a folder (Hugging Face, Orbax, or with a GGUF file and no safetensors), or a name on the hub.

    Raises:
      JaxftError: there is no such path or name, or what it holds is not a checkpoint, corrupt or not supported.
    """
    path = resolve(name)
    found = format_of(path)
    if found == "gguf":
        from converters.gguf_import import GGUFCheckpoint

        return GGUFCheckpoint(gguf_file(path))
    if found == "orbax":
        from converters.orbax_io import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    from converters.bnb import BnbCheckpoint
    from converters.hf_load import HFCheckpoint
    from converters.mxfp4 import MXFP4Checkpoint, is_mxfp4

    stored = HFCheckpoint(path, accept_quantized=True)
    if is_mxfp4(stored.config):
        return MXFP4Checkpoint(stored)
    return BnbCheckpoint(stored) if stored.is_quantized else stored


def is_adapter(name: Path | str) -> bool:
    """Whether a local path is the folder of a PEFT adapter."""
    folder = Path(name)
    return (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def base_of(adapter_config: dict[str, Any], where: object) -> str:
    """The base model that an adapter_config.json names.

    Raises:
      JaxftError: it names none.
    """
    name = adapter_config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise JaxftError(f"{where}, field base_model_name_or_path", "is missing", "Fill in the path of the base model")
    return name


def format_of(path: Path) -> Format:
    """What a path holds, by its files' names: anything that is not one of the others passes for a Hugging Face folder.

    Raises:
      JaxftError: a file that is not GGUF, or a folder with several GGUF files.
    """
    if path.is_file() or _only_gguf(path):
        gguf_file(path)
        return "gguf"
    if (path / ORBAX_MANIFEST).exists():
        return "orbax"
    return "peft" if is_adapter(path) else "hf"


def gguf_file(path: Path) -> Path:
    """`path` itself, or the one GGUF file of a folder.

    Raises:
      JaxftError: it is not a GGUF file, or not one.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise JaxftError(path, "is not a .gguf file", "Name the folder of a Hugging Face or Orbax checkpoint")
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise JaxftError(path, f"holds {len(files)} GGUF files: {', '.join(f.name for f in files)}", "Name one of them")
    return files[0]


def resolve(name: Path | str) -> Path:
    """A local path as it is; the files of a name on the Hugging Face hub, downloaded or from the cache.

    Raises:
      JaxftError: no such path, and no such name on the hub or no way to it.
    """
    if Path(name).exists():
        return Path(name)
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(name):
        raise JaxftError(name, "does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", CARD, *SIDECARS]))
    except Exception as error:  # a download fails in more ways than can be named
        raise JaxftError(
            name,
            f"is no local path, and its files could not be fetched from the Hugging Face hub ({_first_line(error)})",
            "Where there is no network, download the files elsewhere and name their folder",
        ) from error


def _only_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
