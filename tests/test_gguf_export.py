"""GGUF out: exact where the type holds the source, q8_0 by gguf's reference, and nothing half-written."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import gguf_files
from arch_cases import arch_config, smallest_in_gguf
from converters import gguf_export
from converters.archs import ARCHS
from converters.archs.base import GGUFArch
from converters.archs.common import gguf_rows
from converters.archs.gguf_keys import Key
from converters.checkpoint import TensorInfo, stream
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from converters.gguf_quants import quantize
from converters.hf_load import HFCheckpoint
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig, MLAConfig, MoEConfig
from tiny import write_tiny_hf


class InMemory:
    """A checkpoint whose tensors are overwritten by others, as a trained model's are."""

    def __init__(self, base: HFCheckpoint, tensors: dict[str, np.ndarray], **config: Any) -> None:
        self._base, self._tensors = base, tensors
        self.where = base.where
        self.config = {**base.config, **config}
        infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
        self.tensors = {**base.tensors, **infos}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name] if name in self._tensors else self._base.read(name)

    def tokenizer(self):
        return self._base.tokenizer()

    def sidecars(self) -> dict[str, bytes]:
        return {}


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16"), ("bfloat16", "f32"), ("float16", "f32")],
)
def test_lossless(dtype: str, quantization: str, make_tiny_hf: Any, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "hf", dtype)
    source = HFCheckpoint(folder)
    written = GGUFCheckpoint(gguf_files.export(folder, tmp_path / "model.gguf", quantization))
    for name, array in stream(written):
        np.testing.assert_array_equal(array.astype(np.float32), source.read(name).astype(np.float32), err_msg=name)


