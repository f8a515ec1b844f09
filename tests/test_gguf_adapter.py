"""llama.cpp's LoRA adapters, out and in: the same adapter after both, what cannot be held is refused, and llama.cpp
itself computes what peft does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_files
from arch_cases import arch_config
from converters.cli import main
from converters.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from converters.gguf_header import read_header
from converters.hf_load import HFCheckpoint
from converters.peft_io import Adapter, make_adapter, read_adapter, scale_of, write_adapter
from jaxft.errors import EXIT_STATUS, JaxftError
from jaxft.fetch import Pinned
from jaxft.lora import LoraConfig
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS
from tiny import write_tiny_hf

SIZES = {"q_proj": (64, 64), "k_proj": (32, 64), "down_proj": (64, 160), "embed_tokens": (300, 64)}


def adapter_of(config: LoraConfig, **more: np.ndarray) -> Adapter:
    """Random A and B for `config.target_modules` in each layer of the tiny llama, or the embedding."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for name in config.target_modules:
        out, inputs = SIZES[name]
        for layer in range(3):
            block = "mlp" if name == "down_proj" else "self_attn"
            module = "model.embed_tokens" if name == "embed_tokens" else f"model.layers.{layer}.{block}.{name}"
            r = config.rank_of(module)
            parts = {".lora_A.weight": (r, inputs), ".lora_B.weight": (out, r)}
            if name == "embed_tokens":
                parts = {".lora_embedding_A": (r, out), ".lora_embedding_B": (inputs, r)}
            for part, shape in parts.items():
                tensors[module + part] = (rng.standard_normal(shape) / np.sqrt(r * shape[1])).astype("f4")
    return make_adapter(config, {**tensors, **more}, base_model_name_or_path="owner/base")


PLAIN = LoraConfig(r=3, lora_alpha=12, target_modules=("q_proj", "k_proj", "down_proj"))
UNEVEN = LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=("q_proj", "down_proj", "embed_tokens"),
    use_rslora=True,
    rank_pattern={"down_proj": 2},
    alpha_pattern={"layers.2.self_attn.q_proj": 3},
)


@pytest.fixture(scope="module")
def base(tiny_hf_dir: Path) -> HFCheckpoint:
    return HFCheckpoint(tiny_hf_dir)


def changes(adapter: Adapter) -> dict[str, np.ndarray]:
    """What it adds to each weight."""
    found = {}
    for module in adapter.modules:
        pair = [n for n in adapter.tensors if n.startswith(f"{module}.lora_")]
        a, b = (adapter.tensors[name] for name in sorted(pair))
        found[module] = scale_of(adapter, module) * (b @ a)
    return found


def test_out_and_in(base: HFCheckpoint, tmp_path: Path):
    adapter = adapter_of(PLAIN)
    path = write_gguf_adapter(adapter, base, tmp_path / "adapter.gguf")
    header = read_header(path)
    assert header.metadata["general.type"] == "adapter"
    assert header.metadata["adapter.lora.alpha"] == 12
    assert header.tensors["blk.2.attn_q.weight.lora_a"].shape == (3, 64)
    b = np.frombuffer(gguf_files.raw_bytes(path, header, "blk.0.attn_k.weight.lora_b"), "f4").reshape(2, 8, 2, 3)
    # llama.cpp rotates neighbours, HF halves: in a head of 16 rows, HF's row 8 comes second.
    expected = adapter.tensors["model.layers.0.self_attn.k_proj.lora_B.weight"].reshape(2, 2, 8, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(b, expected)
    again = read_gguf_adapter(path, base, "owner/base")
    assert again.tensors.keys() == adapter.tensors.keys()
    for name, array in adapter.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array, err_msg=name)
    sets = [{**a.config, "target_modules": set(a.config["target_modules"])} for a in (again, adapter)]
    assert sets[0] == sets[1]


def test_scales_that_are_not_alpha_over_r(base: HFCheckpoint, tmp_path: Path):
    """rsLoRA and patterns go into B; the changes of the weights stay."""
    adapter = adapter_of(UNEVEN)
    again = read_gguf_adapter(write_gguf_adapter(adapter, base, tmp_path / "a.gguf"), base, "x")
    assert again.config["lora_alpha"] == 12  # 6 / sqrt(4) * 4
    found, expected = changes(again), changes(adapter)
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        np.testing.assert_allclose(found[module], change, rtol=1e-5, atol=1e-7, err_msg=module)


