"""safetensors files, tensor by tensor in both directions: https://huggingface.co/docs/safetensors

The safetensors library checks each file that is read. Tensors come as views of a memory map, and a file is written with
two tensors in memory at a time; the library itself writes only whole files that are in memory, and numpy through it has
no float8.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from converters.checkpoint import TensorInfo
from jaxft.errors import JaxftError

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
T = TypeVar("T")


class SafetensorsFile:
    """One file, its header read and checked; the data stays on disk.

    Attributes:
      tensors: shape and dtype of every tensor, in the order of the header.

    Raises:
      JaxftError: the file is missing, truncated or corrupt, or holds a dtype that numpy and ml_dtypes do not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _validate(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise JaxftError(f"{path}, tensor {name}", f"has the dtype {entry['dtype']}, which is not supported")
        self.tensors = {
            name: TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for name, entry in header.items()
        }
        self._ranges = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        self._data_start = _LENGTH_BYTES + length

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor on disk, in its stored dtype.

        Each has a memory map of its own: pages that were read leave the process with the array.
        """
        info = self.tensors[name]
        if not n_values(info):
            return np.empty(info.shape, info.dtype)
        start = self._data_start + self._ranges[name][0]
        return np.asarray(np.memmap(self.path, info.dtype, mode="r", offset=start, shape=info.shape))


def _validate(path: Path) -> None:
    if not path.is_file():
        raise JaxftError(path, "does not exist" if not path.exists() else "is not a file")
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise JaxftError(
            path, f"is truncated or corrupt: {error}", "Fetch it again, and compare its size with the original's"
        ) from error
    except OSError as error:
        raise JaxftError(path, f"cannot be read ({error})") from error


def write_safetensors(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]) -> None:
    """Writes `tensors` with the metadata {"format": "pt"}, calling read(name) once for each.

    The header comes before the data, so `tensors` says what `read` will give. Tensors with wider dtypes come first, so
    that each starts at a multiple of its dtype's size.

    Raises:
      JaxftError: a dtype that safetensors does not have.
      ValueError: `read` gave another shape or dtype than `tensors` says.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    with path.open("wb") as file:
        file.write(_header({name: tensors[name] for name in names}))
        for name, array in zip(names, read_ahead(names, read), strict=True):
            if (array.shape, array.dtype) != tuple(tensors[name]):
                raise ValueError(f"{name} was announced as {tensors[name]}, but is {array.dtype} {array.shape}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before one more is read


def read_ahead(items: Sequence[T], read: Callable[[T], np.ndarray]) -> Iterator[np.ndarray]:
    """read(item) of each, in order; the next one is read while one is written, so two are in memory at a time."""

    def fetch(item: T) -> np.ndarray:
        array = read(item)
        if array.flags.c_contiguous:  # a mapped file is read here, a page by each byte: within a write it takes longer
            array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max(initial=0)
        return array

    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(fetch, item) for item in items[:1]]
        for following in range(1, len(items) + 1):
            array = coming.pop().result()
            coming += [reader.submit(fetch, item) for item in items[following : following + 1]]
            yield array
            del array


def nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor's data."""
    return n_values(info) * info.dtype.itemsize


def n_values(info: TensorInfo) -> int:
    """How many values a tensor holds."""
    return math.prod(info.shape)


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        if info.dtype not in _NAMES:
            raise JaxftError(f"tensor {name}", f"has the dtype {info.dtype}, which safetensors does not have")
        stop = offset + nbytes(info)
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
