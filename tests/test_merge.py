"""Merged weights against numpy in float32: per module scale, stored dtypes, what does not fit, what is cast."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters.checkpoint import Checkpoint, stream
from converters.hf_load import HFCheckpoint
from converters.load import load_decoder
from converters.merge import CastCheckpoint, DecoderCheckpoint, MergedCheckpoint
from converters.peft_io import Adapter, make_adapter
from jaxft.errors import JaxftError
from jaxft.lora import LoraConfig

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def pair(module: str, out: int, inputs: int, rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(module))
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, inputs), np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((out, rank), np.float32),
    }


def adapter_for(ranks: dict[str, int] | None = None, **fields: Any) -> Adapter:
    """Of q_proj [64, 64] in layer 1 and up_proj [160, 64] in layer 0; `fields` go into adapter_config.json."""
    ranks = ranks or {Q: 3, UP: 3}
    tensors = {**pair(Q, 64, 64, ranks[Q]), **pair(UP, 160, 64, ranks[UP])}
    plain = make_adapter(LoraConfig(r=3, lora_alpha=6), tensors, base_model_name_or_path="base")
    return Adapter({**plain.config, **fields}, plain.tensors)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def base(request: pytest.FixtureRequest, make_tiny_hf: Callable[..., Path], tmp_path_factory) -> HFCheckpoint:
    return HFCheckpoint(make_tiny_hf(tmp_path_factory.mktemp("base") / "hf", dtype=request.param))


SCALES = {
    "plain": (adapter_for(), {Q: 2.0, UP: 2.0}),
    "rslora": (adapter_for(use_rslora=True), {Q: 6 / math.sqrt(3), UP: 6 / math.sqrt(3)}),
    "alpha_pattern": (adapter_for(alpha_pattern={"mlp.up_proj": 1.5}), {Q: 2.0, UP: 0.5}),
    "rank_pattern": (adapter_for({Q: 3, UP: 5}, rank_pattern={r".*\.0\.mlp\.up_proj": 5}), {Q: 2.0, UP: 6 / 5}),
}


@pytest.mark.parametrize("case", SCALES)
def test_merged_weights_equal_numpy(case: str, base: HFCheckpoint):
    adapter, scales = SCALES[case]
    merged = MergedCheckpoint(base, adapter)
    assert merged.config == base.config
    assert merged.tensors == base.tensors
    assert merged.sidecars() == base.sidecars()
    for name, array in stream(merged):
        expected = base.read(name)
        module = name.removesuffix(".weight")
        if module in scales:
            a, b = (adapter.tensors[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
            change = scales[module] * b @ a
            assert np.abs(change).max() > 1
            # float32 arithmetic, then one rounding to the stored dtype.
            exact = (base.read(name).astype(np.float64) + change).astype(np.float32)
            np.testing.assert_allclose(array.astype(np.float32), exact, rtol=float(eps(array)), atol=1e-5)
        else:
            assert array.tobytes() == expected.tobytes()
        assert array.dtype == expected.dtype


def eps(array: np.ndarray) -> float:
    return ml_dtypes.finfo(array.dtype).eps


def test_magnitudes_and_whole_tensors_equal_numpy(base: HFCheckpoint):
    """DoRA's rows have their magnitudes; what trained whole takes the base's place, in its dtype."""
    rng = np.random.default_rng(3)
    embedding = "model.embed_tokens"
    tensors = {
        **pair(Q, 64, 64, 3),
        f"{Q}.lora_magnitude_vector": rng.random(64, np.float32) + 1,
        f"{embedding}.lora_embedding_A": rng.standard_normal((3, 300), np.float32),
        f"{embedding}.lora_embedding_B": rng.standard_normal((64, 3), np.float32),
        f"{embedding}.lora_magnitude_vector": rng.random(64, np.float32) + 1,
        "model.norm.weight": rng.random(64, np.float32),
    }
    config = LoraConfig(r=3, lora_alpha=6, use_dora=True, modules_to_save=("norm",))
    merged = MergedCheckpoint(base, make_adapter(config, tensors, base_model_name_or_path="base"))
    for name, axis in ((f"{Q}.weight", 1), (f"{embedding}.weight", 0)):
        array = merged.read(name).astype(np.float64)
        magnitude = tensors[name.replace("weight", "lora_magnitude_vector")]
        tolerance = 4 * float(eps(base.read(name)))
        np.testing.assert_allclose(np.linalg.norm(array, axis=axis), magnitude, rtol=tolerance + 1e-5)
        module = name.removesuffix(".weight")
        parts = ("lora_A.weight", "lora_B.weight") if axis else ("lora_embedding_A", "lora_embedding_B")
        a, b = (tensors[f"{module}.{part}"].astype(np.float64) for part in parts)
        direction = base.read(name).astype(np.float64) + 2.0 * (b @ a if axis else (b @ a).T)
        cosine = np.sum(direction * array, axis) / np.linalg.norm(direction, axis=axis) / magnitude
        np.testing.assert_allclose(cosine, 1, rtol=tolerance + 1e-5)
    norm = merged.read("model.norm.weight")
    np.testing.assert_array_equal(norm, tensors["model.norm.weight"].astype(norm.dtype))
    assert norm.dtype == base.read("model.norm.weight").dtype


@pytest.mark.parametrize("tying", [False, True])
def test_a_tied_head_that_an_adapter_parts_from_the_embedding(
    tying: bool, make_tiny_hf: Callable[..., Path], tmp_path: Path
):
    """Unless they stay tied, the head is a tensor of its own: what the embedding was."""
    base = HFCheckpoint(make_tiny_hf(tmp_path / "hf", tie_word_embeddings=True, with_tokenizer=False))
    trained = np.ones((300, 64), np.float32)
    config = LoraConfig(r=3, modules_to_save=("embed_tokens",), ensure_weight_tying=tying)
    tensors = {**pair(Q, 64, 64, 3), "model.embed_tokens.weight": trained}
    merged = MergedCheckpoint(base, make_adapter(config, tensors, base_model_name_or_path="base"))
    np.testing.assert_array_equal(merged.read("model.embed_tokens.weight"), trained)
    assert ("lm_head.weight" in merged.tensors) == (not tying)
    assert merged.config["tie_word_embeddings"] == tying
    if not tying:
        np.testing.assert_array_equal(merged.read("lm_head.weight"), base.read("model.embed_tokens.weight"))


def test_what_does_not_fit_is_listed(base: HFCheckpoint):
    tensors = {
        **pair(Q, 64, 64, 3),
        **pair("model.layers.0.mlp.down_proj", 64, 96, 3),
        **pair("model.layers.7.mlp.up_proj", 160, 64, 3),
    }
    adapter = make_adapter(LoraConfig(r=3), tensors, base_model_name_or_path="base")
    with pytest.raises(JaxftError) as caught:
        MergedCheckpoint(base, adapter)
    message = str(caught.value)
    assert message.startswith(base.where)
    assert "model.layers.0.mlp.down_proj.weight is [64, 160], not [64, 96]" in message
    assert "it has no model.layers.7.mlp.up_proj.weight" in message
    assert Q not in message


def test_casting(base: HFCheckpoint):
    """Only what is wider than 16 bits becomes bfloat16, and config.json tells what the tensors are."""
    cast = CastCheckpoint(base)
    dtype = base.read("model.norm.weight").dtype
    expected = np.dtype(ml_dtypes.bfloat16) if dtype == np.float32 else dtype
    assert {info.dtype for info in cast.tensors.values()} == {expected}
    for name, array in stream(cast):
        np.testing.assert_array_equal(array, base.read(name).astype(expected))
    fields = dict(cast.config)
    stated = fields.pop("dtype", None) or fields.pop("torch_dtype")
    assert stated == expected.name
    assert fields == {key: value for key, value in base.config.items() if key != "torch_dtype"}


def test_a_decoder_gives_back_its_tensors(base: HFCheckpoint):
    """Bit for bit where nothing is quantized, also through a float32 decoder; quantized, in the stored dtype."""
    decoder = load_decoder(base, dtype=jnp.float32)
    again = DecoderCheckpoint(decoder, base)
    assert again.tensors == base.tensors
    assert contents(again) == contents(base)
    quantized = DecoderCheckpoint(load_decoder(base, dtype=jnp.float32, quantization="nf4"), base)
    assert quantized.tensors == base.tensors
    for name, array in stream(quantized):
        assert array.dtype == base.read(name).dtype
        error = np.abs(array.astype(np.float32) - base.read(name).astype(np.float32)).max()
        assert (0 < error < 0.2) if "_proj" in name else error == 0


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in stream(checkpoint)}