BAD: dict[str, tuple[Callable[[], Adapter], str]] = {
    "another base": (
        lambda: adapter_of(LoraConfig(target_modules=("q_proj",)), **{
            "model.layers.7.mlp.up_proj.lora_A.weight": np.ones((16, 64), "f4"),
            "model.layers.7.mlp.up_proj.lora_B.weight": np.ones((160, 16), "f4"),
        }),
        "is not the base of this adapter: it has no model.layers.7.mlp.up_proj.weight",
    ),
    "DoRA": (
        lambda: adapter_of(
            LoraConfig(target_modules=("k_proj",), use_dora=True),
            **{"model.layers.0.self_attn.k_proj.lora_magnitude_vector": np.ones(32, "f4")},
        ),
        "no place for model.layers.0.self_attn.k_proj.lora_magnitude_vector",
    ),
    "a whole norm": (
        lambda: adapter_of(
            LoraConfig(target_modules=("k_proj",), modules_to_save=("norm",)),
            **{"model.norm.weight": np.ones(64, "f4")},
        ),
        "no place for model.norm.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_place(case: str, base: HFCheckpoint, tmp_path: Path):
    adapter, words = BAD[case]
    with pytest.raises(JaxftError, match=words):
        write_gguf_adapter(adapter(), base, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another kind": ({"adapter.type": "x"}, {}, "key adapter.type: is 'x', not 'lora'"),
    "another architecture": ({"general.architecture": "qwen2"}, {}, "is 'qwen2', not 'llama'"),
    "no alpha": ({"adapter.lora.alpha": None}, {}, "key adapter.lora.alpha: must be a finite number, not None"),
    "no partner": ({}, {"blk.0.attn_q.weight.lora_b": None}, r"blk.0.attn_q.weight.lora_b is missing"),
    "rows": ({}, {"blk.0.attn_q.weight.lora_b": np.ones((7, 3), "f4")}, "has 7 rows of B for .*q_proj, which has 64"),
    "a vector": ({}, {"blk.0.attn_q.weight.lora_b": np.ones(64, "f4")}, "lora_b is no matrix"),
    "unknown": ({}, {"x.lora_a": np.ones((3, 64), "f4")}, "x is no tensor of the base"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_bad_files(case: str, base: HFCheckpoint, tmp_path: Path):
    metadata, tensors, words = CHANGED[case]
    path = write_gguf_adapter(adapter_of(PLAIN), base, tmp_path / "adapter.gguf")
    changed = gguf_files.changed(path, tmp_path / "changed.gguf", metadata, tensors)
    with pytest.raises(JaxftError, match=words):
        read_gguf_adapter(changed, base, "x")


def test_the_commands(tiny_hf_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder, back = write_adapter(adapter_of(PLAIN), tmp_path / "peft"), tmp_path / "back"
    path = tmp_path / "adapter.gguf"
    to_gguf = ["to-gguf", str(folder), str(path)]
    assert main([*to_gguf, "--base", str(tiny_hf_dir), "--type", "q8_0"]) == EXIT_STATUS
    assert "is not one of an adapter (f32, f16, bf16)" in capfd.readouterr().err
    assert main([*to_gguf, "--base", str(tiny_hf_dir), "--type", "f16", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["wrote"][0]["note"] == "llama.cpp's adapter, f16"
    assert main(["from-gguf", str(path), str(back)]) == EXIT_STATUS
    assert "its base model is not named" in capfd.readouterr().err
    assert main(["from-gguf", str(path), str(back), "--base", str(tiny_hf_dir)]) == 0
    expected = {name: array.astype("f2").astype("f4") for name, array in adapter_of(PLAIN).tensors.items()}
    for name, array in read_adapter(back).tensors.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert main(["inspect", str(path), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert (shown["format"], shown["config"]["adapter.lora.alpha"]) == ("gguf adapter", 12)
    assert main(["verify", str(tiny_hf_dir), str(path)]) == EXIT_STATUS
    assert "is a LoRA adapter, not a model" in capfd.readouterr().err


def test_linears_that_llama_cpp_multiplies_without_adapters_are_refused(tmp_path: Path) -> None:
    """Those of latent attention: it would load the file and leave them out."""
    base = HFCheckpoint(write_tiny_hf(tmp_path / "hf", arch_config("deepseek_v3", "yarn of one scale, groups")))
    modules = {"kv_b_proj": (72, 10), "o_proj": (40, 40)}
    tensors = {
        f"model.layers.0.self_attn.{name}.lora_{part}.weight": np.ones(shape, "f4")
        for name, (out, inputs) in modules.items()
        for part, shape in (("A", (2, inputs)), ("B", (out, 2)))
    }
    config = LoraConfig(r=2, target_modules=tuple(modules))
    with pytest.raises(
        JaxftError, match=r"no place for model.layers.0.self_attn.kv_b_proj \(not in this architecture\)"
    ):
        write_gguf_adapter(
            make_adapter(config, tensors, base_model_name_or_path="owner/base"), base, tmp_path / "adapter.gguf"
        )
    kept = {name: array for name, array in tensors.items() if "o_proj" in name}
    config = LoraConfig(r=2, target_modules=("o_proj",))
    write_gguf_adapter(
        make_adapter(config, kept, base_model_name_or_path="owner/base"), base, tmp_path / "adapter.gguf"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("config", [PLAIN, UNEVEN], ids=["plain", "uneven"])
def test_llamacpp_computes_what_peft_does(
    config: LoraConfig, tiny_hf_dir: Path, tmp_path: Path, unpacked: Callable[[Pinned], Path]
):
    """In llama.cpp, the base's float32 file with the adapter's; in torch, peft over transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = adapter_of(config)
    model = gguf_files.export(tiny_hf_dir, tmp_path / "model.gguf")
    path = write_gguf_adapter(adapter, HFCheckpoint(tiny_hf_dir), tmp_path / "adapter.gguf")
    ids = [int(token) for token in np.random.default_rng(1).integers(3, 300, 40)]
    with LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS)).open(model) as llama:
        without = llama.logits(ids)
        llama.add_adapter(path)
        found = llama.logits(ids)
    torch_model: Any = AutoModelForCausalLM.from_pretrained(tiny_hf_dir, dtype=torch.float32)
    torch_model = PeftModel.from_pretrained(torch_model, write_adapter(adapter, tmp_path / "peft"))
    with torch.no_grad():
        expected = torch_model(torch.tensor([ids])).logits[0].numpy()
    assert np.sqrt(np.mean((found - expected) ** 2)) <= 1e-5
    assert np.sqrt(np.mean((without - expected) ** 2)) > 1e-2  # the adapter matters
