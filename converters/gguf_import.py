"""Opens a GGUF file as a checkpoint: an HF config from its metadata, tensors dequantized under their HF names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from converters.archs import ARCHS
from converters.archs.base import ArchSpec, GGUFArch
from converters.archs.gguf_keys import MetadataReader
from converters.archs.gguf_rope import FACTORS, FREQUENCIES, recognise_llama3
from converters.checkpoint import TensorInfo, check_tensors
from converters.gguf_header import TensorEntry, read_header, stored_bytes
from converters.gguf_mxfp4 import from_blocks
from converters.gguf_tensors import gguf_tensors, is_expert, without_single_rows
from converters.gguf_tokenizer import read_tokenizer, special_token_ids
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from jaxft.quant import MXFP4Tensor

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
    """A GGUF file; implements `converters.checkpoint.Checkpoint`, and `ExpertCheckpoint` for experts in MXFP4.

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
        if header.metadata.get("general.type") == "adapter":
            raise JaxftError(
                path, "is a LoRA adapter, not a model", "jaxft-convert from-gguf --base makes PEFT's of it"
            )
        self._metadata = header.metadata
        self._spec, self._arch = _architecture(header.metadata, path)
        check_types(header.tensors, path)
        self.config = self._read_config(header.tensors)
        config = self._spec.decoder_config(self.config, self.where)
        self._layout = self._spec.tensors(config)
        self._in_file = self._arch.in_file(self._layout.hf_shapes, config)
        self._entries = self._by_part(header.tensors, config)
        whole_of = {
            part: name
            for side in (self._layout.hf, self._in_file.decoder)
            for name, s in side.items()
            for part in s.names
        }
        self.tensors = {
            whole_of[part]: TensorInfo(
                self._layout.hf[whole_of[part]].shape, _STORED.get(entry.type, np.dtype(np.float32))
            )
            for part, entry in self._entries.items()
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
        if is_expert(self._layout.hf[name].names[0]):
            return self._layout.hf[name].read(lambda part: read_entry(self._path, self._entries[part]))
        return np.ascontiguousarray(self._in_file.decoder[name].read(self._read_from_file))

    def _read_from_file(self, name: str) -> np.ndarray:
        """One tensor of the file, under HF's name for it."""
        array = read_entry(self._path, self._entries[name]).reshape(self._in_file.hf[name].shape)
        return self._arch.from_gguf(name, array, self.config)

    def expert(self, name: str) -> MXFP4Tensor | None:
        """The decoder's weight of that name as it is stored, of numpy arrays; None where it is not in MXFP4."""
        entry = self._entries.get(name)
        if entry is None or entry.type != GGMLQuantizationType.MXFP4 or not is_expert(name):
            return None
        rows, columns = entry.shape
        return from_blocks(stored_bytes(self._path, entry), (rows, columns))

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
                read_entry(self._path, entries[FREQUENCIES]), config["rope_parameters"], config["head_dim"], self.where
            )
        if config["rope_parameters"].get("rope_type") == "longrope":
            # The shortest decimals that mean these float32, as everywhere in the metadata.
            config["rope_parameters"] |= {
                field: [float(str(value)) for value in read_entry(self._path, entries[tensor])]
                for field, tensor in FACTORS.items()
            }
        return config

    def _by_part(self, entries: dict[str, TensorEntry], config: DecoderConfig) -> dict[str, TensorEntry]:
        """HF's name of each tensor -> its place, in the file's order; of experts, the decoder's name of each."""
        expected = {t.name: t for t in gguf_tensors(self._layout.hf, self._layout, self._arch, config)}
        weights = {
            name: entry.shape if name in expected and expected[name].experts else without_single_rows(entry.shape)
            for name, entry in entries.items()
            if name not in (FREQUENCIES, *FACTORS.values())
        }
        check_tensors(weights, {name: tensor.shape for name, tensor in expected.items()}, self.where)
        found: dict[str, TensorEntry] = {}
        for name in weights:
            tensor = expected[name]
            if tensor.experts:
                found |= dict(zip(tensor.experts, _experts(entries[name]), strict=True))
            else:
                found[tensor.hf_name] = entries[name]
        return found


def _architecture(metadata: dict[str, Any], where: object) -> tuple[ArchSpec, GGUFArch]:
    name = metadata.get("general.architecture")
    known = [(spec, spec.gguf) for spec in ARCHS.values() if spec.gguf]
    found = [(spec, arch) for spec, arch in known if arch.name == name]
    if not found:
        raise JaxftError(
            f"{where}, key general.architecture",
            f"{name!r} is not supported (supported: {', '.join(sorted({arch.name for _, arch in known}))})",
            "CONTRIBUTING.md has the recipe for a new architecture",
        )
    # One graph of llama.cpp may be several of HF's classes.
    return next((each for each in found if each[1].describes(metadata)), found[0])


def _experts(entry: TensorEntry) -> list[TensorEntry]:
    """The places of the first axis' entries, which lie one behind the other."""
    n, *shape = entry.shape
    size = entry.nbytes // n
    return [entry._replace(shape=tuple(shape), offset=entry.offset + i * size, nbytes=size) for i in range(n)]


def check_types(entries: dict[str, TensorEntry], where: object) -> None:
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


def read_entry(path: Path, entry: TensorEntry) -> np.ndarray:
    """A copy of the tensor's values in its own shape; the file's order of rows."""
    raw = stored_bytes(path, entry)
    if entry.type in _STORED:
        return np.array(raw).view(_STORED[entry.type]).reshape(entry.shape)
    with np.errstate(all="ignore"):  # scales that are infinite or NaN give values that are NaN
        return gguf.quants.dequantize(raw.reshape(*entry.shape[:-1], -1), entry.type)
