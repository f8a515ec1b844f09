"""PEFT adapters in and out: what peft itself says is right, and what is not implemented is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from converters.hf_load import HFCheckpoint
from converters.load import load_decoder
from converters.open import is_adapter
from converters.peft_io import (
    WEIGHTS,
    Adapter,
    lora_config_of,
    make_adapter,
    rank_of,
    read_adapter,
    scale_of,
    write_adapter,
)
from jaxft import lora
from jaxft.errors import JaxftError
from jaxft.lora import LoraConfig
from jaxft.models.decoder import Decoder

CONFIG = LoraConfig(r=3, lora_alpha=12, lora_dropout=0.25, target_modules=("down_proj", "q_proj"))


def random_adapter(config: LoraConfig = CONFIG, dtype: Any = np.float32) -> Adapter:
    """For two layers of the tiny llama; non-zero A and B."""
    rng = np.random.default_rng(0)
    tensors = {}
    for module, out_features, in_features in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 160)):
        for layer in range(3):
            path = f"model.layers.{layer}.{module}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((config.r, in_features)).astype(dtype)
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((out_features, config.r)).astype(dtype)
    return make_adapter(config, tensors, base_model_name_or_path="owner/base")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(tmp_path: Path, dtype: Any):
    adapter = random_adapter(dtype=dtype)
    out = write_adapter(adapter, tmp_path / "new" / "adapter")
    assert is_adapter(out)
    found = read_adapter(out)
    assert found.config == adapter.config
    assert set(found.tensors) == set(adapter.tensors)
    for name, array in adapter.tensors.items():
        assert found.tensors[name].dtype == array.dtype
        assert found.tensors[name].tobytes() == array.tobytes()
    assert lora_config_of(found) == CONFIG


def test_names_and_metadata_are_pefts(tmp_path: Path):
    out = write_adapter(random_adapter(), tmp_path / "adapter")
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with safe_open(out / WEIGHTS, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in file.keys()  # noqa: SIM118
    text = (out / "adapter_config.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_adapter_outlives_its_files(tmp_path: Path):
    adapter = read_adapter(write_adapter(random_adapter(), tmp_path / "adapter"))
    before = {name: array.tobytes() for name, array in adapter.tensors.items()}
    write_adapter(adapter, tmp_path / "adapter", overwrite=True)
    with (tmp_path / "adapter" / WEIGHTS).open("r+b") as file:
        file.truncate(0)
    assert {name: array.tobytes() for name, array in adapter.tensors.items()} == before


def test_ranks_and_scales_of_single_modules():
    adapter = random_adapter()
    adapter.config.update(
        rank_pattern={r"layers\.1\.self_attn.q_proj": 5, "q_proj": 7}, alpha_pattern={"model.layers.2.mlp.down_proj": 6}
    )
    q, down = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
    assert [rank_of(adapter, q.format(i)) for i in range(3)] == [7, 5, 7]
    assert [rank_of(adapter, down.format(i)) for i in range(3)] == [3, 3, 3]
    assert [scale_of(adapter, down.format(i)) for i in range(3)] == [4.0, 4.0, 2.0]
    adapter.config["use_rslora"] = True
    assert scale_of(adapter, down.format(2)) == 6 / 3**0.5
    with pytest.raises(
        JaxftError, match=r"adapter_config\.json, field rank_pattern: .* can be merged, but not trained"
    ):
        lora_config_of(adapter)


def test_older_files_lack_some_fields(tmp_path: Path):
    out = write_adapter(random_adapter(), tmp_path / "adapter")
    path = out / "adapter_config.json"
    kept = ("peft_type", "r", "lora_alpha", "target_modules")
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in kept}))
    adapter = read_adapter(out)
    assert lora_config_of(adapter) == LoraConfig(3, 12, 0.0, CONFIG.target_modules)
    assert scale_of(adapter, adapter.modules[0]) == 4.0


def test_output_folder(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(JaxftError, match="is not empty"):
        write_adapter(random_adapter(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


FIELDS: dict[str, tuple[Any, str]] = {
    "peft_type": ("IA3", "field peft_type: 'IA3' is not supported"),
    "use_dora": (True, "not supported: use_dora = True"),
    "bias": ("lora_only", "not supported: bias = 'lora_only'"),
    "lora_bias": (True, "lora_bias = True"),
    "modules_to_save": (["lm_head"], r"modules_to_save = \['lm_head'\]"),
    "layers_to_transform": ([0, 1], r"layers_to_transform = \[0, 1\]"),
    "target_parameters": (["mlp.experts"], "target_parameters = "),
    "trainable_token_indices": ([1], "trainable_token_indices = "),
    "layer_replication": ([[0, 1]], "layer_replication = "),
    "fan_in_fan_out": (True, "fan_in_fan_out = True"),
    "init_lora_weights": ("pissa", "init_lora_weights = 'pissa'"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens = "),
    "use_qalora": (True, "use_qalora = True"),
    "task_type": ("SEQ_CLS", "task_type = 'SEQ_CLS'"),
    "invented_in_2030": ({"x": 1}, "invented_in_2030 = {'x': 1}"),
    "r": (0, "rank of r: must be a positive integer, not 0"),
    "rank_pattern": ({"q_proj": "x"}, "rank of q_proj: must be a positive integer, not 'x'"),
    "alpha_pattern": ([], "field alpha_pattern: must be an object"),
    "lora_alpha": (None, "alpha of lora_alpha: must be a number, not None"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_are_not_implemented(field: str, tmp_path: Path):
    value, words = FIELDS[field]
    out = write_adapter(random_adapter(), tmp_path / "adapter")
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(JaxftError, match=words) as caught:
        read_adapter(out)
    assert str(path) in str(caught.value)
    # Nor is such an adapter written.
    with pytest.raises(JaxftError, match=words):
        write_adapter(Adapter({**random_adapter().config, field: value}, random_adapter().tensors), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_unknown_fields_that_say_nothing(value: Any, tmp_path: Path):
    out = write_adapter(random_adapter(), tmp_path / "adapter")
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "invented_in_2030": value}))
    assert read_adapter(out).config["invented_in_2030"] == value


A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
B = A.replace("_A", "_B")


def _tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = {name: array.copy() for name, array in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no B": (lambda f: _tensors(f, lambda t: t.pop(B)), "down_proj.lora_A.weight has no .*down_proj.lora_B.weight"),
    "no A": (lambda f: _tensors(f, lambda t: t.pop(A)), "down_proj.lora_B.weight has no .*down_proj.lora_A.weight"),
    "another rank": (
        lambda f: _tensors(f, lambda t: t.update({A: t[A][:2].copy()})),
        r"down_proj\.lora_A\.weight is \[2, 160\], but its rank should be 3",
    ),
    "a vector": (lambda f: _tensors(f, lambda t: t.update({B: t[B][:, 0].copy()})), r"lora_B\.weight is \[64\]"),
    "DoRA's tensor": (
        lambda f: _tensors(f, lambda t: t.update({"base_model.model.x.lora_magnitude_vector": t[A]})),
        "x.lora_magnitude_vector is not a LoRA matrix",
    ),
    "nothing": (lambda f: _tensors(f, lambda t: t.clear()), "there are none"),
    "cut": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
        r"adapter_model\.safetensors: is truncated or corrupt",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"adapter_model\.safetensors: does not exist"),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), r"adapter_model\.bin: is a pickle"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json: cannot be read"),
    "no folder": (shutil.rmtree, "adapter: does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(case: str, tmp_path: Path):
    change, words = BAD[case]
    out = write_adapter(random_adapter(), tmp_path / "adapter")
    change(out)
    with pytest.raises(JaxftError, match=words):
        read_adapter(out)


def adapted(folder: Path, adapter: Adapter) -> Decoder:
    """The checkpoint in `folder` with `adapter` attached."""
    decoder = load_decoder(HFCheckpoint(folder), dtype=jnp.float32)
    lora.attach(decoder, lora_config_of(adapter), key=jax.random.key(0))
    lora.load_adapter_tensors(decoder, adapter.tensors)
    return decoder


def test_an_adapter_for_another_base_is_refused(make_tiny_hf: Callable[..., Path], tmp_path: Path):
    folder = make_tiny_hf(tmp_path / "hf", with_tokenizer=False, intermediate_size=96, num_hidden_layers=2)
    with pytest.raises(JaxftError) as caught:
        adapted(folder, random_adapter())
    assert "model.layers.0.mlp.down_proj.lora_A.weight is [3, 160], expected [3, 96]" in str(caught.value)
    assert "unexpected model.layers.2.self_attn.q_proj.lora_B.weight" in str(caught.value)


TOKENS = np.random.default_rng(1).integers(0, 300, (2, 17))


def our_logits(folder: Path, adapter: Adapter) -> np.ndarray:
    decoder = adapted(folder, adapter)
    return np.asarray(decoder.logits(decoder(jnp.asarray(TOKENS, jnp.int32))))


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


# peft 0.21.2 still asks transformers 5.23 for an attribute by its old name.
PEFTS_OWN = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.slow
@PEFTS_OWN
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_what_we_write(tiny_hf_dir: Path, tmp_path: Path, use_rslora: bool):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = random_adapter(LoraConfig(3, 2, 0.25, CONFIG.target_modules, use_rslora))
    out = write_adapter(adapter, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_hf_dir, dtype=torch.float32)
    without = torch_logits(base)
    theirs = torch_logits(PeftModel.from_pretrained(base, out).eval())
    assert np.abs(theirs - without).max() > 1
    np.testing.assert_allclose(our_logits(tiny_hf_dir, adapter), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@PEFTS_OWN
def test_we_load_what_peft_writes(tiny_hf_dir: Path, tmp_path: Path):
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_hf_dir, dtype=torch.float32)
    config = PeftConfig(r=4, lora_alpha=8, target_modules=["v_proj", "gate_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(our_logits(tiny_hf_dir, adapter), torch_logits(model), atol=1e-4, rtol=1e-4)
    # What we write says the same in every field, in the same order of the file.
    ours = make_adapter(lora_config_of(adapter), adapter.tensors, base_model_name_or_path=str(tiny_hf_dir))
    write_adapter(ours, tmp_path / "ours")
    stored = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "ours")]
    for fields in stored:
        fields["target_modules"].sort()
    assert stored[0] == stored[1]
    assert list(stored[0]) == list(stored[1])
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "ours")]
    assert {name: array.tobytes() for name, array in files[0].items()} == {n: a.tobytes() for n, a in files[1].items()}
