"""Writes a checkpoint as a GGUF file that llama.cpp loads: metadata, tokenizer, and tensors one at a time."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from converters.archs import arch_of
from converters.archs.base import ArchSpec, GGUFArch
from converters.archs.gguf_rope import rope_tensors
from converters.checkpoint import Checkpoint, ExpertCheckpoint
from converters.gguf_encode import Data, Matrix, write_data
from converters.gguf_mixes import MIXES, Choice, Mix, ModelFacts, choose_types
from converters.gguf_mxfp4 import to_blocks
from converters.gguf_quants import QUANTIZABLE, WEIGHTED
from converters.gguf_tensors import GGUFTensor, gguf_tensors
from converters.gguf_tokenizer import tokenizer_metadata
from converters.imatrix import ImportanceMatrix
from converters.layout import Layout
from converters.load import check
from jaxft.console import track, warn
from jaxft.errors import JaxftError
from jaxft.files import new_file
from jaxft.models.config import DecoderConfig
from jaxft.quant import MXFP4Tensor


class _Tensor(NamedTuple):
    """One tensor of the file to be written: what it is, its type, and whether its bytes are the checkpoint's."""

    of: GGUFTensor
    type: GGMLQuantizationType
    importance: np.ndarray | None
    as_stored: bool

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.of.shape) // block * block_bytes


