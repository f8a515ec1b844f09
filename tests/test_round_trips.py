"""Slow: every architecture of the registry through every format and back, bit by bit, and layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from arch_cases import arch_config, families, smallest_in_gguf, tokens
from converters.archs import ARCHS
from converters.bnb import write_bnb
from converters.checkpoint import Checkpoint, stream
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from converters.gguf_mixes import stays_exact
from converters.hf_export import write_hf
from converters.hf_load import HFCheckpoint
from converters.imatrix import collect_rows
from converters.load import load_decoder
from converters.orbax_io import OrbaxCheckpoint, write_orbax
from converters.streamed import StreamedDecoder
from tiny import random_tensors

pytestmark = pytest.mark.slow


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in stream(checkpoint)}


@pytest.fixture(params=families(), scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's smallest case that GGUF can hold, in bfloat16: Gemma's norms in GGUF, 1 + w, are exact then."""
    path = tmp_path_factory.mktemp(request.param)
    config = arch_config(request.param, smallest_in_gguf(request.param))
    (path / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, "bfloat16"), path / "model.safetensors", {"format": "pt"})
    return path


def test_hugging_face_and_orbax(folder: Path, tmp_path: Path):
    source = HFCheckpoint(folder)
    write_orbax(source, tmp_path / "orbax")
    back = HFCheckpoint(write_hf(OrbaxCheckpoint(tmp_path / "orbax"), tmp_path / "hf"))
    assert back.config == source.config
    assert contents(back) == contents(source)


def test_gguf_keeps_every_value(folder: Path, tmp_path: Path):
    source = HFCheckpoint(folder)
    if ARCHS[source.config["model_type"]].gguf is None:
        pytest.skip("not in GGUF")
    write_gguf(source, tmp_path / "f32.gguf", "f32")
    back = GGUFCheckpoint(tmp_path / "f32.gguf")
    for name, array in stream(back):
        np.testing.assert_array_equal(array, source.read(name).astype(array.dtype), err_msg=name)


def test_bitsandbytes_codes_come_back(folder: Path, tmp_path: Path):
    from converters.open import open_checkpoint

    write_bnb(HFCheckpoint(folder), tmp_path / "once")
    write_bnb(open_checkpoint(tmp_path / "once"), tmp_path / "twice")
    once, twice = (HFCheckpoint(tmp_path / name, accept_quantized=True) for name in ("once", "twice"))
    assert contents(twice) == contents(once)


def test_layer_by_layer(folder: Path, tmp_path: Path):
    """The streamed decoder gives the decoder's logits, and every matrix of the layers is observed."""
    checkpoint = HFCheckpoint(folder)
    decoder = load_decoder(checkpoint, dtype=jnp.float32)
    rows = np.asarray(tokens(checkpoint.config), np.int32)
    streamed = StreamedDecoder(checkpoint)
    found = np.concatenate(list(streamed.logits(streamed.hidden(rows))))
    expected = decoder.logits(decoder(jnp.asarray(rows)))
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
    if ARCHS[checkpoint.config["model_type"]].gguf is None:
        return
    write_gguf(checkpoint, tmp_path / "f32.gguf", "f32")
    entries = read_header(tmp_path / "f32.gguf").tensors
    # Of experts, a row for each; k_b and v_b of latent attention are observed as the one matrix that they are in HF's.
    inputs = {
        name.replace("attn_v_b", "attn_kv_b"): (entry.shape[0] if "_exps" in name else 1, entry.shape[-1])
        for name, entry in entries.items()
        if name.startswith("blk.") and not stays_exact(name, entry.shape) and "attn_k_b" not in name
    }
    sums = collect_rows(checkpoint, rows, dataset="random").sums
    assert {name: total.shape for name, total in sums.items()} == inputs
