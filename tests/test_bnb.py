"""Checkpoints that bitsandbytes quantized: read as they are stored, written as they were, refused by name."""

from __future__ import annotations

import functools
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
from flax import nnx
from safetensors.numpy import load_file, save_file

from converters.bnb import BnbCheckpoint, decode_state, stored_tensors, write_bnb
from converters.converted import load_nf4
from converters.load import load_decoder
from converters.merge import DecoderCheckpoint
from converters.open import open_checkpoint
from jaxft.errors import JaxftError
from jaxft.models.layers import is_quantizable
from jaxft.models.params import parameters, unstack
from jaxft.quant import NF4Tensor
from tiny import make_tiny_hf

QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}
BF16 = np.dtype(ml_dtypes.bfloat16)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny_hf_dir: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in the layout of bitsandbytes; its states say bfloat16."""
    path = tmp_path / "bnb"
    shutil.copytree(tiny_hf_dir, path)
    edit_config(path, lambda config: config.update(quantization_config=QUANTIZATION))
    edit_tensors(path, quantize_linears)
    return path


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def quantize_linears(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = NF4Tensor.quantize(jnp.asarray(tensors.pop(name)))
        tensors.update({part: np.asarray(array) for part, array in stored_tensors(name, weight, BF16).items()})


def test_codes_and_scales_are_those_of_the_file(folder: Path):
    decoder = load_decoder(open_checkpoint(folder), dtype=jnp.float32, quantization="nf4")
    stored = load_file(folder / "model.safetensors")
    linears = [(path, variable) for path, variable in parameters(decoder) if is_quantizable(path)]
    assert len(linears) == 7
    for path, variable in linears:
        for layer, weight in enumerate(unstack(variable.get_value(), 1)):
            name = ".".join(map(str, path)).replace("layers.", f"layers.{layer}.")
            for suffix, array in stored_tensors(name, weight, BF16).items():
                np.testing.assert_array_equal(array, stored[suffix], err_msg=suffix)


def test_a_loaded_model_is_written_bit_by_bit(folder: Path, tmp_path: Path):
    source = open_checkpoint(folder)
    decoder = load_decoder(source, dtype=jnp.float32, quantization="nf4")
    for name, checkpoint in {"source": source, "decoder": DecoderCheckpoint(decoder, source)}.items():
        written = load_file(write_bnb(checkpoint, tmp_path / name) / "model.safetensors")
        stored = load_file(folder / "model.safetensors")
        assert written.keys() == stored.keys()
        for part, array in stored.items():
            assert written[part].dtype == array.dtype
            np.testing.assert_array_equal(written[part], array, err_msg=part)
        assert json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] == QUANTIZATION


def test_plain_weights_are_quantized_as_they_are_written(tiny_hf_dir: Path, tmp_path: Path):
    source = open_checkpoint(tiny_hf_dir)
    copy = open_checkpoint(write_bnb(source, tmp_path / "nf4"))
    assert isinstance(copy, BnbCheckpoint)
    expected = NF4Tensor.quantize(jnp.asarray(source.read(Q_PROJ)))
    jax.tree.map(np.testing.assert_array_equal, copy.quantized(Q_PROJ), expected)
    norm = "model.norm.weight"
    assert copy.quantized(norm) is None
    np.testing.assert_array_equal(copy.read(norm), source.read(norm))


def test_the_converted_copy_loads_to_the_same_model(
    tiny_hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    load = functools.partial(load_nf4, dtype=jnp.bfloat16, cache=tmp_path / "nf4")
    folder = tmp_path / "model"
    shutil.copytree(tiny_hf_dir, folder)
    loaded = [load(open_checkpoint(folder), min_bytes=0) for _ in range(2)]
    assert "reading the converted copy" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(decoder) for decoder in loaded))
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] + 1}))
    load(open_checkpoint(folder), min_bytes=0)
    assert len(list((tmp_path / "nf4").iterdir())) == 2, "a checkpoint that changed was not converted again"
    load(open_checkpoint(folder))
    shutil.rmtree(tmp_path / "nf4")
    (tmp_path / "nf4").write_text("in the way")
    load(open_checkpoint(folder), min_bytes=0)
    assert "no converted copy was kept" in capsys.readouterr().err


def test_without_nf4_the_weights_come_decoded_in_their_own_dtype(folder: Path):
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, BnbCheckpoint)
    assert "quantization_config" not in checkpoint.config
    weight = checkpoint.quantized(Q_PROJ)
    assert weight is not None
    assert checkpoint.read(Q_PROJ).dtype == checkpoint.tensors[Q_PROJ].dtype == BF16
    expected = jax.tree.map(jnp.asarray, weight).dequantize(jnp.float32)
    decoder = load_decoder(checkpoint, dtype=jnp.float32)
    (loaded,) = [v.get_value() for path, v in parameters(decoder) if "q_proj" in path and "weight" in path]
    np.testing.assert_array_equal(loaded[1], np.asarray(expected).astype(BF16))


@pytest.mark.parametrize("case", ["float32_plain", "float32_dq", "bfloat16_plain", "bfloat16_dq"])
def test_a_state_is_written_as_bitsandbytes_writes_it(case: str):
    """What bitsandbytes 0.50.2 wrote for a weight of 512 x 384."""
    offsets = {"float32_dq": 0.051919400691986084, "bfloat16_dq": 0.05191783234477043}
    dtype, nested = case.split("_")[0], case in offsets
    text = f'{{"quant_type": "nf4", "blocksize": 64, "dtype": "{dtype}", "shape": [512, 384]'
    if nested:
        text += f', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offsets[case]!r}'
    content = (text + "}").encode()
    state = decode_state(content, "here")
    assert (state.shape, state.block_size, state.dtype.name) == ((512, 384), 64, dtype)
    weight = NF4Tensor.quantize(jnp.ones((512, 384)), double_quantization=nested)
    if nested:
        weight = jax.tree.map(lambda leaf: jnp.float32(offsets[case]) if leaf.ndim == 0 else leaf, weight)
    (written,) = [a for n, a in stored_tensors("w", weight, state.dtype).items() if "quant_state" in n]
    assert written.tobytes() == content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4' is not supported"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "8-bit weights"),
        ({"quant_method": "gptq"}, "gptq is not supported"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
    ],
)
def test_other_quantizations_are_refused_by_name(folder: Path, change: dict[str, Any], words: str):
    edit_config(folder, lambda config: config["quantization_config"].update(change))
    with pytest.raises(JaxftError, match=rf"config.json, field quantization_config: {words}"):
        open_checkpoint(folder)


def state_of(tensors: dict[str, np.ndarray], **fields: Any) -> None:
    name = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes()) | fields
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.update({f"{Q_PROJ}.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}), "is not JSON"),
        (lambda t: state_of(t, quant_type="fp4"), "not supported"),
        (lambda t: state_of(t, nested_dtype="bfloat16"), "not supported"),
        (lambda t: state_of(t, dtype=["float32"]), "not supported"),
        (lambda t: state_of(t, nested_offset=1e39), "not supported"),
        (lambda t: state_of(t, blocksize=128), r"absmax: is uint8 \[64\] instead of uint8 \[32\]"),
        (lambda t: state_of(t, more=1), "too many or too few fields: more"),
        (lambda t: t.pop(f"{Q_PROJ}.nested_absmax"), "nested_absmax: is missing"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}), r"q_proj.weight: is uint8"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_tensor(folder: Path, edit: Callable[..., Any], words: str):
    edit_tensors(folder, edit)
    with pytest.raises(JaxftError, match=words):
        open_checkpoint(folder)


def test_layers_that_are_partly_quantized_cannot_be_kept(folder: Path):
    def undo(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith(Q_PROJ)]:
            del tensors[name]
        tensors[Q_PROJ] = np.ones((64, 64), np.float32)

    edit_tensors(folder, undo)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(JaxftError, match=f"1 of 21 linears unquantized, the first of them {Q_PROJ}"):
        load_decoder(checkpoint, dtype=jnp.float32, quantization="nf4")
    load_decoder(checkpoint, dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_of_bitsandbytes_loads_as_it_decodes_it_and_comes_back_bit_by_bit(tmp_path: Path, double: bool):
    # Columns in multiples of 64: where blocks cross rows, bitsandbytes itself decodes wrongly on the CPU.
    source = make_tiny_hf(tmp_path / "source", intermediate_size=192)
    import bitsandbytes.functional as bnb
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    checkpoint = open_checkpoint(tmp_path / "quantized")
    assert isinstance(checkpoint, BnbCheckpoint)
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    # Its own CPU product rounds to bfloat16, so the logits come from a plain model that holds the decoded weights.
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    linears = {f"{name}.weight": m for name, m in model.named_modules() if name.endswith("_proj")}
    for name, module in linears.items():
        weight = checkpoint.quantized(name)
        assert weight is not None
        expected = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float().numpy()  # pyright: ignore
        np.testing.assert_array_equal(jax.tree.map(jnp.asarray, weight).dequantize(jnp.float32), expected)
        plain.get_parameter(name).data = torch.from_numpy(expected)
        for part, array in stored_tensors(name, weight, checkpoint.tensors[name].dtype).items():
            np.testing.assert_array_equal(array, stored[part], err_msg=part)
    decoder = load_decoder(checkpoint, dtype=jnp.float32, quantization="nf4")
    tokens = np.arange(3, 20)[None]
    hidden = jax.jit(lambda: decoder.logits(decoder(jnp.asarray(tokens, jnp.int32))))()
    with torch.no_grad():
        expected = plain(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(hidden, expected, atol=2e-4, rtol=2e-4)