def write_gguf(
    checkpoint: Checkpoint,
    path: Path | str,
    quantization: str,
    *,
    importance: tuple[Path, ImportanceMatrix] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `checkpoint` to the GGUF file `path` and returns it; see `write_ggufs`."""
    write_ggufs(checkpoint, {quantization: Path(path)}, importance=importance, overwrite=overwrite)
    return Path(path)


def write_ggufs(
    checkpoint: Checkpoint,
    targets: Mapping[str, Path],
    *,
    importance: tuple[Path, ImportanceMatrix] | None = None,
    overwrite: bool = False,
    resumable: bool = False,
) -> None:
    """Writes `checkpoint` to several GGUF files in one pass; nothing is left there if it fails.

    Vectors and norms are stored as float32. Values that the type holds are stored exactly: float32, float16 and
    bfloat16 sources lose nothing in "f32", nor in their own type. Experts that the checkpoint holds in MXFP4 stay in
    it whatever the quantization, as in llama.cpp's files: another type could only be larger or lose more.

    Args:
      checkpoint: its tensors are read one after the other, each once.
      targets: quantization -> the file to be written, whose folder must exist. A quantization is a name in
        `gguf_mixes.MIXES`, which says the type of each matrix. A matrix whose rows are not whole blocks of its type
        gets another, as in llama.cpp, and a warning says so.
      importance: an importance matrix and its file's name.
      overwrite: replace existing files.
      resumable: the targets' folder is a temporary one of this very conversion (`jaxft.files.new_files`). What has been
        written stays there if it fails, and is gone on with after the last tensor that all files hold.

    Raises:
      JaxftError: an unknown quantization, an architecture or tokenizer that GGUF cannot hold, tensors that do not fit
        the config, an existing or unwritable file (all before any tensor is written); a value that is not finite or
        too large for its type.
    """
    mixes = [check_quantization(name) for name in targets]
    spec = arch_of(checkpoint.config.get("model_type"), checkpoint.where)
    arch = architecture_of(spec, checkpoint.where)
    config = check(checkpoint)
    layout = spec.tensors(config)
    described = {} if importance is None else importance[1].metadata(importance[0])
    metadata = [_metadata(checkpoint, arch, config, mix) | described for mix in mixes]
    plans = [_plan(checkpoint, layout, arch, config, mix, importance) for mix in mixes]
    extra = rope_tensors(config.rope, config.head_dim)
    headers = [_header(checkpoint, arch, plan, fields, extra) for plan, fields in zip(plans, metadata, strict=True)]
    with contextlib.ExitStack() as files:
        new = _unfinished if resumable else functools.partial(new_file, overwrite=overwrite)
        paths = [files.enter_context(new(path)) for path in targets.values()]
        opened = [files.enter_context(_begun(*begun)) for begun in zip(paths, headers, strict=True)]
        same = list(zip(*plans, strict=True))
        left = same[_kept(opened, same, [len(header) for header in headers]) :]
        n_values = sum(math.prod(one.of.shape) for each in left for one in each if one.type in QUANTIZABLE)
        write_data(_data(checkpoint, layout, arch, left, opened), n_values)


def check_quantization(name: str) -> Mix:
    """The row of `MIXES`; raises JaxftError with the known ones for any other name."""
    if name not in MIXES:
        raise JaxftError(f"GGUF quantization {name!r}", f"is not known (known: {', '.join(MIXES)})")
    return MIXES[name]


def architecture_of(spec: ArchSpec, where: object) -> GGUFArch:
    """The family's facts in GGUF; raises JaxftError where GGUF does not have it."""
    if spec.gguf is None:
        raise JaxftError(f"{where}, field model_type", f"{spec.model_type!r} cannot be written as GGUF yet")
    return spec.gguf


def _plan(
    checkpoint: Checkpoint,
    layout: Layout,
    arch: GGUFArch,
    config: DecoderConfig,
    mix: Mix,
    importance: tuple[Path, ImportanceMatrix] | None,
) -> list[_Tensor]:
    """What is written, in the checkpoint's order; a stored copy of a tied head or computed buffers are left out."""
    names = [name for name in checkpoint.tensors if name in layout.hf]
    found = gguf_tensors(names, layout, arch, config)
    queries_per_key = config.num_attention_heads // config.num_key_value_heads
    n_experts = config.moe.num_experts if config.moe else 0
    facts = ModelFacts(config.num_hidden_layers, queries_per_key, importance is not None, n_experts)
    choices = choose_types(mix, {tensor.name: tensor.shape for tensor in found}, facts)
    stored = {tensor.name for tensor in found if tensor.experts and _held_in_mxfp4(checkpoint, tensor.experts[0])}
    choices |= dict.fromkeys(stored, Choice(GGMLQuantizationType.MXFP4, GGMLQuantizationType.MXFP4))
    _warn_of_other_types(mix, choices.values())
    tensors = []
    for tensor in found:
        known = None if importance is None else importance[1].of(tensor.name, tensor.shape, importance[0])
        tensors.append(_Tensor(tensor, choices[tensor.name].type, known, tensor.name in stored))
    if importance is not None:
        _warn_of_unknown(tensors, importance[0])
    return tensors


def _held_in_mxfp4(checkpoint: Checkpoint, name: str) -> MXFP4Tensor | None:
    """The decoder's weight of that name, where the checkpoint holds it so."""
    weight = checkpoint.expert(name) if isinstance(checkpoint, ExpertCheckpoint) else None
    return weight if isinstance(weight, MXFP4Tensor) else None


def _warn_of_unknown(tensors: list[_Tensor], where: Path) -> None:
    """Embedding and head aside, which llama.cpp's matrices leave out as well."""
    without = [tensor for tensor in tensors if tensor.type in WEIGHTED and tensor.importance is None]
    unknown = [tensor.of.name for tensor in without if tensor.of.name.startswith("blk.")]
    if unknown:
        warn(f"{where} says nothing about {', '.join(unknown)}; they are quantized without")


def _warn_of_other_types(mix: Mix, choices: Collection[Choice]) -> None:
    """Says where a tensor does not get the type that the file is named after."""
    replaced = Counter((choice.wanted.name, choice.type.name) for choice in choices if choice.wanted != choice.type)
    for (wanted, given), n in replaced.items():
        warn(f"rows that are no whole blocks of {wanted} are stored as {given} instead ({n} matrices)")
    experts = any(choice.type == GGMLQuantizationType.MXFP4 for choice in choices)
    if mix.file_type == LlamaFileType.MOSTLY_MXFP4_MOE and not experts:
        warn("llama.cpp's mxfp4 files hold experts in MXFP4; this model has none, so its matrices are stored as Q8_0")


def _metadata(checkpoint: Checkpoint, arch: GGUFArch, config: DecoderConfig, mix: Mix) -> dict[str, Any]:
    """Every key but `general.*`'s descriptions, in the order of llama.cpp's converter."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        warn(f"{checkpoint.where} has no tokenizer, so llama.cpp will only take token ids of the GGUF file")
    return {
        **{f"{arch.name}.{key}": value for key, value in arch.write_metadata(config).items()},
        "general.file_type": int(mix.file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **tokenizer_metadata(tokenizer, config.vocab_size, checkpoint.where),
    }


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yields another name, which becomes `path` at the end; a finished file of several goes on with the others."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    if path.exists():
        path.rename(unfinished)
    yield unfinished
    unfinished.rename(path)


def _begun(path: Path, header: bytes) -> io.BufferedRandom:
    """The file, open behind all that was written after the same header; else behind the header alone."""
    file = path.open("r+b" if path.exists() else "w+b")
    if file.read(len(header)) != header:
        file.seek(0)
        file.truncate()
        file.write(header)
    file.seek(0, io.SEEK_END)
    return file


def _kept(files: Sequence[io.BufferedRandom], tensors: Sequence[Sequence[_Tensor]], headers: Sequence[int]) -> int:
    """How many tensors every file holds behind its header; what comes after them is cut off."""
    sizes = [[one.nbytes + len(_padding(one.nbytes)) for one in each] for each in zip(*tensors, strict=True)]
    ends = [list(accumulate(of_file, initial=size)) for of_file, size in zip(sizes, headers, strict=True)]
    n = min(bisect_right(of_file, file.tell()) for file, of_file in zip(files, ends, strict=True)) - 1
    for file, of_file in zip(files, ends, strict=True):
        file.truncate(of_file[n])
        file.seek(0, io.SEEK_END)
    return n


def _header(
    checkpoint: Checkpoint,
    arch: GGUFArch,
    tensors: list[_Tensor],
    metadata: dict[str, Any],
    extra: dict[str, np.ndarray],
) -> bytes:
    """Everything before the checkpoint's tensors, which begins with a few of llama.cpp's own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(GGUFWriter(f"{folder}/header", arch.name)) as writer,
    ):
        for name, array in extra.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        for tensor in tensors:
            writer.add_tensor_info(tensor.of.name, tensor.of.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
        _describe(writer, checkpoint)
        for key, value in metadata.items():
            _add(writer, key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        header = Path(folder, "header").read_bytes()
    return b"".join(part + _padding(len(part)) for part in (header, *(array.tobytes() for array in extra.values())))


def _padding(size: int) -> bytes:
    return bytes(-size % gguf.GGUF_DEFAULT_ALIGNMENT)


def _data(
    checkpoint: Checkpoint,
    layout: Layout,
    arch: GGUFArch,
    tensors: list[tuple[_Tensor, ...]],
    files: Sequence[io.BufferedIOBase],
) -> Iterator[tuple[io.BufferedIOBase, Data]]:
    """What follows the header of each file; tensors are padded to the alignment."""
    for each in track(tensors, "writing GGUF"):
        for number, data in _matrices(checkpoint, layout, arch, each):
            yield files[number], data
        for file, tensor in zip(files, each, strict=True):
            yield file, _padding(tensor.nbytes)


def _matrices(
    checkpoint: Checkpoint, layout: Layout, arch: GGUFArch, tensors: Sequence[_Tensor]
) -> Iterator[tuple[int, Data]]:
    """One tensor for each file, by the file's number: their types differ; experts one by one, so that no more than one
    is held in float32."""
    of = tensors[0].of
    where = f"{checkpoint.where}, tensor {of.hf_name}"
    if not of.experts:
        array = arch.to_gguf(of.hf_name, of.source.read(checkpoint.read), checkpoint.config)
        for number, tensor in enumerate(tensors):
            yield number, Matrix(array, tensor.type, tensor.importance, where)
    elif tensors[0].as_stored:
        weights = (_held_in_mxfp4(checkpoint, part) for part in of.experts)
        for blocks in (to_blocks(weight) for weight in weights if weight is not None):
            yield from ((number, blocks) for number in range(len(tensors)))
    else:
        read = functools.cache(checkpoint.read)  # HF may hold all experts in one tensor
        for expert, part in enumerate(of.experts):
            array = layout.decoder[part].read(read)
            for number, tensor in enumerate(tensors):
                known = None if tensor.importance is None else tensor.importance[expert]
                yield number, Matrix(array, tensor.type, known, where)


def _describe(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """`general.*`: the name, size and, from a model card beside the checkpoint, licence and origin."""
    writer.add_type(gguf.GGUFType.MODEL)
    source = Path(checkpoint.where)
    n_parameters = writer.get_total_parameter_count()
    try:
        described = gguf.Metadata.load(None, source if source.is_dir() else None, None, n_parameters[0])
    except yaml.YAMLError as error:
        raise JaxftError(source / "README.md", "its YAML front matter cannot be read", "Mend or delete it") from error
    described.name = described.name or source.stem
    described.size_label = described.size_label or gguf.size_label(*n_parameters)
    described.set_gguf_meta_model(writer)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """One key with GGUF's type for the Python type: uint32, float32, bool, string or array."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
