"""Opens a GGUF file as a checkpoint: an HF config from its metadata, tensors dequantized under their HF names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from converters.archs import ARCHS
from converters.archs.base import ArchSpec, GGUFArch, MetadataReader
from converters.archs.gguf_rope import FREQUENCIES, recognise_llama3
from converters.checkpoint import TensorInfo, check_tensors
from converters.gguf_header import TensorEntry, read_header, stored_bytes
from converters.gguf_tensors import gguf_names
from converters.gguf_tokenizer import read_tokenizer, special_token_ids
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from jaxft.models.params import expected_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is stored as it is; every other type is dequantized to float32.
_STORED = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# The config fields that size the model's tensors.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class GGUFCheckpoint:
    """A GGUF file; implements `converters.checkpoint.Checkpoint`.

    Opening reads and checks the header only. `config` is derived: GGUF stores no config.json. Its dtype is that of the
    file's matrices if they are all of one half-precision type, else float32; norms are float32 in every GGUF file.

    Raises:
      JaxftError: the file is not a sound GGUF file, its architecture or a fact of it is not supported, or its tensors
        are not exactly those that its config asks for (all that are missing, unknown or misshapen are listed).
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        header = read_header(self._path)
        if header.metadata.get("split.count", 1) != 1:
            raise JaxftError(path, "is one part of a split model", "Join the parts with llama.cpp's gguf-split first")
        self._metadata = header.metadata
        self._spec, self._arch = _architecture(header.metadata, path)
        _check_types(header.tensors, path)
        self.config = self._read_config(header.tensors)
        self._entries = self._by_hf_name(header.tensors)
        self.tensors = {
            name: TensorInfo(entry.shape, _STORED.get(entry.type, np.dtype(np.float32)))
            for name, entry in self._entries.items()
        }
        self.config["dtype"] = _dtype_name(self.tensors)

    @property
    def where(self) -> str:
        """The file's path."""
        return str(self._path)

    @property
    def quantization(self) -> str | None:
        """For `converters.checkpoint.quantization_of`."""
        types = sorted({entry.type.name for entry in self._entries.values() if entry.type not in _STORED})
        return f"GGUF {', '.join(types)}" if types else None

    def read(self, name: str) -> np.ndarray:
        """One tensor under its HF name: float32, float16 and bfloat16 as stored, quantized types as float32.

        The rows of q and k come in HF's order.
        """
        array = _read(self._path, self._entries[name])
        return np.ascontiguousarray(self._arch.from_gguf(name, array, self.config))

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer built from the metadata; None where the file says it has none.

        Raises:
          JaxftError: a tokenizer that is not byte-level BPE, or whose pre-tokenizer is not known.
        """
        return read_tokenizer(self._metadata, self.config["max_position_embeddings"], self.where)

    def sidecars(self) -> dict[str, bytes]:
        """None: GGUF keeps no files."""
        return {}

    def _read_config(self, entries: dict[str, TensorEntry]) -> dict[str, Any]:
        metadata = _with_vocab_size(self._metadata, self._arch.name)
        reader = MetadataReader(metadata, self._arch.name, entries.keys(), self.where)
        config = {
            "architectures": [self._spec.architecture],
            "model_type": self._spec.model_type,
            **self._arch.read_config(reader),
            **special_token_ids(self._metadata, self.where),
        }
        reader.finish()
        _check_sizes(config, entries, self.where)
        if FREQUENCIES in entries:
            config["rope_parameters"] = recognise_llama3(
                _read(self._path, entries[FREQUENCIES]), config["rope_parameters"], config["head_dim"], self.where
            )
        return config

    def _by_hf_name(self, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """The file's tensors under their HF names, in the order of the file."""
        config: DecoderConfig = self._spec.decoder_config(self.config, self.where)
        expected = expected_tensors(config)
        names = gguf_names(expected, self._arch.name, config.num_hidden_layers)
        weights = {name: entry.shape for name, entry in entries.items() if name != FREQUENCIES}
        check_tensors(weights, {names[hf]: shape for hf, shape in expected.items()}, self.where)
        hf_names = {gguf_name: hf for hf, gguf_name in names.items()}
        return {hf_names[name]: entries[name] for name in weights}


def _architecture(metadata: dict[str, Any], where: object) -> tuple[ArchSpec, GGUFArch]:
    name = metadata.get("general.architecture")
    known = {spec.gguf.name: (spec, spec.gguf) for spec in reversed(ARCHS.values()) if spec.gguf}
    if name not in known:
        raise JaxftError(
            f"{where}, key general.architecture",
            f"{name!r} is not supported (supported: {', '.join(sorted(known))})",
            "CONTRIBUTING.md has the recipe for a new architecture",
        )
    return known[name]


def _check_types(entries: dict[str, TensorEntry], where: object) -> None:
    """Refuses the types that gguf cannot dequantize, found out on one block of zeros each."""
    for entry in entries.values():
        if entry.type in _STORED:
            continue
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[entry.type][1]), np.uint8), entry.type)
        except NotImplementedError as error:
            raise JaxftError(
                f"{where}, tensor {entry.name}", f"is of the type {entry.type.name}, which cannot be dequantized"
            ) from error


def _with_vocab_size(metadata: dict[str, Any], arch: str) -> dict[str, Any]:
    """Older files have no `vocab_size` key; it is the number of tokens."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {f"{arch}.vocab_size": len(tokens), **metadata} if isinstance(tokens, list) else metadata


def _check_sizes(config: dict[str, Any], entries: dict[str, TensorEntry], where: object) -> None:
    """No size can exceed both the largest dimension and the number of tensors, so that a corrupt one costs no time."""
    limit = max([len(entries), *(max(entry.shape) for entry in entries.values())])
    for field in _SIZES:
        if config[field] > limit:
            raise JaxftError(where, f"its metadata says {field} {config[field]}, but no tensor is that large")


def _dtype_name(tensors: dict[str, TensorInfo]) -> str:
    matrices = {info.dtype for info in tensors.values() if len(info.shape) > 1}
    return matrices.pop().name if len(matrices) == 1 else "float32"


def _read(path: Path, entry: TensorEntry) -> np.ndarray:
    """A copy of the tensor's values in its own shape; the file's order of rows."""
    raw = stored_bytes(path, entry)
    if entry.type in _STORED:
        return np.array(raw).view(_STORED[entry.type]).reshape(entry.shape)
    return gguf.quants.dequantize(raw.reshape(*entry.shape[:-1], -1), entry.type)