def test_narrowing_rounds_to_nearest(tiny_hf_dir: Path, tmp_path: Path) -> None:
    source = HFCheckpoint(tiny_hf_dir)
    for quantization, dtype in (("bf16", "bfloat16"), ("f16", "float16")):
        written = GGUFCheckpoint(gguf_files.export(tiny_hf_dir, tmp_path / quantization, quantization))
        name = "model.layers.1.mlp.up_proj.weight"
        assert written.tensors[name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(written.read(name), source.read(name).astype(dtype))


def test_q8_0_is_ggufs_reference(make_tiny_hf: Any, tmp_path: Path) -> None:
    """Rows of 160 and 64 are quantized; those of 72 are no whole number of blocks of 32 and become float16."""
    folder = make_tiny_hf(tmp_path / "hf", intermediate_size=72)
    source, path = HFCheckpoint(folder), gguf_files.export(folder, tmp_path / "model.gguf", "q8_0")
    header = read_header(path)
    up = gguf.quants.quantize(source.read("model.layers.2.mlp.up_proj.weight"), GGMLQuantizationType.Q8_0)
    assert gguf_files.raw_bytes(path, header, "blk.2.ffn_up.weight") == up.tobytes()
    down = source.read("model.layers.2.mlp.down_proj.weight").astype(np.float16)
    assert gguf_files.raw_bytes(path, header, "blk.2.ffn_down.weight") == down.tobytes()
    types = {name.split(".")[-2]: entry.type.name for name, entry in header.tensors.items()}
    assert types == {
        **dict.fromkeys(("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), "Q8_0"),
        **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), "F32"),
        "ffn_down": "F16",
        "output": "Q8_0",
    }


def test_k_quants(make_tiny_hf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mix's types, each tensor's bytes by the quantizer of its type, and a warning where rows are too short."""
    folder = make_tiny_hf(tmp_path / "hf", "bfloat16", hidden_size=256, num_attention_heads=16)
    path = gguf_files.export(folder, tmp_path / "model.gguf", "q4_k_m")
    assert "rows that are no whole blocks of Q4_K are stored as Q5_0 instead (2 matrices)" in capsys.readouterr().err
    header, source = read_header(path), HFCheckpoint(folder)
    assert header.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    expected = {"ffn_gate": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q8_0", "attn_output": "Q4_K"}
    assert {part: header.tensors[f"blk.2.{part}.weight"].type.name for part in expected} == expected
    for part, kind in (("gate", "Q4_K"), ("down", "Q8_0")):
        stored = gguf_files.raw_bytes(path, header, f"blk.2.ffn_{part}.weight")
        array = source.read(f"model.layers.2.mlp.{part}_proj.weight")
        assert stored == quantize(array, GGMLQuantizationType[kind]).tobytes()


def test_mxfp4_without_experts(tiny_hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = read_header(gguf_files.export(tiny_hf_dir, tmp_path / "model.gguf", "mxfp4"))
    assert {entry.type.name for entry in header.tensors.values()} == {"Q8_0", "F32"}
    assert "this model has none, so its matrices are stored as Q8_0" in capsys.readouterr().err


def test_q_and_k_rows_are_interleaved(tiny_hf_dir: Path, tmp_path: Path) -> None:
    """llama.cpp rotates neighbours: HF's rows i and i + H/2 of a head come one after the other."""
    path = gguf_files.export(tiny_hf_dir, tmp_path / "model.gguf")
    stored = gguf_files.raw_bytes(path, read_header(path), "blk.0.attn_k.weight")
    head = np.frombuffer(stored, np.float32).reshape(2, 16, 64)[1]
    source = HFCheckpoint(tiny_hf_dir).read("model.layers.0.self_attn.k_proj.weight").reshape(2, 16, 64)[1]
    np.testing.assert_array_equal(head[::2], source[:8])
    np.testing.assert_array_equal(head[1::2], source[8:])


def test_metadata(make_tiny_hf: Any, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "Tiny-Llama-hf", "bfloat16")
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Tiny\n"
    (folder / "README.md").write_text(card)
    metadata = read_header(gguf_files.export(folder, tmp_path / "model.gguf", "bf16")).metadata
    assert {key: value for key, value in metadata.items() if not key.startswith("tokenizer.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Llama Hf",
        "general.size_label": "168K",
        "general.license": "apache-2.0",
        "general.languages": ["en"],
        "llama.block_count": 3,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 300,
        "llama.rope.dimension_count": 16,
        "general.file_type": 32,
        "general.quantization_version": 2,
    }


def test_without_tokenizer(make_tiny_hf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_hf(tmp_path / "hf", with_tokenizer=False)
    assert GGUFCheckpoint(gguf_files.export(folder, tmp_path / "model.gguf")).tokenizer() is None
    assert "has no tokenizer" in capsys.readouterr().err


def refuse(checkpoint: Any, path: Path, quantization: str, message: str) -> None:
    """Writing fails with `message`, and the folder looks as before."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(JaxftError, match=message):
        write_gguf(checkpoint, path, quantization)
    assert before == (sorted(path.parent.iterdir()) if path.parent.is_dir() else None)


def test_unknown_quantization_comes_first(tiny_hf_dir: Path, tmp_path: Path) -> None:
    """Before the checkpoint is looked at, which would be refused too."""
    checkpoint = InMemory(HFCheckpoint(tiny_hf_dir), {}, model_type="mamba")
    for name in ("q9_9", "F32", ""):
        refuse(checkpoint, tmp_path / "model.gguf", name, r"is not known \(known: f32, f16, bf16, q8_0, q4_0,")


def test_existing_file(tiny_hf_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("precious")
    refuse(HFCheckpoint(tiny_hf_dir), path, "f32", "exists already")
    assert path.read_text() == "precious"
    write_gguf(HFCheckpoint(tiny_hf_dir), path, "f32", overwrite=True)
    assert len(GGUFCheckpoint(path).tensors) == 30
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_folder(tiny_hf_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse(HFCheckpoint(tiny_hf_dir), tmp_path / "file" / "model.gguf", "f32", "be written")


def test_full_disk(tiny_hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "write_data", full)
    refuse(HFCheckpoint(tiny_hf_dir), tmp_path / "model.gguf", "f32", "No space left on device")


def test_several_types_take_one_pass(tiny_hf_dir: Path, tmp_path: Path) -> None:
    """Each tensor is read once, and the files are those that a pass of its own gives each type."""
    source, read = HFCheckpoint(tiny_hf_dir), Counter[str]()

    class Counting(InMemory):
        def read(self, name: str) -> np.ndarray:
            read[name] += 1
            return super().read(name)

    targets = {name: tmp_path / f"{name}.gguf" for name in ("f32", "q8_0", "q4_0")}
    gguf_export.write_ggufs(Counting(source, {}), targets)
    assert read == Counter(list(source.tensors))
    for name, path in targets.items():
        assert path.read_bytes() == write_gguf(source, tmp_path / "alone.gguf", name, overwrite=True).read_bytes()


BAD_VALUES = {"nan": (np.nan, "q8_0"), "infinite": (np.inf, "q8_0"), "too_large": (7e4, "f16"), "scale": (9e6, "q8_0")}


@pytest.mark.parametrize(("value", "quantization"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_the_type_cannot_hold(value: float, quantization: str, tiny_hf_dir: Path, tmp_path: Path) -> None:
    """The last tensor has one: what was written before it goes too."""
    source = HFCheckpoint(tiny_hf_dir)
    name = list(source.tensors)[-2]
    array = np.array(source.read(name))
    array.flat[5] = value
    message = rf"tensor {name}: has values that {quantization.upper()} cannot hold"
    refuse(InMemory(source, {name: array}), tmp_path / "model.gguf", quantization, message)
    write_gguf(InMemory(source, {name: array}), tmp_path / "f32.gguf", "f32")


INEXPRESSIBLE = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act: this GGUF architecture cannot say 'gelu'"),
    "partial": ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "model_type": ({"model_type": "mamba"}, "'mamba' is not supported"),
    "more_layers": ({"num_hidden_layers": 4}, r"model.layers.3.mlp.down_proj.weight is missing"),
    "fewer_layers": ({"num_hidden_layers": 2}, r"model.layers.2.mlp.down_proj.weight is not expected"),
    "vocabulary": ({"vocab_size": 301}, r"embed_tokens.weight has shape \[300, 64\] instead of \[301, 64\]"),
}


@pytest.mark.parametrize(("config", "message"), INEXPRESSIBLE.values(), ids=INEXPRESSIBLE)
def test_refused_config(config: dict[str, Any], message: str, tiny_hf_dir: Path, tmp_path: Path) -> None:
    refuse(InMemory(HFCheckpoint(tiny_hf_dir), {}, **config), tmp_path / "model.gguf", "f32", message)


def test_broken_model_card(make_tiny_hf: Any, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "hf")
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    refuse(HFCheckpoint(folder), tmp_path / "model.gguf", "f32", "YAML front matter cannot be read")


def test_every_architecture_is_ggufs() -> None:
    """The registry only uses names that gguf knows."""
    assert {spec.gguf.name for spec in ARCHS.values() if spec.gguf} <= set(gguf.MODEL_ARCH_NAMES.values())


def unknown_fields(arch: GGUFArch) -> set[str]:
    """What the rows or the graph are about that no config of a decoder has."""
    known = {field.name for part in (DecoderConfig, MoEConfig, MLAConfig) for field in dataclasses.fields(part)}
    return {*arch.graph, *(name for row in arch.rows for name in row.says)} - known


def test_every_row_is_about_the_decoder() -> None:
    for spec in ARCHS.values():
        assert spec.gguf is None or unknown_fields(spec.gguf) == set(), spec.model_type
    rows = gguf_rows(Key("logit_scale", "logits_scaling"), Key("attention.scale", "scale", "attention_scale"))
    assert unknown_fields(GGUFArch("x", rows, graph={"qk_nrom": "head"})) == {"logits_scaling", "qk_nrom"}


def test_whole_numbers_of_real_fields_are_real(tmp_path: Path) -> None:
    """JSON may say 1 where llama.cpp reads a float32."""
    config = {**arch_config("cohere", smallest_in_gguf("cohere")), "logit_scale": 1}
    path = write_gguf(HFCheckpoint(write_tiny_hf(tmp_path / "hf", config)), tmp_path / "model.gguf", "f32")
    assert isinstance(read_header(path).metadata["command-r.logit_scale"], float)
    assert GGUFCheckpoint(path).config["logit_scale"] == 1.0


def test_a_stored_tied_head_and_buffers_are_left_out(make_tiny_hf: Any, tmp_path: Path) -> None:
    base = HFCheckpoint(make_tiny_hf(tmp_path / "hf", tie_word_embeddings=True))
    extra = {
        "lm_head.weight": base.read("model.embed_tokens.weight"),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    path = write_gguf(InMemory(base, extra), tmp_path / "model.gguf", "f32")
    assert set(GGUFCheckpoint(path).tensors) == set(base.tensors)
    extra["lm_head.weight"] = extra["lm_head.weight"] + 1
    with pytest.raises(JaxftError, match=r"lm_head.weight: differs from model.embed_tokens.weight"):
        write_gguf(InMemory(base, extra), tmp_path / "other.gguf", "f32")
    assert not (tmp_path / "other.gguf").exists()
