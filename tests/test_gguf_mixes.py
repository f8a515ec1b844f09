"""The type of each tensor is llama.cpp's: by stored lists, and in the slow tier the whole files, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest

import gguf_files
from converters.checkpoint import Checkpoint
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from converters.gguf_mixes import MIXES, choose_types
from converters.hf_load import HFCheckpoint
from converters.imatrix import ImportanceMatrix
from gguf_mix_cases import MODELS, compact, mix_config, shapes_and_facts
from jaxft.fetch import Pinned
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS
from tiny import write_tiny_hf

VECTORS = json.loads((Path(__file__).parent / "vectors/gguf_mixes.json").read_text())


def test_every_mix_is_among_the_vectors() -> None:
    assert {model: list(mixes) for model, mixes in VECTORS.items()} == {model: list(MIXES) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_types_are_llamacpps(model: str) -> None:
    shapes, facts = shapes_and_facts(MODELS[model])
    for name, mix in MIXES.items():
        types = {tensor: choice.type.name for tensor, choice in choose_types(mix, shapes, facts).items()}
        assert compact(types) == VECTORS[model][name], name


@pytest.fixture(scope="module")
def llama(unpacked: Callable[[Pinned], Path]) -> LlamaCpp:
    return LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS))


def compare(
    checkpoint: Checkpoint,
    mix: str,
    folder: Path,
    llama: LlamaCpp,
    types: dict[str, str] | None,
    importance: ImportanceMatrix | None = None,
) -> None:
    """Our file and llama.cpp's of the same F32 file: the same metadata, types, bytes of every tensor, and size."""
    exact, ours, theirs = (folder / name for name in ("f32.gguf", "ours.gguf", "theirs.gguf"))
    if not exact.exists():
        write_gguf(checkpoint, exact, "f32")
    if importance is None:
        llama.quantize(exact, theirs, MIXES[mix].file_type)
        write_gguf(checkpoint, ours, mix, overwrite=True)
    else:
        shapes = {name: entry.shape for name, entry in read_header(exact).tensors.items() if name in importance.sums}
        means = {name: importance.of(name, shape, "x") for name, shape in shapes.items()}
        llama.quantize(exact, theirs, MIXES[mix].file_type, means)
        write_gguf(checkpoint, ours, mix, importance=(folder / "imatrix.gguf", importance), overwrite=True)
    header, reference = read_header(ours), read_header(theirs)
    for key in [key for key in header.metadata if key.startswith("quantize.imatrix.")]:
        del header.metadata[key]  # llama.cpp's command line writes them, not its library
    assert header.metadata.keys() == reference.metadata.keys()
    for key, value in header.metadata.items():
        assert np.array_equal(value, reference.metadata[key]), key
    if types is not None:
        assert compact({name: entry.type.name for name, entry in reference.tensors.items()}) == types
    assert header.tensors.keys() == reference.tensors.keys()
    different = [
        name
        for name, entry in header.tensors.items()
        if entry.type != reference.tensors[name].type
        or gguf_files.raw_bytes(ours, header, name) != gguf_files.raw_bytes(theirs, reference, name)
    ]
    assert different == []
    if importance is None:
        assert ours.stat().st_size == theirs.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("model", [model for model in MODELS if model != "smollm2"])
def test_files_are_llamacpps(model: str, tmp_path: Path, llama: LlamaCpp) -> None:
    """Random weights in shapes of which K-quants are made."""
    checkpoint = HFCheckpoint(write_tiny_hf(tmp_path / "hf", mix_config(**MODELS[model]), with_tokenizer=True))
    for mix, types in VECTORS[model].items():
        compare(checkpoint, mix, tmp_path, llama, types)


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "iq4_xs"])
def test_smollm2_is_llamacpps(mix: str, smollm2_gguf: Path, tmp_path: Path, llama: LlamaCpp) -> None:
    compare(GGUFCheckpoint(smollm2_gguf), mix, tmp_path, llama, VECTORS["smollm2"][mix])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mixes"), [("whole_blocks", MIXES), ("odd_rows", MIXES), ("eight_experts", ("q4_0", "q4_k_m"))]
)
def test_files_with_importance_are_llamacpps(
    model: str, mixes: Collection[str], tmp_path: Path, llama: LlamaCpp
) -> None:
    """Some mixes choose other types with an importance matrix; one tensor is not in it."""
    checkpoint = HFCheckpoint(write_tiny_hf(tmp_path / "hf", mix_config(**MODELS[model]), with_tokenizer=True))
    shapes, _ = shapes_and_facts(MODELS[model])
    rng = np.random.default_rng(0)
    sums = {
        name: rng.exponential(1, (shape[0] if len(shape) == 3 else 1, shape[-1])).astype(np.float32) * 7
        for name, shape in shapes.items()
        if len(shape) > 1 and name.startswith("blk.") and name != "blk.1.attn_k.weight"
    }
    importance = ImportanceMatrix(
        sums, {name: np.full(len(total), 7, np.float32) for name, total in sums.items()}, "random", 7, 1
    )
    for mix in mixes:
        compare(checkpoint, mix, tmp_path, llama, None, importance)
