"""gpt-oss checkpoints with experts in MXFP4: in, as they are, and out again bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arch_cases import tokens
from converters.archs import arch_of
from converters.load import load_decoder
from converters.merge import DecoderCheckpoint
from converters.mxfp4 import MXFP4Checkpoint, write_mxfp4
from converters.open import open_checkpoint
from jaxft.errors import JaxftError
from jaxft.quant import MXFP4Tensor
from models import hidden_states
from mxfp4_cases import CONFIG, stored_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt-oss")
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(stored_tensors(), path / "model.safetensors", {"format": "pt"})
    return path


def test_experts_stay_in_mxfp4_and_come_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    source = open_checkpoint(folder)
    assert isinstance(source, MXFP4Checkpoint)
    decoder = load_decoder(source, dtype=jnp.bfloat16)
    weight = decoder.model.layers.mlp.experts.gate_proj.weight.get_value()
    assert isinstance(weight, MXFP4Tensor)
    assert weight.codes.shape == (2, 3, 32, 32)  # layers, experts, out, in / 2
    written = write_mxfp4(DecoderCheckpoint(decoder, source), tmp_path / "out")
    expected, found = load_file(folder / "model.safetensors"), load_file(written / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype
        np.testing.assert_array_equal(array.view(np.uint8), found[name].view(np.uint8), err_msg=name)
    config: dict[str, Any] = json.loads((written / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert {**config, "quantization_config": CONFIG["quantization_config"]} == CONFIG


@pytest.mark.slow
def test_a_decoder_over_mxfp4_computes_what_its_values_say(folder: Path) -> None:
    source = open_checkpoint(folder)
    decoder = load_decoder(source, dtype=jnp.float32)
    plain = load_decoder(source, dtype=jnp.float32)
    for name in ("gate_proj", "up_proj", "down_proj"):
        variable = getattr(plain.model.layers.mlp.experts, name).weight
        variable.set_value(variable.get_value().dequantize(jnp.float32))
    ids = tokens(CONFIG)
    found = hidden_states(decoder, ids)
    np.testing.assert_allclose(found, hidden_states(plain, ids), atol=1e-5)
    # The layout of the decoded tensors is transformers': [E, in, out], gate and up in turn.
    layout = arch_of("gpt_oss", "test").tensors(decoder.config)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    expected = plain.model.layers.mlp.experts.up_proj.weight.get_value()[1, 2]
    np.testing.assert_array_equal(layout.decoder[name].read(source.read).astype(np.float32), expected)


def test_parts_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = stored_tensors()
    name = "model.layers.0.mlp.experts.down_proj"
    for change in ({f"{name}_scales": tensors[f"{name}_scales"][:, 1:]}, {f"{name}_scales": None}):
        broken = {n: a for n, a in {**tensors, **change}.items() if a is not None}
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        save_file({n: np.ascontiguousarray(a) for n, a in broken.items()}, tmp_path / "model.safetensors")
        with pytest.raises(JaxftError, match=r"down_proj_blocks.*not MXFP4"):
            open_checkpoint(tmp_path)


@pytest.mark.slow
def test_transformers_reads_the_same_values(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    source = open_checkpoint(folder)
    state = model.state_dict()
    for layer in range(2):
        for kind in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{kind}"
            np.testing.assert_array_equal(source.read(name).astype(np.float32), state[name].float().numpy())
