"""Reads the header of a GGUF file: metadata and where each tensor lies, without touching tensor data.

The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count and length is checked against the
bytes that are left before anything is allocated, so a corrupt file gives one JaxftError and never a huge allocation or
a long loop; gguf's own GGUFReader trusts what it reads.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from jaxft.errors import JaxftError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}
# The fewest bytes that one entry can take: an empty string and a one-byte value; an empty name and no dimensions.
_MIN_KEY_VALUE_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8


class TensorEntry(NamedTuple):
    """One tensor of the file: its shape in numpy's order (rows last in memory first), and its bytes' place."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


class Header(NamedTuple):
    """Metadata (numbers, strings, lists of strings, numpy arrays of numbers) and tensors, both in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Parses and validates the header of the GGUF file `path`.

    Raises:
      JaxftError: the file cannot be read, is no little-endian GGUF of version 2 or 3, is truncated, holds a count or
        length that does not fit the file, a duplicate key or tensor, an unknown type, or a tensor outside the file.
    """
    try:
        if not path.stat().st_size:
            raise JaxftError(path, "is empty")
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise JaxftError(path, f"cannot be read ({error.strerror})") from error
    cursor = _Cursor(data.data, path)
    n_tensors, n_keys = _read_counts(cursor)
    metadata = _read_metadata(cursor, n_keys)
    entries = [_read_tensor_entry(cursor) for _ in range(n_tensors)]
    alignment = _alignment(metadata, path)
    start = math.ceil(cursor.position / alignment) * alignment
    return Header(metadata, _place(entries, start, alignment, len(data), path))


def stored_bytes(path: Path, entry: TensorEntry) -> np.ndarray:
    """The tensor's bytes, uint8 [nbytes], a read-only view of the file."""
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.nbytes,)))


class _Cursor:
    """Reads little-endian values one after the other and never past the end of the file."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self._data = data
        self.path = path
        self.position = 0

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise JaxftError(
                self.path,
                f"is truncated or corrupt: {what} at byte {self.position} needs {size} bytes, {self.left} are left",
                "Fetch the file again",
            )
        start, self.position = self.position, self.position + size
        return self._data[start : self.position]

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def count(self, what: str, min_bytes: int) -> int:
        """A u64 count of things that take at least `min_bytes` each."""
        value = self.u64(what)
        if value * min_bytes > self.left:
            raise JaxftError(
                self.path,
                f"is truncated or corrupt: {what} is {value}, but only {self.left} bytes follow",
                "Fetch the file again",
            )
        return value

    def string(self, what: str) -> str:
        raw = self.take(self.u64(f"the length of {what}"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise JaxftError(self.path, f"is corrupt: {what} is not UTF-8", "Fetch the file again") from error


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    if bytes(cursor.take(4, "the magic")) != MAGIC:
        raise JaxftError(cursor.path, "is not a GGUF file (it does not begin with 'GGUF')")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        what = "is a big-endian GGUF file" if version & 0xFFFF == 0 else f"is GGUF version {version}"
        raise JaxftError(cursor.path, f"{what}; little-endian versions {VERSIONS} are supported", "Convert it again")
    return cursor.count("the tensor count", _MIN_TENSOR_BYTES), cursor.count("the key count", _MIN_KEY_VALUE_BYTES)


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise JaxftError(f"{cursor.path}, key {key}", "is there twice")
        metadata[key] = _read_value(cursor, _value_type(cursor, key), key)
    return metadata


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    raw = cursor.u32(f"the type of {key}")
    try:
        return GGUFValueType(raw)
    except ValueError as error:
        raise JaxftError(f"{cursor.path}, key {key}", f"has the unknown value type {raw}") from error


def _read_value(cursor: _Cursor, kind: GGUFValueType, key: str) -> Any:
    if kind == GGUFValueType.STRING:
        return cursor.string(f"the value of {key}")
    if kind == GGUFValueType.ARRAY:
        return _read_array(cursor, key)
    dtype = _SCALARS[kind]
    return np.frombuffer(cursor.take(dtype.itemsize, f"the value of {key}"), dtype)[0].item()


def _read_array(cursor: _Cursor, key: str) -> list[str] | np.ndarray:
    kind = _value_type(cursor, key)
    if kind == GGUFValueType.ARRAY:
        raise JaxftError(f"{cursor.path}, key {key}", "is an array of arrays, which no known model uses")
    if kind == GGUFValueType.STRING:
        size = cursor.count(f"the length of {key}", 8)
        return [cursor.string(f"item {i} of {key}") for i in range(size)]
    dtype = _SCALARS[kind]
    size = cursor.count(f"the length of {key}", dtype.itemsize)
    return np.frombuffer(cursor.take(size * dtype.itemsize, f"the value of {key}"), dtype).copy()


def _read_tensor_entry(cursor: _Cursor) -> TensorEntry:
    """The entry as stored: `offset` still counts from the start of the data."""
    name = cursor.string("a tensor's name")
    where = f"{cursor.path}, tensor {name}"
    n_dims = cursor.u32(f"the dimensions of {name}")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise JaxftError(where, f"has {n_dims} dimensions (1 to {MAX_DIMENSIONS} are possible)")
    shape = tuple(cursor.u64(f"the shape of {name}") for _ in range(n_dims))[::-1]
    if 0 in shape:
        raise JaxftError(where, f"has the empty shape {list(shape)}")
    raw_type = cursor.u32(f"the type of {name}")
    if raw_type not in set(GGML_QUANT_SIZES):
        raise JaxftError(where, f"has the unknown tensor type {raw_type}")
    kind = GGMLQuantizationType(raw_type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise JaxftError(where, f"has rows of {shape[-1]} values, not a multiple of {kind.name}'s block of {block}")
    return TensorEntry(name, shape, kind, cursor.u64(f"the offset of {name}"), math.prod(shape) // block * block_bytes)


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value <= 0 or value & (value - 1):
        raise JaxftError(f"{path}, key general.alignment", f"must be a power of two, not {value!r}")
    return value


def _place(
    entries: list[TensorEntry], start: int, alignment: int, file_size: int, path: Path
) -> dict[str, TensorEntry]:
    """The tensors by name, their offsets counted from the start of the file."""
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        where = f"{path}, tensor {entry.name}"
        if entry.name in tensors:
            raise JaxftError(where, "is there twice")
        if entry.offset % alignment:
            raise JaxftError(where, f"begins at offset {entry.offset}, which is not aligned to {alignment} bytes")
        end = start + entry.offset + entry.nbytes
        if end > file_size:
            raise JaxftError(
                where, f"ends at byte {end}, but the file has {file_size}", "It is truncated or corrupt; fetch it again"
            )
        tensors[entry.name] = entry._replace(offset=start + entry.offset)
    return tensors
