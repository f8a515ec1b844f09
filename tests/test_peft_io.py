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

import lora_cases
from converters.hf_export import write_hf
from converters.hf_files import ADAPTER_CONFIG, read_json, write_json
from converters.hf_load import HFCheckpoint
from converters.load import load_decoder
from converters.merge import MergedCheckpoint
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
from models import decoder_of
from tiny import random_tensors

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
    assert lora_config_of(adapter).rank_of(q.format(1)) == 5


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
    "bias": ("some", "field bias: must be one of none, all, lora_only, not 'some'"),
    "lora_bias": (True, "lora_bias = True"),
    "target_parameters": ("mlp.experts", "field target_parameters: must be a list of names, not 'mlp.experts'"),
    "trainable_token_indices": ([1], "trainable_token_indices = "),
    "layer_replication": ([[0, 1]], "layer_replication = "),
    "fan_in_fan_out": (True, "fan_in_fan_out = True"),
    "init_lora_weights": ("pissa", "init_lora_weights = 'pissa', trained against a changed base"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens = "),
    "use_qalora": (True, "use_qalora = True"),
    "task_type": ("SEQ_CLS", "task_type = 'SEQ_CLS'"),
    "invented_in_2030": ({"x": 1}, "invented_in_2030 = {'x': 1}"),
    "r": (0, "rank of r: must be a positive integer, not 0"),
    "rank_pattern": ({"q_proj": "x"}, "rank of q_proj: must be a positive integer, not 'x'"),
    "alpha_pattern": ([], "field alpha_pattern: must be an object"),
    "lora_alpha": (None, "alpha of lora_alpha: must be a finite number, not None"),
    "modules_to_save": (2, "field modules_to_save: must be a list of names, not 2"),
    "exclude_modules": ("(", "is not a regular expression"),
    "layers_to_transform": (0.5, "field layers_to_transform: must be a number or a list of numbers, not 0.5"),
    "use_rslora": ("yes", "field use_rslora: must be true or false, not 'yes'"),
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
        "x.lora_magnitude_vector is not part of a LoRA adapter without use_dora",
    ),
    "no magnitudes": (
        lambda f: write_json(f / ADAPTER_CONFIG, {**read_json(f / ADAPTER_CONFIG), "use_dora": True}),
        "model.layers.0.mlp.down_proj has no lora_magnitude_vector",
    ),
    "a weight of the base": (
        lambda f: _tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": t[A]})),
        "lm_head.weight is not a LoRA matrix, and neither modules_to_save nor bias means it",
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


def other_kinds(case: str) -> Adapter:
    """An adapter of a case of lora_cases, as ours writes it, with random tensors where `targets` says."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in lora_cases.settings(case).items()}
    config, decoder = LoraConfig(**settings), decoder_of(lora_cases.CONFIG)
    lora.attach(decoder, config, key=jax.random.key(0))
    tensors = {name: lora_cases.value(name, array) for name, array in lora.adapter_tensors(decoder).items()}
    return make_adapter(config, tensors, base_model_name_or_path="base")


STORED = {
    "dora": {"model.layers.0.self_attn.q_proj.lora_magnitude_vector"},
    "rslora, patterns, whole modules": {
        "model.layers.0.self_attn.q_proj.base_layer.bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    },
    "embedding, head": {
        "model.embed_tokens.lora_embedding_A",
        "lm_head.lora_A.weight",
        "lm_head.lora_magnitude_vector",
    },
}


@pytest.mark.parametrize("case", STORED)
def test_other_kinds_round_trip(case: str, tmp_path: Path):
    """peft's names in the file, ours in memory, the same settings."""
    adapter = other_kinds(case)
    out = write_adapter(adapter, tmp_path / "adapter")
    assert {f"base_model.model.{name}" for name in STORED[case]} <= load_file(out / WEIGHTS).keys()
    found = read_adapter(out)
    assert found.config == adapter.config
    assert {name: array.tobytes() for name, array in found.tensors.items()} == {
        name: array.tobytes() for name, array in adapter.tensors.items()
    }
    decoder = decoder_of(lora_cases.CONFIG)
    lora.attach(decoder, lora_config_of(found), key=jax.random.key(0))
    lora.load_adapter_tensors(decoder, found.tensors)
    for name, array in lora.adapter_tensors(decoder).items():
        np.testing.assert_array_equal(array, adapter.tensors[name])


@pytest.mark.slow
@PEFTS_OWN
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_what_we_write(tiny_hf_dir: Path, tmp_path: Path, use_rslora: bool):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # With twice the scale one token's attention is so sharp that half an ulp in each weight moves its logits by 4e-5.
    adapter = random_adapter(LoraConfig(3, 1, 0.25, CONFIG.target_modules, use_rslora))
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


KINDS = [case for case in lora_cases.CASES if case not in lora_cases.STARTS and "dropout" not in case]


def their_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def kinds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of lora_cases as a checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("kinds") / "hf", lora_cases.CONFIG)


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config), folder / "model.safetensors", {"format": "pt"})
    return folder


