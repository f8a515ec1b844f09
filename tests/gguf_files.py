"""GGUF files made for tests: a tiny checkpoint written by us, and copies of it with something changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from converters.gguf_export import write_gguf
from converters.gguf_header import Header, read_header
from converters.hf_load import HFCheckpoint


def export(hf_folder: Path, path: Path, quantization: str = "f32") -> Path:
    """The HF folder as a GGUF file."""
    write_gguf(HFCheckpoint(hf_folder), path, quantization)
    return path


def raw_bytes(path: Path, header: Header, name: str) -> bytes:
    """A tensor's bytes as they lie in the file."""
    entry = header.tensors[name]
    with path.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file by gguf's own writer, with just these keys and float32 tensors."""
    writer = GGUFWriter(path, str(metadata.get("general.architecture", "llama")))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(
    source: Path, target: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray | None] | None = None
) -> Path:
    """A copy of a float32 GGUF file with these keys and tensors added or replaced; None takes one away."""
    header = read_header(source)
    arrays = {
        name: np.frombuffer(raw_bytes(source, header, name), np.float32).reshape(entry.shape)
        for name, entry in header.tensors.items()
    }
    return write(target, _merge(header.metadata, metadata), _merge(arrays, tensors or {}))


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**old, **new}.items() if value is not None}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
