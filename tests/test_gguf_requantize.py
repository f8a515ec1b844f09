"""GGUF files in other types: the bytes are those of a quantization from the start, everything else stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gguf_files
from converters.cli import main
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import read_entry
from converters.gguf_mixes import MIXES
from converters.gguf_quants import quantize
from converters.hf_load import HFCheckpoint
from jaxft.errors import EXIT_STATUS
from jaxft.fetch import Pinned
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS

UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def exact(tiny_hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.export(tiny_hf_dir, tmp_path_factory.mktemp("exact") / "f32.gguf")


def contents(path: Path) -> tuple[dict[str, object], dict[str, tuple[str, bytes]]]:
    """Metadata, and type and bytes of every tensor."""
    header = read_header(path)
    metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in header.metadata.items()}
    return metadata, {n: (e.type.name, gguf_files.raw_bytes(path, header, n)) for n, e in header.tensors.items()}


@pytest.mark.parametrize("mix", ["q8_0", "q4_k_m", "bf16"])
def test_from_exact_values_it_is_the_same_file(mix: str, exact: Path, tiny_hf_dir: Path, tmp_path: Path):
    """Up to the order of the keys; also the other way round where nothing was lost."""
    write_gguf(HFCheckpoint(tiny_hf_dir), tmp_path / "direct.gguf", mix)
    assert main(["requantize", str(exact), str(tmp_path / "new.gguf"), "--type", mix]) == 0
    assert contents(tmp_path / "new.gguf") == contents(tmp_path / "direct.gguf")


def test_what_keeps_its_type_keeps_its_bytes(exact: Path, tmp_path: Path):
    """And the rest is quantized from what the file decodes to."""
    assert main(["requantize", str(exact), str(tmp_path), "--type", "q8_0", "q4_0"]) == 0
    first, second = tmp_path / "model.Q8_0.gguf", tmp_path / "again.gguf"
    assert main(["requantize", str(first), str(second), "--type", "q4_0"]) == 0
    before, after, direct = (contents(path)[1] for path in (first, second, tmp_path / "model.Q4_0.gguf"))
    entry = read_header(first).tensors[UP]
    assert after[UP] == ("Q4_0", quantize(read_entry(first, entry), MIXES["q4_0"].type).tobytes())
    assert after[UP] != direct[UP]
    assert after["output.weight"][0] != "Q8_0" or after["output.weight"] == before["output.weight"]
    assert after["output_norm.weight"] == before["output_norm.weight"]


def test_bad_input(exact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    nameless = gguf_files.changed(exact, tmp_path / "nameless.gguf", {"llama.block_count": None})
    for arguments, words in {
        (exact, "q9_9"): "quantization 'q9_9': is not known",
        (nameless, "q8_0"): "does not say how many layers",
        (tmp_path / "gone.gguf", "q8_0"): "cannot be read",
    }.items():
        assert main(["requantize", str(arguments[0]), str(tmp_path / "x.gguf"), "--type", arguments[1]]) == EXIT_STATUS
        assert words in capfd.readouterr().err
        assert not (tmp_path / "x.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["q8_0", "q4_0", "q4_k_m", "q2_k"])
def test_it_is_llamacpps(mix: str, smollm2_gguf: Path, unpacked: Callable[[Pinned], Path], tmp_path: Path):
    """SmolLM2's published Q4_1 file, requantized by both."""
    llama = LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS))
    llama.quantize(smollm2_gguf, tmp_path / "theirs.gguf", MIXES[mix].file_type)
    assert main(["requantize", str(smollm2_gguf), str(tmp_path / "ours.gguf"), "--type", mix]) == 0
    assert contents(tmp_path / "ours.gguf") == contents(tmp_path / "theirs.gguf")
