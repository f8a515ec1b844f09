"""`inspect --hashes`, `diff` and `verify`: what they say of equal, rounded, damaged and unlike checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.cli import main
from converters.diff import compare_arrays
from converters.hf_load import WEIGHTS, HFCheckpoint
from converters.load import load_decoder
from converters.peft_io import make_adapter, write_adapter
from converters.streamed import StreamedDecoder
from jaxft.errors import EXIT_STATUS
from jaxft.lora import LoraConfig

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def result(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """The exit status, and the JSON object on standard output."""
    capfd.readouterr()
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capfd.readouterr().out)


@pytest.fixture(scope="module")
def folder(tiny_hf_dir: Path) -> Path:
    return tiny_hf_dir


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`changed(name=array or None)`: a copy of the checkpoint with other tensors."""

    def change(**tensors: np.ndarray | None) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "changed"))
        arrays = {name: array for name, array in {**load_file(copy / WEIGHTS), **tensors}.items() if array is not None}
        save_file(arrays, copy / WEIGHTS, {"format": "pt"})
        return copy

    return change


@pytest.fixture(scope="module")
def formats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint in every format."""
    out = tmp_path_factory.mktemp("formats")
    paths = {"jax": out / "jax", "f32": out / "f32.gguf", "q8_0": out / "q8_0.gguf", "bnb": out / "bnb"}
    assert main(["hf-to-jax", str(folder), str(paths["jax"])]) == 0
    assert main(["to-bnb", str(folder), str(paths["bnb"])]) == 0
    for kind in ("f32", "q8_0"):
        assert main(["to-gguf", str(folder), str(paths[kind]), "--type", kind]) == 0
    return paths


def test_hashes(folder: Path, formats: dict[str, Path], capfd: pytest.CaptureFixture[str]):
    """Of the stored bytes: the same in safetensors and Orbax; one changed bit changes one."""
    hashes = {}
    for name, path in {"hf": folder, **formats}.items():
        status, found = result(capfd, "inspect", path, "--hashes")
        assert status == 0
        hashes[name] = {tensor["name"]: tensor["sha256"] for tensor in found["tensors"]}
    assert hashes["hf"] == hashes["jax"]
    expected = {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in load_file(folder / WEIGHTS).items()}
    assert hashes["hf"] == expected
    assert hashes["f32"]["output_norm.weight"] == expected[NORM]
    assert hashes["q8_0"]["blk.1.ffn_up.weight"] != hashes["f32"]["blk.1.ffn_up.weight"]
    assert hashes["bnb"][UP] != expected[UP]
    assert "sha256" not in result(capfd, "inspect", folder)[1]["tensors"][0]


def test_bitsandbytes_weights_are_counted_as_they_are_stored(
    formats: dict[str, Path], capfd: pytest.CaptureFixture[str]
):
    found = result(capfd, "inspect", formats["bnb"])[1]
    up = next(tensor for tensor in found["tensors"] if tensor["name"] == UP)
    assert up["dtype"] == "NF4"
    # Half a byte a value, a byte a block of 64, and the maps.
    assert 160 * 64 / 2 + 160 < up["bytes"] < 160 * 64 / 2 + 160 + 1200
    assert sum(tensor["bytes"] for tensor in found["tensors"]) <= found["bytes_on_disk"]


@pytest.mark.parametrize("kind", ["jax", "f32"])
def test_lossless_formats_do_not_differ(
    kind: str, folder: Path, formats: dict[str, Path], capfd: pytest.CaptureFixture[str]
):
    """GGUF derives its config, so only fields that say nothing of the forward pass may differ there."""
    status, found = result(capfd, "diff", folder, formats[kind])
    assert {tensor["status"] for tensor in found["tensors"]} == {"equal"}
    assert found["largest"] == 0
    if kind == "jax":
        assert (status, found["equal"], found["config"]) == (0, True, {})
    assert main(["diff", str(folder), str(formats[kind])]) == status
    assert f"{len(found['tensors'])} of {len(found['tensors'])} tensors are equal" in capfd.readouterr().err


def test_what_differs_is_named(folder: Path, changed: Callable[..., Path], capfd: pytest.CaptureFixture[str]):
    up, norm = np.array(HFCheckpoint(folder).read(UP)), np.array(HFCheckpoint(folder).read(NORM))
    up[3, 5] += 0.5
    other = changed(
        **{UP: up, NORM: norm[:32], "lm_head.weight": None, "extra": norm,
           "model.embed_tokens.weight": HFCheckpoint(folder).read("model.embed_tokens.weight").astype(np.float64)}
    )  # fmt: skip
    status, found = result(capfd, "diff", folder, other)
    assert status == 1
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert {name: t["status"] for name, t in tensors.items() if t["status"] != "equal"} == {
        UP: "differs",
        NORM: "shape",
        "lm_head.weight": "only in a",
        "extra": "only in b",
    }
    assert tensors[UP]["largest"] == pytest.approx(0.5, abs=1e-6)
    assert tensors["model.embed_tokens.weight"]["b"] == "float64 [300, 64]"  # the same values in another dtype
    assert main(["diff", str(folder), str(other)]) == 1
    assert "27 of 31 tensors are equal; largest difference 0.5" in capfd.readouterr().err


def test_arrays_in_pieces(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5, 7)).astype(np.float32)
    b = a.astype(ml_dtypes.bfloat16)
    difference = a.astype(np.float64) - b.astype(np.float64)
    for chunk in (4, 1 << 20):
        monkeypatch.setattr("converters.diff._CHUNK", chunk)
        equal, largest, relative = compare_arrays(a, b)
        assert not equal
        assert largest == np.abs(difference).max()
        assert relative == pytest.approx(np.sqrt(np.mean(difference**2) / np.mean(a.astype(np.float64) ** 2)))
    a[1, 1] = np.nan
    assert compare_arrays(a, a.astype(np.float64))[0]
    damaged = np.where(np.isnan(a), np.float32(0), a)
    equal, largest, _ = compare_arrays(a, damaged)
    assert not equal
    assert np.isnan(largest)


def test_adapters_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for name, value in (("a", 1.0), ("b", 1.25)):
        tensors = {"m.lora_A.weight": np.ones((2, 3), np.float32), "m.lora_B.weight": np.full((3, 2), value, "f4")}
        write_adapter(make_adapter(LoraConfig(r=2), tensors, base_model_name_or_path="x"), tmp_path / name)
    status, found = result(capfd, "diff", tmp_path / "a", tmp_path / "b")
    assert (status, found["largest"]) == (1, 0.25)


def test_the_streamed_decoder_is_the_decoder(folder: Path):
    """Layer by layer: the decoder's own logits, up to the order of sums in a program of its own."""
    checkpoint = HFCheckpoint(folder)
    tokens = np.random.default_rng(1).integers(0, 300, (3, 20), dtype=np.int32)
    streamed = StreamedDecoder(checkpoint)
    found = np.concatenate(list(streamed.logits(streamed.hidden(tokens, batch_size=2)))).reshape(3, 20, 300)
    decoder = load_decoder(checkpoint, dtype=jnp.float32)
    np.testing.assert_allclose(found, decoder.logits(decoder(jnp.asarray(tokens))), rtol=1e-5, atol=2e-5)


