"""Importance matrices: how large what each column of a matrix is multiplied by is, collected from a text.

A quantizer that knows it rounds the columns that matter with more care (`converters.gguf_quants`). An expert's are
collected from the tokens that were routed to it, as llama.cpp multiplies them: the router's weights come after the down
projection, but where the family multiplies an expert's input by them (`Experts.weigh_results`). Files are llama.cpp's,
which its programs and ours both read: GGUF with the tensors NAME.in_sum2 [experts, columns] (sums of squares over
tokens) and NAME.counts [experts, 1] (tokens); of the older .dat form, reading only. Source: llama.cpp's
tools/imatrix/imatrix.cpp, tools/quantize/quantize.cpp and build_moe_ffn of src/llama-graph.cpp.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from flax import nnx

from converters.archs import arch_of
from converters.checkpoint import Checkpoint
from converters.gguf_header import MAGIC, read_header, stored_bytes
from converters.gguf_tensors import gguf_names, is_expert, stacked_name
from converters.observe import Observed, observe
from converters.streamed import StreamedDecoder
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.files import new_file
from jaxft.models.decoder import Decoder
from jaxft.models.layers import LAYERS, is_linear_weight
from jaxft.models.moe import Experts
from jaxft.models.params import hf_names, parameters

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclasses.dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squares by GGUF tensor name.

    Attributes:
      sums: name -> float32 [experts, columns], sums of squares; one expert for a plain matrix.
      counts: name -> float32 [experts], how many rows were summed; or [1], the same for all.
      dataset: names of the texts.
      chunk_size: tokens of a row.
      chunks: how many rows.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    dataset: str
    chunk_size: int
    chunks: int

    def of(self, name: str, shape: tuple[int, ...], where: object) -> np.ndarray | None:
        """float32 [columns], or [experts, columns] of a matrix [experts, rows, columns]; None where nothing is known.

        An expert that saw no token counts as evenly important.

        Raises:
          JaxftError: what is known is of another shape.
        """
        if name not in self.sums:
            return None
        expected = (shape[0] if len(shape) == 3 else 1, shape[-1])
        sums = self.sums[name]
        if len(sums) == 1 and sums.size == expected[0] * expected[1]:
            sums = sums.reshape(expected)  # of the older form, which keeps all experts' in a row
        if sums.shape != expected:
            what = f"knows {list(sums.shape)} values of {name}, which has {list(expected)}"
            raise JaxftError(where, what, "It is another model's")
        counts = self.counts[name][:, None]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        return means if len(shape) == 3 else means[0]

    def metadata(self, path: Path) -> dict[str, Any]:
        """What a quantized file says of it, as llama.cpp's."""
        return {
            "quantize.imatrix.file": path.name,
            "quantize.imatrix.dataset": self.dataset,
            "quantize.imatrix.entries_count": len(self.sums),
            "quantize.imatrix.chunks_count": self.chunks,
        }


def collect(checkpoint: Checkpoint, text: str, *, dataset: str, chunk_size: int = 512, max_chunks: int = 100,
            batch_size: int = 4) -> ImportanceMatrix:  # fmt: skip
    """One forward pass over the first tokens of `text`, in float32, a layer at a time.

    Args:
      checkpoint: with a tokenizer; its tensors are read once each.
      text: calibration text.
      dataset: its name, for the file.
      chunk_size: tokens of a row, which is a document of its own; a shorter text is one row.
      max_chunks: rows, at most.
      batch_size: rows that are computed at a time.

    Raises:
      JaxftError: no tokenizer, an empty text, or an architecture that is not understood or that GGUF cannot hold.
    """
    return collect_rows(
        checkpoint, _rows(checkpoint, text, chunk_size, max_chunks), dataset=dataset, batch_size=batch_size
    )


