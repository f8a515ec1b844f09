"""Orbax checkpoints: how a model is kept for other JAX programs.

A folder holds `params/`, an Orbax PyTree checkpoint of one flat dict {HF tensor name: array}, one entry a layer; beside
it config.json, the tokenizer's files and a manifest with the format's version. Any JAX program reads the weights with
``orbax.checkpoint.PyTreeCheckpointer().restore(folder / "params")``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from converters.checkpoint import Checkpoint, TensorInfo, stream
from converters.hf_files import CONFIG, load_tokenizer, read_json, read_sidecars, write_json, write_small_files
from jaxft.console import track
from jaxft.errors import JaxftError
from jaxft.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "jaxft_checkpoint.json"
PARAMS = "params"
_FORMAT = {"format": "jaxft-orbax", "version": 1}


class OrbaxCheckpoint:
    """A folder that `write_orbax` wrote; implements `converters.checkpoint.Checkpoint`.

    Opening reads the metadata; `read` restores one tensor.

    Raises:
      JaxftError: the manifest, config.json or params/ is missing or corrupt, or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self._folder = Path(path)
        if not self._folder.exists():
            raise JaxftError(path, "does not exist")
        _check_manifest(self._folder / MANIFEST)
        self.config: dict[str, Any] = read_json(self._folder / CONFIG)
        self.tensors: dict[str, TensorInfo] = self._read_metadata()

    @property
    def where(self) -> str:
        """The folder's path."""
        return str(self._folder)

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        only = ocp.args.PyTreeRestore(item={name: 0}, partial_restore=True)
        try:
            return self._checkpointer.restore(self._params, args=only)[name]
        except _ORBAX_ERRORS as error:
            raise JaxftError(f"{self._params}, tensor {name}", f"cannot be restored: {error}") from error

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer; None without its files."""
        return load_tokenizer(self._folder)

    def sidecars(self) -> dict[str, bytes]:
        """generation_config.json, tokenizer files, chat templates, licences."""
        return read_sidecars(self._folder)

    @property
    def _params(self) -> Path:
        return (self._folder / PARAMS).absolute()

    @functools.cached_property
    def _checkpointer(self) -> ocp.Checkpointer:
        return ocp.PyTreeCheckpointer()

    def _read_metadata(self) -> dict[str, TensorInfo]:
        try:
            tree = self._checkpointer.metadata(self._params).item_metadata.tree
        except _ORBAX_ERRORS as error:
            raise JaxftError(self._params, f"is not a sound Orbax checkpoint: {error}") from error
        return {name: TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in tree.items()}


# What Orbax and TensorStore raise for missing and corrupt files.
_ORBAX_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


def write_orbax(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False) -> Path:
    """Writes `checkpoint` into the folder `path`, each tensor in the dtype that it has, and returns the path.

    Orbax takes the tree as a whole, so all tensors are alive at once: views of the files for an HF source, arrays in
    memory for others. The folder appears, complete, when everything is written.

    Raises:
      JaxftError: the folder is not empty or cannot be written to.
    """
    with new_folder(path, overwrite=overwrite) as folder:
        write_json(folder / MANIFEST, _FORMAT)
        write_small_files(checkpoint, folder)
        tree = dict(track(stream(checkpoint), "reading tensors", len(checkpoint.tensors)))
        with ocp.Checkpointer(_frugal_handler()) as checkpointer:
            checkpointer.save((folder / PARAMS).absolute(), ocp.args.PyTreeSave(tree))
    return path


def _frugal_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler without its copies of the tree: it copies arrays, for asynchronous saves, and compresses them.

    The default takes twice the size of the tree on top of it; weights hardly compress.
    """
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, handlers.ArrayHandler()),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def _check_manifest(path: Path) -> None:
    manifest = read_json(path)
    if manifest != _FORMAT:
        raise JaxftError(path, f"says {manifest}, and only {_FORMAT} can be read", "Convert the original checkpoint again")