def test_verify(folder: Path, formats: dict[str, Path], changed: Callable[..., Path], tmp_path: Path,
                capfd: pytest.CaptureFixture[str]):  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("What is 2 plus 3? The answer is the sum of the numbers.")
    status, exact = result(capfd, "verify", folder, formats["jax"], "--text", text)
    assert status == 0
    assert (exact["identical"], exact["largest"], exact["same_top"], exact["same_tokenizer"]) == (True, 0, 1, True)
    status, rounded = result(capfd, "verify", folder, formats["q8_0"], "--length", 32)
    assert status == 0
    assert 0 < rounded["kl"] < 0.01 < rounded["largest"]
    assert rounded["max_kl"] == 0.5
    # Negative control: a layer that was lost, and a bound that rounding does not meet.
    lost = changed(**{UP: np.zeros((160, 64), np.float32)})
    status, damaged = result(capfd, "verify", folder, lost, "--length", 32)
    assert status == 1
    assert damaged["kl"] > 0.01
    assert main(["verify", str(folder), str(formats["q8_0"]), "--length", "32", "--max-kl", "1e-9"]) == 1
    assert "failed" in capfd.readouterr().err


def test_verify_refuses(folder: Path, make_tiny_hf: Callable[..., Path], tmp_path: Path,
                        capfd: pytest.CaptureFixture[str]):  # fmt: skip
    bare = make_tiny_hf(tmp_path / "bare", with_tokenizer=False, vocab_size=299)
    (tmp_path / "text").write_text("a")
    (tmp_path / "empty").write_text(" ")
    for arguments, words in {
        (folder, bare): "has a vocabulary of 299 tokens",
        (bare, bare, "--text", tmp_path / "text"): "has no tokenizer for the text",
        (folder, folder, "--text", tmp_path / "empty"): "holds no text",
        (folder, folder, "--text", tmp_path / "gone"): "cannot be read",
        (folder, folder, "--length", 1): "length: must be at least 2",
    }.items():
        assert main(["verify", *map(str, arguments)]) == EXIT_STATUS
        assert words in capfd.readouterr().err
