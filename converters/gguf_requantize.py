"""A GGUF file in other types: of any architecture, since names, metadata and tokenizer stay as they are.

Tensors whose type does not change are copied byte for byte; the others are decoded and quantized again, so what the
first quantization lost stays lost. `general.file_type` and `general.quantization_version` are rewritten, as
llama.cpp's `llama_model_quantize` does.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from converters.gguf_encode import Data, Matrix, write_data
from converters.gguf_export import check_quantization
from converters.gguf_header import MAGIC, Header, TensorEntry, alignment_of, read_header, stored_bytes
from converters.gguf_import import check_types, read_entry
from converters.gguf_mixes import Mix, ModelFacts, choose_types, stays_exact
from converters.imatrix import ImportanceMatrix
from jaxft.console import track
from jaxft.errors import JaxftError
from jaxft.files import new_file

_VERSION = 3


def requantize(
    source: Path,
    path: Path,
    quantization: str,
    *,
    importance: tuple[Path, ImportanceMatrix] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the GGUF file `source` to `path` in the mix `quantization` (a name in `gguf_mixes.MIXES`).

    Args:
      source: of any architecture; norms, biases and other vectors stay as they are.
      path: the new file.
      importance: an importance matrix and its file.
      overwrite: replace an existing file.

    Raises:
      JaxftError: the source is not sound or holds a type that cannot be decoded, the quantization is unknown, the file
        exists or cannot be written, or a value does not fit its new type.
    """
    mix = check_quantization(quantization)
    header = read_header(source)
    check_types(header.tensors, source)
    types = _types(header, mix, source, importance is not None)
    changed: dict[str, Any] = {
        "general.file_type": int(mix.file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **({} if importance is None else importance[1].metadata(importance[0])),
    }
    alignment = alignment_of(header.metadata, source)
    with new_file(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        _write_header(file, source, header, types, changed, alignment)
        n_values = sum(math.prod(entry.shape) for n, entry in header.tensors.items() if entry.type != types[n])
        data = _data(source, header, types, importance, alignment)
        write_data(((file, item) for item in data), n_values)
    return path


def _types(header: Header, mix: Mix, source: Path, has_importance: bool) -> dict[str, GGMLQuantizationType]:
    """Every tensor's new type."""
    matrices = {name: entry.shape for name, entry in header.tensors.items() if not stays_exact(name, entry.shape)}
    choices = choose_types(mix, matrices, _facts(header.metadata, source, has_importance))
    return {name: choices[name].type if name in choices else entry.type for name, entry in header.tensors.items()}


def _facts(metadata: dict[str, Any], source: Path, has_importance: bool) -> ModelFacts:
    arch = metadata.get("general.architecture")
    layers, heads = (metadata.get(f"{arch}.{key}") for key in ("block_count", "attention.head_count"))
    shared = metadata.get(f"{arch}.attention.head_count_kv", heads)
    sizes = [int(np.max(size)) if isinstance(size, int | np.ndarray) else 0 for size in (layers, heads, shared)]
    if min(sizes) < 1:
        raise JaxftError(source, f"does not say how many layers and heads it has (architecture {arch!r})")
    experts = metadata.get(f"{arch}.expert_count", 0)
    return ModelFacts(sizes[0], sizes[1] // sizes[2], has_importance, experts if isinstance(experts, int) else 0)


def _data(
    source: Path,
    header: Header,
    types: dict[str, GGMLQuantizationType],
    importance: tuple[Path, ImportanceMatrix] | None,
    alignment: int,
) -> Iterator[Data]:
    """What follows the header, each tensor padded to the alignment."""
    for name, entry in track(list(header.tensors.items()), "requantizing"):
        if types[name] == entry.type:
            yield stored_bytes(source, entry)
        else:
            known = None if importance is None else importance[1].of(name, entry.shape, importance[0])
            yield Matrix(read_entry(source, entry), types[name], known, f"{source}, tensor {name}")
        yield bytes(-_nbytes(entry, types[name]) % alignment)


def _nbytes(entry: TensorEntry, kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(entry.shape) // block * block_bytes


def _write_header(
    file: BinaryIO,
    source: Path,
    header: Header,
    types: dict[str, GGMLQuantizationType],
    changed: dict[str, Any],
    alignment: int,
) -> None:
    """Metadata as it was, but for what is `changed`; where each tensor will lie; up to the first one's first byte."""
    kept = {key: span for key, span in header.spans.items() if key not in changed}
    file.write(MAGIC + struct.pack("<IQQ", _VERSION, len(header.tensors), len(kept) + len(changed)))
    with source.open("rb") as old:
        for start, stop in kept.values():
            old.seek(start)
            file.write(old.read(stop - start))
    for key, value in changed.items():
        file.write(_string(key) + _value(value))
    offset = 0
    for name, entry in header.tensors.items():
        file.write(_string(name) + struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1]))
        file.write(struct.pack("<IQ", types[name], offset))
        offset += _nbytes(entry, types[name])
        offset += -offset % alignment
    file.write(bytes(-file.tell() % alignment))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: int | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    return struct.pack("<II", GGUFValueType.UINT32, value)
