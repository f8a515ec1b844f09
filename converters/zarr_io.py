"""Arrays as Orbax keeps them where they are one uncompressed chunk each: a small header, and a file of the values.

So they are written and mapped like any file, and TensorStore, which Orbax reads with, opens them as well. Format:
Zarr's version 2 (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html), with TensorStore's names of dtypes that
numpy does not have (https://google.github.io/tensorstore/driver/zarr/).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from converters.checkpoint import TensorInfo
from converters.safetensors_io import nbytes

_HEADER = ".zarray"


def write_array(folder: Path, array: np.ndarray) -> None:
    """Makes the folder, with the array in it."""
    info = TensorInfo(array.shape, array.dtype)
    folder.mkdir(parents=True)
    (folder / _HEADER).write_text(_header(info))
    if array.size:
        with (folder / _chunk(info)).open("wb") as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def map_array(folder: Path, info: TensorInfo) -> np.ndarray | None:
    """A read-only view of an array on disk; None where `write_array` did not write one of this shape and dtype."""
    header, chunk, expected = folder / _HEADER, folder / _chunk(info), _header(info).encode()
    if not nbytes(info) or info.dtype.hasobject:
        return None
    if not all(map(os.path.isfile, (header, chunk))):  # not Path.is_file, which raises for names that no file can have
        return None
    sizes = (header.stat().st_size, chunk.stat().st_size)
    if sizes != (len(expected), nbytes(info)) or header.read_bytes() != expected:
        return None
    return np.asarray(np.memmap(chunk, info.dtype, mode="r", shape=info.shape))


def _header(info: TensorInfo) -> str:
    has_numpy_name = info.dtype.kind != "V"
    return json.dumps(
        {
            "chunks": [max(1, size) for size in info.shape],
            "compressor": None,
            "dimension_separator": ".",
            "dtype": info.dtype.str if has_numpy_name else info.dtype.name,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(info.shape),
            "zarr_format": 2,
        },
        separators=(",", ":"),
    )


def _chunk(info: TensorInfo) -> str:
    """The file's name: the chunk's index along each axis."""
    return ".".join("0" * len(info.shape)) or "0"
