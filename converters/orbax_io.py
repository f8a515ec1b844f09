"""Orbax checkpoints: how a model is kept for other JAX programs.

A folder holds `params/`, an Orbax PyTree checkpoint of one flat dict {HF tensor name: array}, one entry a layer; beside
it config.json, the tokenizer's files and a manifest with the format's version and every tensor's shape and dtype. Any
JAX program reads the weights with ``orbax.checkpoint.PyTreeCheckpointer().restore(folder / "params")``, and may write
them: `params/` is read however Orbax wrote it. Here each tensor is a file of its values (`converters.zarr_io`; in
Orbax' words, without OCDBT and compression), which goes in and out at the speed of a copy; TensorStore copies the
values twice, in fresh memory, and waits for the disk after each tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from converters.checkpoint import Checkpoint, TensorInfo
from converters.hf_files import (
    CONFIG,
    ORBAX_MANIFEST,
    load_tokenizer,
    read_json,
    read_sidecars,
    write_json,
    write_small_files,
)
from converters.safetensors_io import nbytes, read_ahead
from converters.zarr_io import map_array, write_array
from jaxft.console import progress
from jaxft.errors import JaxftError
from jaxft.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARAMS = "params"
FORMAT, VERSION = "jaxft-orbax", 1
# What Orbax and TensorStore raise for missing and corrupt files.
_ORBAX_ERRORS = (OSError, ValueError, KeyError, TypeError)


class OrbaxCheckpoint:
    """A folder that `write_orbax` wrote; implements `converters.checkpoint.Checkpoint`.

    Opening reads the manifest and, to see whether params/ can be read at all, the smallest tensor. (Orbax's own
    metadata call opens all tensors at once; when one fails, the others complain on a closed event loop.)

    Raises:
      JaxftError: the manifest, config.json or params/ is missing or corrupt, or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self._folder = Path(path)
        if not self._folder.exists():
            raise JaxftError(path, "does not exist")
        self.tensors: dict[str, TensorInfo] = _read_manifest(self._folder / ORBAX_MANIFEST)
        self.config: dict[str, Any] = read_json(self._folder / CONFIG)
        _check_plain(self._folder / PARAMS)
        self.read(min(self.tensors, key=lambda name: nbytes(self.tensors[name])))

    @property
    def where(self) -> str:
        """The folder's path."""
        return str(self._folder)

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype: a read-only view of the file, where `write_orbax` wrote it."""
        params = (self._folder / PARAMS).absolute()
        mapped = map_array(params / name, self.tensors[name]) if Path(name).name == name else None
        return self._restore(params, name) if mapped is None else mapped

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer; None without its files."""
        return load_tokenizer(self._folder)

    def sidecars(self) -> dict[str, bytes]:
        """generation_config.json, tokenizer files, chat templates, licences."""
        return read_sidecars(self._folder)

    def _restore(self, params: Path, name: str) -> np.ndarray:
        """One tensor, by Orbax."""
        only = ocp.args.PyTreeRestore(item={name: 0}, partial_restore=True)
        try:
            array = self._checkpointer.restore(params, args=only)[name]
        except _ORBAX_ERRORS as error:
            raise JaxftError(f"{params}, tensor {name}", f"cannot be restored: {error}") from error
        if not isinstance(array, np.ndarray):  # what stands for a tensor that is not there
            raise JaxftError(f"{params}, tensor {name}", f"is missing, but {ORBAX_MANIFEST} names it")
        found = TensorInfo(array.shape, array.dtype)
        if found != self.tensors[name]:
            raise JaxftError(f"{params}, tensor {name}", f"is {found}, but {ORBAX_MANIFEST} says {self.tensors[name]}")
        return array

    @functools.cached_property
    def _checkpointer(self) -> ocp.Checkpointer:
        return ocp.PyTreeCheckpointer()


def _check_plain(params: Path) -> None:
    """Refuses what is neither file nor folder: Orbax would wait for ever for what comes out of a pipe."""
    for path in params.rglob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise JaxftError(path, "is neither a file nor a folder")


def write_orbax(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False) -> Path:
    """Writes `checkpoint` into the folder `path`, each tensor in the dtype that it has, and returns the path.

    Two tensors are in memory at a time. The folder appears, complete, when everything is written.

    Raises:
      JaxftError: the folder is not empty or cannot be written to.
    """
    with new_folder(path, overwrite=overwrite) as folder:
        write_json(folder / ORBAX_MANIFEST, _manifest(checkpoint.tensors))
        write_small_files(checkpoint, folder)
        with progress("writing Orbax", len(checkpoint.tensors)) as done:
            tree = {name: _Unread(checkpoint, name, done) for name in checkpoint.tensors}
            try:
                with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
                    checkpointer.save((folder / PARAMS).absolute(), ocp.args.PyTreeSave(tree))
            except _ORBAX_ERRORS as error:
                # Orbax' longest message ends in the system's words.
                reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
                raise JaxftError(path, f"could not be written ({reason})", "Check the space that is left") from error
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging, with its traceback, an exception that it raises as well, and from warning that without
    OCDBT it finds none to merge."""
    log = logging.getLogger("absl")

    def matters(record: logging.LogRecord) -> bool:
        return not record.exc_info and "Skipping merge of OCDBT" not in str(record.msg)

    log.addFilter(matters)
    try:
        yield
    finally:
        log.removeFilter(matters)


@dataclasses.dataclass(frozen=True)
class _Unread:
    """Stands in Orbax's tree for a tensor that is read when its turn comes."""

    checkpoint: Checkpoint
    name: str
    done: Callable[..., None]

    def read(self) -> np.ndarray:
        self.done(note=self.name)
        return self.checkpoint.read(self.name)


class _InTurn(ocp.type_handlers.NumpyHandler):
    """Writes `_Unread` leaves as the arrays that they stand for, each while the next one is read."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None) -> list:
        """Ends when everything is written."""
        arrays = read_ahead(values, _Unread.read)
        for info in infos:
            await info.await_path_creation()
            write_array(Path(info.path), next(arrays))
        return []


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Weights hardly compress, so they are not compressed."""
    handlers = ocp.type_handlers  # that of jax.Array writes what Orbax keeps beside arrays, too
    registry = handlers.create_type_handler_registry((_Unread, _InTurn()), (jax.Array, handlers.ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False, use_ocdbt=False)


def _manifest(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    entries = {name: {"dtype": info.dtype.name, "shape": list(info.shape)} for name, info in tensors.items()}
    return {"format": FORMAT, "version": VERSION, "tensors": entries}


def _read_manifest(path: Path) -> dict[str, TensorInfo]:
    manifest = read_json(path)
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        raise JaxftError(path, f"says {found}, and only {(FORMAT, VERSION)} can be read", "Convert the original again")
    try:
        return {
            name: TensorInfo(tuple(map(int, entry["shape"])), np.dtype(entry["dtype"]))
            for name, entry in manifest["tensors"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise JaxftError(f"{path}, field tensors", f"is corrupt: {error!r}") from error