def collect_rows(checkpoint: Checkpoint, tokens: np.ndarray, *, dataset: str, batch_size: int = 4) -> ImportanceMatrix:
    """As `collect`, of token ids int32 [chunks, chunk_size]."""
    spec = arch_of(checkpoint.config.get("model_type"), checkpoint.where)
    if spec.gguf is None:
        raise JaxftError(f"{checkpoint.where}, field model_type", f"{spec.model_type!r} cannot be written as GGUF yet")
    model = StreamedDecoder(checkpoint)
    collected: dict[str, Observed] = {}

    def run_layer(layer: int, decoder: Decoder, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        hidden, observed = _observed_layer(*nnx.split(decoder), hidden, positions)
        for path, seen in observed.items():
            first, *_ = hf_names(tuple(path.split(".")), decoder.config)  # of the only layer of this decoder
            name = first.replace(".0.", f".{layer}.", 1)
            # Experts are stacked in GGUF. Linears that the checkpoint keeps as one read the same: any stands for all.
            name = stacked_name(name) if is_expert(name) else model.layout.decoder[name].names[0]
            collected[name] = collected[name] + seen if name in collected else seen
        return hidden

    model.hidden(tokens, run_layer, batch_size=batch_size)
    names = gguf_names(collected, spec.gguf.name, model.config.num_hidden_layers)
    _warn_of_idle_experts(collected)
    return ImportanceMatrix(
        sums={names[name]: np.atleast_2d(seen.squares) for name, seen in collected.items()},
        counts={names[name]: np.atleast_1d(seen.rows) for name, seen in collected.items()},
        dataset=dataset,
        chunk_size=tokens.shape[1],
        chunks=len(tokens),
    )


def _warn_of_idle_experts(collected: Mapping[str, Observed]) -> None:
    idle = sum(int((seen.rows == 0).sum()) for name, seen in collected.items() if name.endswith(".down_proj.weight"))
    if idle:
        warn(f"no token went to {idle} experts, which count as evenly important; a longer or more varied text may help")


def _rows(checkpoint: Checkpoint, text: str, chunk_size: int, max_chunks: int) -> np.ndarray:
    """int32 [chunks, chunk_size]; what is left at the end is dropped, unless it is all there is."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise JaxftError(checkpoint.where, "has no tokenizer for the calibration text")
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)
    if not ids.size:
        raise JaxftError(checkpoint.where, "its tokenizer finds no token in the calibration text")
    size = min(chunk_size, len(ids))
    n = min(max_chunks, len(ids) // size)
    return ids[: n * size].reshape(n, size)


@partial(jax.jit, static_argnames="graphdef")
def _observed_layer(
    graphdef: nnx.GraphDef, params: nnx.State, hidden: jax.Array, positions: jax.Array
) -> tuple[jax.Array, dict[str, Observed]]:
    """The layer's output, and what each linear reads, by its path."""
    flat = parameters(nnx.merge(graphdef, params))
    weights = {".".join(map(str, path)): v.get_value() for path, v in flat if LAYERS in path and is_linear_weight(path)}

    def run(weights: dict[str, jax.Array], hidden: jax.Array, positions: jax.Array) -> jax.Array:
        names = [".".join(map(str, path)) for path, _ in flat]
        state = [
            (path, variable.replace(weights[name]) if name in weights else variable)
            for name, (path, variable) in zip(names, flat, strict=True)
        ]
        decoder = nnx.merge(graphdef, nnx.from_flat_state(state))
        for _, module in nnx.iter_modules(decoder):
            if isinstance(module, Experts):
                module.weigh_results = True
        return decoder.run_layers(hidden, positions)[0]

    return observe(run, weights, hidden, positions)


def write_imatrix(matrix: ImportanceMatrix, path: Path, *, overwrite: bool = False) -> Path:
    """Writes llama.cpp's GGUF form.

    Raises:
      JaxftError: the file exists, or cannot be written.
    """
    with new_file(path, overwrite=overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        writer.kv_data[0].pop("general.architecture")  # llama.cpp's have none
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [matrix.dataset])
        writer.add_uint32("imatrix.chunk_count", matrix.chunks)
        writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
        for name, sums in matrix.sums.items():
            writer.add_tensor(name + _SUMS, sums)
            writer.add_tensor(name + _COUNTS, matrix.counts[name].reshape(-1, 1))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Reads both of llama.cpp's forms.

    Raises:
      JaxftError: the file cannot be read, or is neither.
    """
    try:
        if path.exists() and not path.is_file():
            raise JaxftError(path, "is not a file")
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        matrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as error:
        raise JaxftError(path, f"cannot be read ({error.strerror})") from error
    for name, sums in matrix.sums.items():
        if not np.isfinite(sums).all() or (sums < 0).any() or not np.isfinite(matrix.counts[name]).all():
            raise JaxftError(f"{path}, entry {name}", "holds values that are no sums of squares")
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
    arrays = {}
    for name, entry in header.tensors.items():
        if entry.type != gguf.GGMLQuantizationType.F32:
            raise JaxftError(f"{path}, tensor {name}", f"is {entry.type.name}; importance matrices are F32")
        arrays[name] = np.array(stored_bytes(path, entry)).view(np.float32).reshape(entry.shape)
    sums = {name: arrays[name + _SUMS].reshape(-1, arrays[name + _SUMS].shape[-1]) for name in names}
    missing = [name for name in names if arrays.get(name + _COUNTS, np.empty(0)).size not in (1, len(sums[name]))]
    if missing or not names:
        raise JaxftError(path, f"is no importance matrix: counts of {', '.join(missing) or 'everything'} are missing")
    metadata = header.metadata
    datasets = metadata.get("imatrix.datasets")
    return ImportanceMatrix(
        sums,
        {name: arrays[name + _COUNTS].reshape(-1) for name in names},
        ", ".join(datasets) if isinstance(datasets, list) else "",
        _number(metadata, "imatrix.chunk_size"),
        _number(metadata, "imatrix.chunk_count"),
    )


def _number(metadata: dict[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    return value if isinstance(value, int) else 0


def _read_legacy(path: Path) -> ImportanceMatrix:
    """int32 count of entries; for each int32 length and name, int32 calls, int32 n, float32 [n]: means times calls."""
    content = path.read_bytes()
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    try:
        (n_entries,), at = struct.unpack_from("<i", content), 4
        for _ in range(n_entries):
            (length,), at = struct.unpack_from("<i", content, at), at + 4
            name, at = content[at : at + length].decode(), at + length
            (calls, n), at = struct.unpack_from("<2i", content, at), at + 8
            sums[name] = np.frombuffer(content, "<f4", n, at).reshape(1, n)
            counts[name], at = np.full(1, calls, np.float32), at + 4 * n
    except (struct.error, ValueError) as error:
        raise JaxftError(path, "is neither a GGUF file nor an older importance matrix", "Fetch it again") from error
    if not sums:
        raise JaxftError(path, "is an importance matrix without entries")
    return ImportanceMatrix(sums, counts, "", 0, 0)
