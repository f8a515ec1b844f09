"""The public face: every kind of checkpoint in, logits, adapters, generation, and everything out and in again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters.gguf_export import write_gguf
from converters.hf_load import HFCheckpoint
from converters.modelfile import modelfile
from converters.open import open_checkpoint
from converters.orbax_io import write_orbax
from converters.peft_io import read_adapter
from jaxft import FastLanguageModel, LanguageModel, lora
from jaxft.api import default_dtype
from jaxft.errors import JaxftError
from jaxft.quant import NF4Tensor
from language_models import CONFIG, TOKENS, adapted, adapter_of, loaded, logits_of, rms
from models import relative_l2
from tiny import hf_config

# Logits are O(1); float32 sums taken in another order differ by some units in the last place in each layer.
TOLERANCE = 1e-5
PROMPTS = ["What is 2 plus 3?", "The answer"]

pytestmark = pytest.mark.usefixtures("fully_optimized")


@pytest.fixture(scope="module")
def base(tiny_hf_dir: Path) -> LanguageModel:
    return loaded(tiny_hf_dir)


@pytest.fixture(scope="module")
def model(tiny_hf_dir: Path) -> LanguageModel:
    """With an adapter of non-zero values; tests do not change it."""
    return adapted(tiny_hf_dir)


@pytest.fixture(scope="module")
def expected(model: LanguageModel) -> np.ndarray:
    return logits_of(model)


# In: folders and files.


def as_orbax(folder: Path, path: Path) -> Path:
    return write_orbax(HFCheckpoint(folder), path)


def as_gguf(folder: Path, path: Path) -> Path:
    file = path.with_suffix(".gguf")
    write_gguf(HFCheckpoint(folder), file, "f32")
    return file


@pytest.mark.parametrize("convert", [as_orbax, as_gguf])
def test_the_same_model_from_other_formats(convert, base: LanguageModel, tiny_hf_dir: Path, tmp_path: Path):
    model, tokenizer = FastLanguageModel.from_pretrained(convert(tiny_hf_dir, tmp_path / "model"), load_in_4bit=False)
    np.testing.assert_array_equal(logits_of(model), logits_of(base))
    assert tokenizer is model.tokenizer
    assert tokenizer is not None
    assert tokenizer.chat_template == base.tokenizer.chat_template
    assert [tokenizer(text)["input_ids"] for text in PROMPTS] == [base.tokenizer(text)["input_ids"] for text in PROMPTS]


def test_4bit_is_the_default_and_quantizes_linears_only(tiny_hf_dir: Path):
    model, _ = FastLanguageModel.from_pretrained(tiny_hf_dir, max_seq_length=77)
    assert model.max_seq_length == 77
    layers = model.decoder.model.layers
    assert isinstance(layers.mlp.up_proj.weight.get_value(), NF4Tensor)
    for module in (layers.input_layernorm, model.decoder.model.embed_tokens, model.decoder.lm_head):
        assert module.weight.get_value().dtype == jnp.float32
    assert loaded(tiny_hf_dir, dtype="bfloat16").decoder.model.embed_tokens.weight.get_value().dtype == jnp.bfloat16


def test_a_checkpoint_without_tokenizer(make_tiny_hf: Callable[..., Path], tmp_path: Path, capsys):
    folder = make_tiny_hf(tmp_path / "bare", with_tokenizer=False)
    model, tokenizer = FastLanguageModel.from_pretrained(folder, load_in_4bit=False)
    assert tokenizer is None
    assert f"warning: {folder} has no tokenizer files; the tokenizer is None" in capsys.readouterr().err
    assert model.eos_token_ids() == [2]
    with pytest.raises(JaxftError, match="bare: has no tokenizer"):
        model.answer(PROMPTS)


def test_adapters_bring_their_base(model: LanguageModel, expected: np.ndarray, tmp_path: Path):
    path = model.save_pretrained(tmp_path / "adapter")
    assert read_adapter(path).config["base_model_name_or_path"] == model.name
    again, tokenizer = FastLanguageModel.from_pretrained(path, load_in_4bit=False)
    assert again.name == model.name
    assert (again.lora_config.r, again.lora_config.scale) == (CONFIG.r, CONFIG.scale)
    assert set(again.lora_config.target_modules) == set(CONFIG.target_modules)
    assert tokenizer is not None
    np.testing.assert_array_equal(logits_of(again), expected)
    widths = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160)  # q and o, k and v, the MLP's
    assert again.trainable_parameters() == model.trainable_parameters() == 3 * 4 * widths
    with pytest.raises(JaxftError, match="has an adapter already"):
        FastLanguageModel.get_peft_model(again)


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "base_model_name_or_path: is missing"), ("/no/such/folder", "/no/such/folder: does not")],
)
def test_adapters_without_a_base(model: LanguageModel, tmp_path: Path, value: str | None, words: str):
    path = model.save_pretrained(tmp_path / "adapter") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": value}))
    with pytest.raises(JaxftError, match=words):
        FastLanguageModel.from_pretrained(path.parent)


# Adapters.


@pytest.mark.parametrize(
    ("spelling", "remat"),
    [("unsloth", "offload"), ("offload", "offload"), (True, "full"), ("full", "full"), (False, "none")],
)
def test_get_peft_model(tiny_hf_dir: Path, base: LanguageModel, spelling: str | bool, remat: str):
    model = loaded(tiny_hf_dir)
    assert FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=spelling) is model
    assert model.decoder.remat == remat
    assert model.lora_config.r == 4
    assert not any(array.any() for name, array in adapter_of(model).items() if "lora_B" in name)


def test_random_state_and_targets(tiny_hf_dir: Path):
    def fresh(**settings: Any) -> dict[str, np.ndarray]:
        return adapter_of(FastLanguageModel.get_peft_model(loaded(tiny_hf_dir), r=2, **settings))

    one, two, other = fresh(), fresh(random_state=3407), fresh(random_state=1)
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    np.testing.assert_array_equal(one[name], two[name])
    assert (one[name] != other[name]).all()
    names = fresh(target_modules=["q_proj", "v_proj"])
    assert {name.split(".")[4] for name in names} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_gradient_checkpointing": "some"}, "checkpointing: 'some' is not known.*none, full, offload"),
        ({"bias": "some"}, "bias: 'some' is not known"),
        ({"lora_rank": 8}, "get_peft_model: has no argument 'lora_rank'. Did you mean lora_"),
        ({"r": 0}, "r: the rank must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout: must be in"),
        ({"target_modules": ["query"]}, "target_modules: 'query' matches no linear.*There are: down_proj, .*v_proj"),
    ],
)
def test_bad_adapter_settings_change_nothing(tiny_hf_dir: Path, settings: dict[str, Any], words: str):
    model = loaded(tiny_hf_dir)
    with pytest.raises(JaxftError, match=words):
        FastLanguageModel.get_peft_model(model, **settings)
    assert (model.lora_config, model.decoder.remat, adapter_of(model)) == (None, "none", {})


def test_embeddings_among_the_targets_train_whole(tiny_hf_dir: Path, capsys: pytest.CaptureFixture[str]):
    model = loaded(tiny_hf_dir)
    FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert "embed_tokens and lm_head train whole" in capsys.readouterr().err
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= adapter_of(model).keys()


# Logits.


def test_packed_logits_equal_alone(model: LanguageModel, expected: np.ndarray):
    packed = jnp.asarray(np.concatenate([TOKENS[0, :9], TOKENS[1, :8]])[None], jnp.int32)
    segments = jnp.asarray([[1] * 9 + [2] * 8], jnp.int32)
    positions = jnp.asarray([[*range(9), *range(8)]], jnp.int32)
    found = np.asarray(model(packed, segments))
    np.testing.assert_array_equal(np.asarray(model(packed, segments, positions)), found)
    alone = np.concatenate([expected[0, :9], expected[1, :8]])
    np.testing.assert_allclose(found[0], alone, atol=TOLERANCE, rtol=TOLERANCE)
    assert found.dtype == np.float32
    assert np.abs(np.asarray(model(packed))[0, 9:] - alone[9:]).max() > 0.1, "the segments do nothing"


# Generation.


def test_padding_on_either_side_is_dropped(model: LanguageModel):
    rows = [TOKENS[0, :9].tolist(), TOKENS[1, :5].tolist()]
    plain = model.generate(rows, max_new_tokens=6, eos_token_id=299)
    assert [row[: len(prompt)] for row, prompt in zip(plain, rows, strict=True)] == rows
    for pad in (lambda n: (0, n), lambda n: (n, 0)):
        ids = np.stack([np.pad(row, pad(9 - len(row)), constant_values=7) for row in rows])
        mask = np.stack([np.pad(np.ones(len(row), int), pad(9 - len(row))) for row in rows])
        assert model.generate(ids, mask, max_new_tokens=6, eos_token_id=299) == plain
        assert model.generate(jnp.asarray(ids), mask, max_new_tokens=6, eos_token_id=[299]) == plain
    with pytest.raises(JaxftError, match="attention_mask: has another shape than input_ids"):
        model.generate(ids, mask[:, 1:], max_new_tokens=6)


def test_several_rows_of_a_prompt_and_stop_strings(model: LanguageModel):
    rows = [TOKENS[0, :9].tolist(), TOKENS[1, :5].tolist()]
    settings = {"max_new_tokens": 12, "eos_token_id": 299, "do_sample": True, "min_p": 0.01, "seed": [1, 2, 3, 4]}
    found = model.generate(rows, num_return_sequences=2, **settings)
    assert found == model.generate([rows[0], rows[0], rows[1], rows[1]], **settings)
    text = model.text_of(found[1][len(rows[0]) :])
    stopped = model.generate(rows, num_return_sequences=2, stop_strings=[text[2:4]], **settings)
    assert len(stopped[1]) < len(found[1])
    assert stopped[1] == found[1][: len(stopped[1])]
    assert text[2:4] in model.text_of(stopped[1][len(rows[0]) :])


def test_answers(model: LanguageModel, base: LanguageModel):
    tokenizer = model.tokenizer
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    chats = [tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] for text in PROMPTS]
    for chat, prompts in ((True, chats), (False, rows)):
        outputs = model.generate(prompts, max_new_tokens=6)
        texts = [tokenizer.decode(o[len(p) :], skip_special_tokens=True) for o, p in zip(outputs, prompts, strict=True)]
        assert model.answer(PROMPTS, chat=chat, max_new_tokens=6) == [text.strip() for text in texts]
        assert any(texts)


def test_a_tokenizer_without_chat_template(make_tiny_hf: Callable[..., Path], tmp_path: Path):
    folder = make_tiny_hf(tmp_path / "plain")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    with pytest.raises(JaxftError, match=r"plain: its tokenizer has no chat template. Pass chat=False"):
        loaded(folder).answer(PROMPTS)


def test_ends_of_sequence_come_from_everywhere(make_tiny_hf: Callable[..., Path], tmp_path: Path):
    """Chat models often name their end-of-turn token in generation_config.json alone."""
    folder = make_tiny_hf(tmp_path / "hf", eos_token_id=[5, 9])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    assert loaded(folder).eos_token_ids() == [2, 5, 9, 11]
    (folder / "generation_config.json").unlink()
    assert loaded(folder).eos_token_ids() == [2, 5, 9]


# Out, and in again.


def test_merged_gives_the_adapters_logits(model: LanguageModel, expected: np.ndarray, base, tmp_path: Path):
    path = model.save_pretrained_merged(tmp_path / "merged", save_method="merged")
    again = loaded(path)
    assert {info.dtype for info in again.source.tensors.values()} == {np.dtype(np.float32)}
    assert again.source.config == model.source.config
    np.testing.assert_allclose(logits_of(again), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert rms(logits_of(base), expected) > 0.1, "the adapter does nothing"
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_exports_of_an_adapter_that_changed_its_base_and_trained_norms(tiny_hf_dir: Path, tmp_path: Path):
    """PiSSA merges into the original weights and into its own to the same; GGUF has it, too."""
    model = loaded(tiny_hf_dir)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa", "modules_to_save": ["norm"]}
    FastLanguageModel.get_peft_model(model, **settings)
    rng = np.random.default_rng(0)
    start = adapter_of(model)
    learnt = {name: array + 0.1 * rng.standard_normal(array.shape).astype(np.float32) for name, array in start.items()}
    lora.load_adapter_tensors(model.decoder, learnt)
    paths = [
        model.save_pretrained_merged(tmp_path / base, None, "merged", base=base) for base in ("original", "loaded")
    ]
    original, own = map(HFCheckpoint, paths)
    (gguf,) = map(open_checkpoint, model.save_pretrained_gguf(tmp_path / "gguf", None, "f32"))
    for name in original.tensors:
        np.testing.assert_allclose(own.read(name), original.read(name), atol=1e-5)
        np.testing.assert_allclose(gguf.read(name), original.read(name), atol=1e-6)
        change = np.abs(original.read(name) - model.source.read(name)).max()
        assert change > 0.01 if "norm" in name or "q_proj" in name else change == 0, name
    np.testing.assert_array_equal(original.read("model.norm.weight"), learnt["model.norm.weight"])
    assert model.save_pretrained(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").config["r"] == 4


def test_merged_16bit(model: LanguageModel, expected: np.ndarray, tmp_path: Path):
    path = model.save_pretrained_merged(tmp_path / "merged", model.tokenizer)
    again = loaded(path)
    assert {info.dtype for info in again.source.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    config = json.loads((path / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    assert config == {key: value for key, value in hf_config().items() if key != "torch_dtype"}
    assert 1e-4 < rms(logits_of(again), expected) < 0.05


def test_the_other_save_methods(model: LanguageModel, base: LanguageModel, tmp_path: Path):
    """The adapter alone, and bitsandbytes' NF4 of the merged weights: what quantizing them gives."""
    path = model.save_pretrained_merged(tmp_path / "lora", save_method="lora")
    assert read_adapter(path).tensors.keys() == read_adapter(model.save_pretrained(tmp_path / "adapter")).tensors.keys()
    four = loaded(model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit"), load_in_4bit=True)
    merged = loaded(model.save_pretrained_merged(tmp_path / "merged", save_method="merged"), load_in_4bit=True)
    np.testing.assert_array_equal(logits_of(four), logits_of(merged))
    assert rms(logits_of(four), logits_of(base)) > 0.01


def test_full_fine_tuning_trains_and_saves_every_weight(tiny_hf_dir: Path, tmp_path: Path, capsys):
    model = loaded(tiny_hf_dir, full_finetuning=True)
    assert model.trainable_parameters() == sum(np.prod(t.shape) for t in HFCheckpoint(tiny_hf_dir).tensors.values())
    assert model.decoder.remat == "full"
    weight = model.decoder.model.embed_tokens.weight
    weight.set_value(weight.get_value() * 2)
    path = model.save_pretrained_merged(tmp_path / "merged", save_method="merged")
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(HFCheckpoint(path).read(name), 2 * HFCheckpoint(tiny_hf_dir).read(name))
    with pytest.raises(JaxftError, match="is quantized and cannot train"):
        loaded(tiny_hf_dir, load_in_4bit=True, full_finetuning=True)
    capsys.readouterr()
    assert FastLanguageModel.for_training(FastLanguageModel.for_inference(model)) is model
    said = capsys.readouterr().err
    assert "for_inference has no effect" in said
    assert "for_training has no effect" in said


def test_merging_into_the_loaded_base(tiny_hf_dir: Path, tmp_path: Path):
    """QLoRA trains against the quantized base: merged into that, the logits are the adapter's own."""
    model = adapted(tiny_hf_dir, load_in_4bit=True)
    own = logits_of(model)
    for base in ("loaded", "original"):
        model.save_pretrained_merged(tmp_path / base, save_method="merged", base=base)
    assert relative_l2(logits_of(loaded(tmp_path / "loaded")), own) < 1e-5
    assert 0.01 < relative_l2(logits_of(loaded(tmp_path / "original")), own) < 0.5, "NF4 changes nothing, or too much"
    with pytest.raises(JaxftError, match="base: 'other' is not known"):
        model.save_pretrained_merged(tmp_path / "other", base="other")
    assert not (tmp_path / "other").exists()


def test_gguf_gives_the_adapters_logits(model: LanguageModel, expected: np.ndarray, tmp_path: Path):
    exact, small = model.save_pretrained_gguf(tmp_path / "gguf", model.tokenizer, quantization_method=["f32", "q8_0"])
    assert (exact.name, small.name) == ("model.F32.gguf", "model.Q8_0.gguf")
    np.testing.assert_allclose(logits_of(loaded(exact)), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert TOLERANCE < rms(logits_of(loaded(small)), expected) < 0.1
    assert small.with_suffix(".Modelfile").read_text() == modelfile(model.source, small.name)
    assert "FROM ./model.Q8_0.gguf\nTEMPLATE " in small.with_suffix(".Modelfile").read_text()
    with pytest.raises(JaxftError, match=r"model.Q8_0.gguf: exists already"):
        model.save_pretrained_gguf(tmp_path / "gguf")
    (tmp_path / "gguf" / "README.md").write_text("mine")
    model.save_pretrained_gguf(tmp_path / "gguf", overwrite=True)
    assert (tmp_path / "gguf" / "README.md").read_text() == "mine"


def test_without_an_adapter_the_base_goes_out(base: LanguageModel, tmp_path: Path):
    path = base.save_pretrained_merged(tmp_path / "merged", save_method="merged")
    assert (path / "model.safetensors").read_bytes() == (Path(base.name) / "model.safetensors").read_bytes()
    with pytest.raises(JaxftError, match="save_pretrained: the model has no adapter"):
        base.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


SAVES = {
    "adapter": lambda model, path: model.save_pretrained(path),
    "merged": lambda model, path: model.save_pretrained_merged(path),
    "gguf": lambda model, path: model.save_pretrained_gguf(path),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_outputs_that_cannot_be(model: LanguageModel, save, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    shutil.copytree(model.name, full)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    bad = [(file, "is a file"), (file / "out", "cannot be written to"), (full, "full: is not empty")]
    for path, words in bad[: 2 if save is SAVES["gguf"] else 3]:  # a GGUF file may stand among others
        with pytest.raises(JaxftError, match=words):
            save(model, path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert file.read_text() == "mine"


def test_unknown_methods_write_nothing(model: LanguageModel, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(JaxftError, match=r"save_method: 'gptq' is not known\. Choose one of merged, merged_16bit"):
        model.save_pretrained_merged(out, save_method="gptq")
    with pytest.raises(JaxftError, match=r"GGUF quantization 'q9_9': is not known \(known: f32, f16, bf16, q8_0,"):
        model.save_pretrained_gguf(out, quantization_method=["f16", "q9_9"])
    assert not out.exists()


# Devices.


def pretend(monkeypatch: pytest.MonkeyPatch, platform: str, **device: str) -> None:
    fake = SimpleNamespace(platform=platform, device_kind="Fake device", **device)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [fake])


def test_default_dtype(monkeypatch: pytest.MonkeyPatch):
    assert default_dtype() == jnp.float32
    for capability in ("8.0", "8.9", "9.0", "10.3", "12.0"):
        pretend(monkeypatch, "gpu", compute_capability=capability)
        assert default_dtype() == jnp.bfloat16


@pytest.mark.parametrize("capability", ["7.5", "6.1"])
def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, tiny_hf_dir: Path, capability: str):
    pretend(monkeypatch, "gpu", compute_capability=capability)
    with pytest.raises(JaxftError, match=rf"Fake device: has compute capability {capability}, and jaxft needs 8.0"):
        FastLanguageModel.from_pretrained(tiny_hf_dir)
