"""Corrupt GGUF files: each one gives one JaxftError that names the file, quickly, whatever its bytes say."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

import gguf_files
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from jaxft.errors import JaxftError

ENORMOUS = struct.pack("<Q", 2**60)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as F32 GGUF."""
    return gguf_files.export(tiny_hf_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_equals_ggufs_own_reader(tiny_gguf: Path) -> None:
    reader, header = GGUFReader(tiny_gguf), read_header(tiny_gguf)
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert (entry.offset, entry.nbytes, entry.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert entry.shape == tuple(tensor.shape.tolist()[::-1])
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {
        k: v if isinstance(v, str | int | float | list) else v.tolist() for k, v in header.metadata.items()
    } == fields


def at(position: int, replacement: bytes) -> Callable[[bytes], bytes]:
    """Overwrites bytes at a fixed place of the file."""
    return lambda data: data[:position] + replacement + data[position + len(replacement) :]


def after(text: bytes, skip: int, replacement: bytes) -> Callable[[bytes], bytes]:
    """Overwrites bytes `skip` after the end of the first `text`."""
    return lambda data: at(data.index(text) + len(text) + skip, replacement)(data)


# A key is followed by its value's type (4 bytes) and value; an array's by its items' type and its length (8 bytes).
# A tensor's name is followed by its dimensions' count (4), the dimensions (8 each), its type (4) and offset (8).
CORRUPTIONS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is empty"),
    "magic": (at(0, b"GGML"), "is not a GGUF file"),
    "version": (at(4, struct.pack("<I", 1)), "is GGUF version 1"),
    "big_endian": (at(4, struct.pack(">I", 3)), "is a big-endian GGUF file"),
    "tensor_count": (at(8, ENORMOUS), "the tensor count is 1152921504606846976"),
    "key_count": (at(16, ENORMOUS), "the key count is 1152921504606846976"),
    "key_length": (at(24, ENORMOUS), "is truncated or corrupt: metadata key 0"),
    "key_text": (at(32, b"\xff\xfe"), "metadata key 0 is not UTF-8"),
    "value_type": (after(b"general.type", 0, b"\x77"), "key general.type: has the unknown value type 119"),
    "string_length": (after(b"general.type", 4, ENORMOUS), "the value of general.type"),
    "array_type": (after(b"ggml.tokens", 4, b"\x63"), "key tokenizer.ggml.tokens: has the unknown value type 99"),
    "nested_array": (after(b"ggml.tokens", 4, b"\x09"), "is an array of arrays"),
    "array_length": (after(b"ggml.tokens", 8, ENORMOUS), "the length of tokenizer.ggml.tokens is 1152921504606846976"),
    "number_array_length": (after(b"ggml.token_type", 8, ENORMOUS), "the length of tokenizer.ggml.token_type is"),
    "duplicate_key": (lambda data: data.replace(b"add_bos_token", b"add_eos_token"), "add_eos_token: is there twice"),
    "duplicate_tensor": (
        lambda data: data.replace(b"blk.1.attn_q", b"blk.0.attn_q"),
        "tensor blk.0.attn_q.weight: is there twice",
    ),
    "dimensions": (after(b"token_embd.weight", 0, struct.pack("<I", 900)), "token_embd.weight: has 900 dimensions"),
    "shape": (after(b"token_embd.weight", 4, ENORMOUS), r"token_embd.weight: ends at byte \d+, but the file has"),
    "empty_shape": (after(b"token_embd.weight", 4, bytes(8)), "token_embd.weight: has the empty shape"),
    "tensor_type": (after(b"token_embd.weight", 20, b"\xc8"), "token_embd.weight: has the unknown tensor type 200"),
    "removed_type": (after(b"token_embd.weight", 20, b"\x04"), "token_embd.weight: has the unknown tensor type 4"),
    "block": (after(b"token_embd.weight", 20, b"\x0c"), "rows of 64 values, not a multiple of Q4_K's block of 256"),
    "undecodable_type": (after(b"token_embd.weight", 20, b"\x18"), "type I8, which cannot be dequantized"),
    "offset": (after(b"output_norm.weight", 16, struct.pack("<Q", 2**40)), r"output_norm.weight: ends at byte"),
    "alignment": (after(b"output_norm.weight", 16, b"\x01"), "which is not aligned to 32 bytes"),
}


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupt(corrupt: Callable[[bytes], bytes], message: str, tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(corrupt(tiny_gguf.read_bytes()))
    with pytest.raises(JaxftError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in caught.value.where


def test_truncated_anywhere(tiny_gguf: Path, tmp_path: Path) -> None:
    """Every prefix of the file is refused; the last byte of the last tensor counts."""
    data, path = tiny_gguf.read_bytes(), tmp_path / "truncated.gguf"
    last = max(entry.offset + entry.nbytes for entry in read_header(tiny_gguf).tensors.values())
    for size in [*range(1, 600, 29), *range(1000, last, 29989), last - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(JaxftError, match=r"truncated\.gguf"):
            read_header(path)


def test_any_changed_byte_is_read_or_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    """No byte of the header can cause anything but a JaxftError."""
    data, path = tiny_gguf.read_bytes(), tmp_path / "changed.gguf"
    end = min(entry.offset for entry in read_header(tiny_gguf).tensors.values())
    rng, refused = random.Random(0), 0
    for _ in range(150):
        mutated = bytearray(data[: end + 64])
        for _ in range(rng.choice((1, 1, 2, 8))):
            mutated[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(mutated + data[end + 64 :])
        try:
            read_header(path)
        except JaxftError:
            refused += 1
    assert 20 < refused < 150


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_unreadable(name: str, tmp_path: Path) -> None:
    with pytest.raises(JaxftError, match="cannot be read"):
        GGUFCheckpoint(tmp_path / name)
