"""Writes any checkpoint as a Hugging Face folder: config.json, safetensors shards with their index, tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.checkpoint import Checkpoint, TensorInfo
from converters.hf_files import write_json, write_small_files
from converters.hf_load import INDEX, WEIGHTS
from converters.model_card import carry_card
from converters.resume import resume_key
from converters.safetensors_io import n_values, nbytes, write_safetensors
from jaxft.console import progress
from jaxft.files import new_folder

MAX_SHARD_SIZE = 5 * 10**9


def write_hf(
    checkpoint: Checkpoint, path: Path, *, max_shard_size: int = MAX_SHARD_SIZE, overwrite: bool = False, card: str = ""
) -> Path:
    """Writes `checkpoint` into the folder `path`, each tensor in the dtype that it has, and returns the path.

    Two tensors are in memory at a time. A conversion to several shards that was killed goes on after the last whole one
    (see `converters.resume`). The folder appears, complete, when everything is written.

    Args:
      max_shard_size: bytes of tensor data in a file; one larger tensor has a file of its own.
      overwrite: replace a folder that is not empty.
      card: the text of a README.md; see `converters.model_card`.

    Raises:
      JaxftError: the folder is not empty or cannot be written to.
    """
    shards = plan_shards(checkpoint.tensors, max_shard_size)
    key = resume_key(checkpoint, _index(shards)) if len(shards) > 1 else ""
    with (
        new_folder(path, overwrite=overwrite, resume_key=key) as folder,
        progress("writing safetensors", len(checkpoint.tensors)) as done,
    ):

        def read(name: str) -> np.ndarray:
            done(note=name)
            return checkpoint.read(name)

        write_small_files(checkpoint, folder)
        for file_name, tensors in shards.items():
            if (folder / file_name).exists():  # of the same conversion, which was killed later
                done(len(tensors), note=file_name)
                continue
            unfinished = folder / f"{file_name}.unfinished"
            write_safetensors(unfinished, tensors, read)
            unfinished.rename(folder / file_name)
        if len(shards) > 1:
            write_json(folder / INDEX, _index(shards))
        if card:
            carry_card(path, folder, card)
    return path


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> dict[str, dict[str, TensorInfo]]:
    """File name -> its tensors, in order, each file filled up to `max_shard_size` bytes."""
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + nbytes(info) > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += nbytes(info)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, dict]:
    infos = [info for shard in shards.values() for info in shard.values()]
    return {
        "metadata": {"total_parameters": sum(map(n_values, infos)), "total_size": sum(map(nbytes, infos))},
        "weight_map": {name: file_name for file_name, shard in shards.items() for name in shard},
    }