def kinds_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(lora_cases.TOKENS)).logits.numpy()


@pytest.mark.slow
@PEFTS_OWN
@pytest.mark.parametrize("case", KINDS)
def test_peft_loads_and_merges_every_kind_that_we_write(case: str, kinds_dir: Path, tmp_path: Path):
    """Ours, peft's of our file, peft's merged, and our merged checkpoint read by transformers: one function."""
    from peft import PeftModel

    adapter = other_kinds(case)
    out = write_adapter(adapter, tmp_path / "adapter")
    model = PeftModel.from_pretrained(their_model(kinds_dir), out).eval()
    theirs = kinds_logits(model)
    decoder = adapted(kinds_dir, adapter)
    ours = np.asarray(decoder.logits(decoder(jnp.asarray(lora_cases.TOKENS, jnp.int32))))
    merged = write_hf(MergedCheckpoint(HFCheckpoint(kinds_dir), adapter), tmp_path / "merged")
    assert np.abs(theirs - kinds_logits(their_model(kinds_dir))).max() > 0.1
    for logits in (ours, kinds_logits(their_model(merged).eval()), kinds_logits(model.merge_and_unload())):
        np.testing.assert_allclose(logits, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@PEFTS_OWN
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning")
@pytest.mark.parametrize("case", KINDS)
def test_we_load_every_kind_that_peft_writes(case: str, kinds_dir: Path, tmp_path: Path):
    """The same logits; and, but for base weights of adapted embeddings, the same file again."""
    from vectors import peft_reference

    model = peft_reference.model(case)
    model.eval().save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    decoder = adapted(kinds_dir, adapter)
    ours = np.asarray(decoder.logits(decoder(jnp.asarray(lora_cases.TOKENS, jnp.int32))))
    np.testing.assert_allclose(ours, kinds_logits(model), atol=2e-5, rtol=1e-4)
    again = make_adapter(lora_config_of(adapter), lora.adapter_tensors(decoder), base_model_name_or_path=None)
    write_adapter(again, tmp_path / "ours")
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours")]
    contents = [{n: a.tobytes() for n, a in file.items() if not n.endswith("base_layer.weight")} for file in files]
    assert contents[0] == contents[1]
    stored = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    for fields in stored:
        for name in ("target_modules", "modules_to_save"):
            fields[name] = sorted(fields[name] or [])
    assert stored[0] == stored[1]


@pytest.mark.slow
@PEFTS_OWN
@pytest.mark.parametrize("case", ["pissa", "olora"])
def test_peft_loads_what_started_from_the_weights_on_the_original_base(case: str, kinds_dir: Path, tmp_path: Path):
    from peft import PeftModel

    config, decoder = LoraConfig(**lora_cases.CASES[case], r=3, use_dora=True), decoder_of(lora_cases.CONFIG)
    lora.attach(decoder, config, key=jax.random.key(0))
    learnt = {n: a + 0.05 * lora_cases.value(n, a) for n, a in lora.adapter_tensors(decoder).items()}
    lora.load_adapter_tensors(decoder, learnt)
    adapter = make_adapter(*lora.to_save(decoder, config), base_model_name_or_path="base")
    out = write_adapter(adapter, tmp_path / "adapter")
    theirs = kinds_logits(PeftModel.from_pretrained(their_model(kinds_dir), out).eval())
    ours = np.asarray(decoder.logits(decoder(jnp.asarray(lora_cases.TOKENS, jnp.int32))))
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@PEFTS_OWN
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("tying", [False, True])
def test_a_tied_head_parts_from_a_trained_embedding_as_in_peft(tying: bool, tmp_path: Path):
    from peft import PeftModel

    hf = {**lora_cases.CONFIG, "tie_word_embeddings": True}
    folder = write_checkpoint(tmp_path / "hf", hf)
    config = LoraConfig(r=2, modules_to_save=("embed_tokens",), target_modules=("q_proj",), ensure_weight_tying=tying)
    decoder = decoder_of(hf)
    lora.attach(decoder, config, key=jax.random.key(0))
    values = {n: lora_cases.value(n, a) for n, a in lora.adapter_tensors(decoder).items()}
    lora.load_adapter_tensors(decoder, values)
    adapter = make_adapter(config, values, base_model_name_or_path=str(folder))
    out = write_adapter(adapter, tmp_path / "adapter")
    theirs = kinds_logits(PeftModel.from_pretrained(their_model(folder), out).eval())
    ours = np.asarray(decoder.logits(decoder(jnp.asarray(lora_cases.TOKENS, jnp.int32))))
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)
    merged = write_hf(MergedCheckpoint(HFCheckpoint(folder), adapter), tmp_path / "merged")
    np.testing.assert_allclose(kinds_logits(their_model(merged).eval()), theirs, atol=2e-5, rtol=1e-4)
