"""`merge` and `extract-lora`: merged checkpoints in each form, and adapters won back from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from converters import extract_lora
from converters.checkpoint import stream
from converters.cli import main
from converters.hf_export import write_hf
from converters.hf_load import HFCheckpoint
from converters.merge import MergedCheckpoint
from converters.model_card import FORCED_4BIT
from converters.open import open_checkpoint
from converters.peft_io import Adapter, make_adapter, read_adapter, write_adapter
from jaxft.errors import EXIT_STATUS
from jaxft.lora import LoraConfig

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def adapter(base: Path | None, r: int = 3) -> Adapter:
    """Of q_proj [64, 64] in layer 1 and down_proj [64, 160] in layer 0."""
    rng = np.random.default_rng(0)
    tensors = {}
    for module, size in ((Q, 64), (DOWN, 160)):
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((r, size), np.float32)
        tensors[f"{module}.lora_B.weight"] = 0.02 * rng.standard_normal((64, r), np.float32)
    return make_adapter(LoraConfig(r=r, lora_alpha=r), tensors, base_model_name_or_path=str(base) if base else None)


@pytest.fixture
def paths(tiny_hf_dir: Path, tmp_path: Path) -> dict[str, Path]:
    write_adapter(adapter(tiny_hf_dir), tmp_path / "adapter")
    return {"base": tiny_hf_dir, "adapter": tmp_path / "adapter", "out": tmp_path / "out"}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def merged_by_hand(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """In float64."""
    expected = {name: array.astype(np.float64) for name, array in stream(HFCheckpoint(paths["base"]))}
    tensors = read_adapter(paths["adapter"]).tensors
    for module in (Q, DOWN):
        a, b = (tensors[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        expected[f"{module}.weight"] += b @ a
    return expected


@pytest.mark.parametrize(("method", "dtype"), [("merged", np.float32), ("merged_16bit", ml_dtypes.bfloat16)])
def test_merge(method: str, dtype: type, paths: dict[str, Path], capfd: pytest.CaptureFixture[str]):
    """Into what the adapter names as its base, in float32, and then one rounding."""
    assert run("merge", paths["adapter"], paths["out"], "--save-method", method, "--json") == 0
    output = capfd.readouterr()
    assert json.loads(output.out)["base"] == str(paths["base"])
    assert f"merging into the weights of {paths['base']}" in output.err
    found = HFCheckpoint(paths["out"])
    for name, exact in merged_by_hand(paths).items():
        assert found.tensors[name].dtype == dtype
        np.testing.assert_allclose(found.read(name).astype(np.float64), exact, rtol=float(ml_dtypes.finfo(dtype).eps),
                                   atol=1e-6)  # fmt: skip
    assert found.tokenizer() is not None
    card = (paths["out"] / "README.md").read_text()
    assert "LoRA of rank 3, lora_alpha 3, on down_proj, gate_proj, " in card
    assert "4 bits" not in card


def test_merge_from_a_quantized_base_says_so(paths: dict[str, Path], capfd: pytest.CaptureFixture[str]):
    """And takes the original where it is named."""
    quantized = paths["out"].with_name("bnb")
    assert run("to-bnb", paths["base"], quantized) == 0
    write_adapter(adapter(quantized), paths["adapter"], overwrite=True)
    assert run("merge", paths["adapter"], paths["out"], "--save-method", "merged") == 0
    assert "is quantized (bitsandbytes NF4), and the adapter is merged into its decoded" in capfd.readouterr().err
    decoded = open_checkpoint(quantized).read(f"{Q}.weight").astype(np.float64)
    expected = merged_by_hand(paths)[f"{Q}.weight"]
    change = expected - HFCheckpoint(paths["base"]).read(f"{Q}.weight")
    np.testing.assert_allclose(HFCheckpoint(paths["out"]).read(f"{Q}.weight"), decoded + change, atol=1e-6)
    arguments = ("merge", paths["adapter"], paths["out"], "--base", paths["base"], "--save-method", "merged")
    assert run(*arguments, "--overwrite") == 0
    assert "is quantized" not in capfd.readouterr().err
    np.testing.assert_allclose(HFCheckpoint(paths["out"]).read(f"{Q}.weight"), expected, atol=1e-6)


def test_forced_4_bit_merge_states_its_loss(paths: dict[str, Path], capfd: pytest.CaptureFixture[str]):
    assert run("merge", paths["adapter"], paths["out"], "--save-method", "merged_4bit_forced", "--json") == 0
    output = capfd.readouterr()
    loss = json.loads(output.out)["loss"]
    stored, expected = open_checkpoint(paths["out"]), merged_by_hand(paths)
    names = [f"{module}.weight" for module in (Q, DOWN)]
    error = sum(np.square(stored.read(name) - expected[name]).sum() for name in names)
    base = HFCheckpoint(paths["base"])
    change = sum(np.square(expected[name] - base.read(name)).sum() for name in names)
    weights = sum(np.square(expected[name]).sum() for name in names)
    assert loss["of_weights"] == pytest.approx(np.sqrt(error / weights), rel=1e-3)
    assert loss["of_change"] == pytest.approx(np.sqrt(error / change), rel=1e-3)
    assert 0.05 < loss["of_weights"] < 0.2
    assert f"{loss['of_weights']:.1%} of their size" in output.err
    card = (paths["out"] / "README.md").read_text()
    assert FORCED_4BIT in card
    assert f"Measured: 4 bits round the merged weights by {loss['of_weights']:.1%} of their size" in card


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model_name_or_path": None}, "field base_model_name_or_path: is missing"),
        ({"base_model_name_or_path": "./gone"}, "gone: does not exist"),
        ({}, "is not the base of this adapter"),
    ],
)
def test_merge_refuses(change: dict[str, Any], words: str, paths: dict[str, Path], make_tiny_hf: Callable[..., Path],
                       tmp_path: Path, capfd: pytest.CaptureFixture[str]):  # fmt: skip
    other = make_tiny_hf(tmp_path / "other", num_hidden_layers=1, head_dim=8)
    plain = adapter(other)
    write_adapter(Adapter({**plain.config, **change}, plain.tensors), paths["adapter"], overwrite=True)
    assert run("merge", paths["adapter"], paths["out"]) == EXIT_STATUS
    assert words in capfd.readouterr().err
    assert not paths["out"].exists()


@pytest.mark.parametrize("whole", [True, False], ids=["exact svd", "randomized svd"])
def test_extract_lora_gives_back_an_adapter(
    whole: bool, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    if not whole:
        monkeypatch.setattr(extract_lora, "_WHOLE", 0)
    assert run("merge", paths["adapter"], paths["out"], "--save-method", "merged") == 0
    capfd.readouterr()
    extracted = paths["out"].with_name("extracted")
    assert run("extract-lora", paths["base"], paths["out"], extracted, "--r", 3, "--json") == 0
    assert min(json.loads(capfd.readouterr().out)["kept"].values()) > 1 - 1e-6
    found = read_adapter(extracted)
    assert sorted(found.modules) == sorted([Q, DOWN])
    merged = MergedCheckpoint(HFCheckpoint(paths["base"]), found)
    for name, exact in merged_by_hand(paths).items():
        np.testing.assert_allclose(merged.read(name), exact, atol=2e-6)


def test_a_lower_rank_keeps_the_largest_part(paths: dict[str, Path], capfd: pytest.CaptureFixture[str]):
    """By Eckart and Young, exactly the first singular values' share; a rank beyond the matrix's is padded."""
    assert run("merge", paths["adapter"], paths["out"], "--save-method", "merged") == 0
    values = np.linalg.svd(merged_by_hand(paths)[f"{Q}.weight"] - HFCheckpoint(paths["base"]).read(f"{Q}.weight"))[1]
    for r, expected in ((1, values[0] ** 2 / (values**2).sum()), (70, 1.0)):
        capfd.readouterr()
        assert (
            run("extract-lora", paths["base"], paths["out"], paths["out"].with_name(f"r{r}"), "--r", r, "--json") == 0
        )
        assert json.loads(capfd.readouterr().out)["kept"][Q] == pytest.approx(expected, rel=1e-4)
        assert read_adapter(paths["out"].with_name(f"r{r}")).tensors[f"{Q}.lora_A.weight"].shape == (r, 64)


class _WithChange(MergedCheckpoint):
    """Norms differ, too."""

    def read(self, name: str) -> np.ndarray:
        return super().read(name) + np.float32("layernorm" in name)


def test_what_an_adapter_cannot_hold_is_listed(paths: dict[str, Path], capfd: pytest.CaptureFixture[str]):
    base = HFCheckpoint(paths["base"])
    write_hf(_WithChange(base, read_adapter(paths["adapter"])), paths["out"])
    assert run("extract-lora", paths["base"], paths["out"], paths["out"].with_name("x")) == 0
    assert "cannot hold what changed in model.layers.0.input_layernorm.weight" in capfd.readouterr().err
    for arguments, words in {
        (paths["base"], paths["base"]): "there is no difference to extract",
        (paths["base"], paths["out"], "--r", 0): "r: the rank must be at least 1",
    }.items():
        assert run("extract-lora", *arguments[:2], paths["out"].with_name("y"), *arguments[2:]) == EXIT_STATUS
        assert words in capfd.readouterr().err
