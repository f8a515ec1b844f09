"""Hugging Face folders in and out: bit-equal round trips, and every bad input told in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from converters.checkpoint import TensorInfo, stream
from converters.hf_export import plan_shards, write_hf
from converters.hf_load import INDEX, WEIGHTS, HFCheckpoint
from converters.load import check, load_decoder
from converters.open import format_of, is_adapter, open_checkpoint, resolve
from converters.safetensors_io import SafetensorsFile, write_safetensors
from jaxft.errors import JaxftError
from jaxft.models import params
from jaxft.models.config import DecoderConfig
from jaxft.models.params import build_decoder, expected_tensors, tensor_views
from tiny import hf_config, random_tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MIXED = (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32))


def assert_same(found: Any, expected: Any) -> None:
    """Two checkpoints hold the same tensors bit by bit, the same config and the same files."""
    assert found.config == expected.config
    assert list(found.config) == list(expected.config)
    assert found.sidecars() == expected.sidecars()
    assert dict(found.tensors) == dict(expected.tensors)
    for name, array in stream(expected):
        assert found.read(name).dtype == array.dtype
        assert found.read(name).tobytes() == array.tobytes()


@pytest.fixture
def mixed_dir(tiny_hf_dir: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with bfloat16, float16 and float32 tensors, and every kind of sidecar."""
    folder = shutil.copytree(tiny_hf_dir, tmp_path / "mixed")
    tensors = random_tensors(hf_config())
    mixed = {name: array.astype(MIXED[i % 3]) for i, (name, array) in enumerate(tensors.items())}
    save_file(mixed, folder / WEIGHTS, {"format": "pt"})
    (folder / "chat_template.jinja").write_text("{{ messages }} ä")
    (folder / "special_tokens_map.json").write_bytes(b'{"eos_token":\t"<|im_end|>" }')
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


@pytest.mark.parametrize(("max_shard_size", "n_shards"), [(10**9, 1), (200_000, 3), (1, 30)])
def test_round_trip(mixed_dir: Path, tmp_path: Path, max_shard_size: int, n_shards: int):
    source = HFCheckpoint(mixed_dir)
    out = write_hf(source, tmp_path / "new" / "out", max_shard_size=max_shard_size)
    written = HFCheckpoint(out)
    assert_same(written, source)
    assert {info.dtype for info in written.tensors.values()} == set(MIXED)
    assert "additional_chat_templates/tool_use.jinja" in written.sidecars()
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == n_shards
    assert (out / INDEX).exists() == (n_shards > 1)
    # Nobody but safetensors itself is the judge of what a sound file is.
    by_library = {name: array for shard in shards for name, array in load_file(shard).items()}
    assert {name: array.tobytes() for name, array in by_library.items()} == {n: a.tobytes() for n, a in stream(source)}
    for shard in shards:
        with safe_open(shard, framework="np") as file:
            assert file.metadata() == {"format": "pt"}


def test_index_counts_what_the_shards_hold(mixed_dir: Path, tmp_path: Path):
    source = HFCheckpoint(mixed_dir)
    out = write_hf(source, tmp_path / "out", max_shard_size=100_000)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in stream(source))
    assert index["metadata"]["total_parameters"] == sum(array.size for _, array in stream(source))
    n_shards = len(set(index["weight_map"].values()))
    assert set(index["weight_map"].values()) == {
        f"model-{i:05d}-of-{n_shards:05d}.safetensors" for i in range(1, n_shards + 1)
    }


def test_shards_are_filled_in_order():
    tensors = {name: TensorInfo((n,), np.dtype(np.float32)) for name, n in zip("abcd", (2, 3, 9, 1), strict=True)}
    shards = plan_shards(tensors, 20)
    assert [list(shard) for shard in shards.values()] == [["a", "b"], ["c"], ["d"]]


def test_every_dtype_survives_and_lies_aligned(tmp_path: Path):
    rng = np.random.default_rng(0)
    dtypes = [
        np.dtype(d) for d in ("?", "u1", "i2", "f4", "i8", BFLOAT16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    ]
    arrays = {f"{dtype.name}.{i}": rng.integers(0, 2, (i, 3, 7)).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays["scalar"] = np.array(3.5, np.float64)
    arrays["ü"] = rng.standard_normal((3, 5)).T
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(tmp_path / "x.safetensors", infos, arrays.__getitem__)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.tensors == infos
    for name, array in arrays.items():
        found = file.read(name)
        assert found.flags.aligned
        assert found.tobytes() == array.tobytes()


def test_a_wrong_announcement_is_caught(tmp_path: Path):
    with pytest.raises(ValueError, match="w was announced"):
        write_safetensors(
            tmp_path / "x.safetensors",
            {"w": TensorInfo((2,), np.dtype(np.float32))},
            lambda name: np.zeros(2, np.float16),
        )


class Broken:
    """A checkpoint that fails in the middle."""

    def __init__(self, checkpoint: HFCheckpoint) -> None:
        self._checkpoint = checkpoint
        self.where, self.config, self.tensors = checkpoint.where, checkpoint.config, checkpoint.tensors
        self.tokenizer, self.sidecars = checkpoint.tokenizer, checkpoint.sidecars

    def read(self, name: str) -> np.ndarray:
        if name == "model.norm.weight":
            raise JaxftError(name, "is broken")
        return self._checkpoint.read(name)


def test_nothing_is_half_written(tiny_hf_dir: Path, tmp_path: Path):
    with pytest.raises(JaxftError, match=r"model\.norm\.weight: is broken"):
        write_hf(Broken(HFCheckpoint(tiny_hf_dir)), tmp_path / "out", max_shard_size=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_output_folder(tiny_hf_dir: Path, tmp_path: Path):
    source = HFCheckpoint(tiny_hf_dir)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(JaxftError, match="full: is not empty"):
        write_hf(source, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(JaxftError, match=r"mine\.txt"):
        write_hf(source, tmp_path / "full" / "mine.txt" / "below a file")
    (tmp_path / "empty").mkdir()
    write_hf(source, tmp_path / "empty")
    write_hf(source, tmp_path / "empty", overwrite=True)
    assert_same(HFCheckpoint(tmp_path / "empty"), source)


def test_written_tokenizer_where_the_source_keeps_no_files(tiny_hf_dir: Path, tmp_path: Path):
    source = HFCheckpoint(tiny_hf_dir)
    without_files = Broken(source)
    without_files.read, without_files.sidecars = source.read, dict
    out = write_hf(without_files, tmp_path / "out")
    ours, theirs = HFCheckpoint(out).tokenizer(), source.tokenizer()
    assert ours is not None
    assert theirs is not None
    text = "What is 2 plus 3?\n  <|im_end|> ä"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_no_tokenizer(make_tiny_hf: Callable[..., Path], tmp_path: Path):
    assert HFCheckpoint(make_tiny_hf(tmp_path / "hf", with_tokenizer=False)).tokenizer() is None


def test_bad_tokenizer(make_tiny_hf: Callable[..., Path], tmp_path: Path):
    folder = make_tiny_hf(tmp_path / "hf")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(JaxftError, match="tokenizer files cannot be loaded"):
        HFCheckpoint(folder).tokenizer()


# What is done to a sound folder -> words that the error must hold.
def _header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _overwrite(folder: Path, name: str, content: bytes | str) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _cut(folder: Path, size: int) -> None:
    _overwrite(folder, WEIGHTS, (folder / WEIGHTS).read_bytes()[:size])


def _config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def _index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _sharded(folder: Path, name: str, shard: str | None) -> None:
    """Splits the checkpoint into shards and changes one entry of the index (None: deletes it)."""
    write_hf(HFCheckpoint(folder), folder / "sharded", max_shard_size=300_000)
    (folder / WEIGHTS).unlink()
    for path in (folder / "sharded").glob("*.safetensors*"):
        path.rename(folder / path.name)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    _index(folder, {key: shard if key == name else value for key, value in weight_map.items() if key != name or shard})


def _only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"x")


OPENING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty file": (lambda f: _cut(f, 0), r"model\.safetensors: is truncated or corrupt"),
    "cut in the length": (lambda f: _cut(f, 5), r"model\.safetensors: is truncated or corrupt"),
    "cut in the header": (lambda f: _cut(f, 100), r"model\.safetensors: is truncated or corrupt"),
    "cut in the data": (lambda f: _cut(f, -1), r"model\.safetensors: is truncated or corrupt"),
    "header not JSON": (
        lambda f: _overwrite(f, WEIGHTS, (8).to_bytes(8, "little") + b"{'a': 1}"),
        r"model\.safetensors: is truncated or corrupt",
    ),
    "offsets out of range": (
        lambda f: _header(f, lambda h: h["model.norm.weight"].update(data_offsets=[0, 10**12])),
        r"model\.safetensors: is truncated or corrupt.*model\.norm\.weight",
    ),
    "overlapping offsets": (
        lambda f: _header(f, lambda h: h["model.norm.weight"].update(data_offsets=[0, 256])),
        r"model\.safetensors: is truncated or corrupt",
    ),
    "unknown dtype": (
        lambda f: _header(f, lambda h: h["model.norm.weight"].update(dtype="F128")),
        r"model\.safetensors: is truncated or corrupt.*F128",
    ),
    "dtype that numpy lacks": (
        lambda f: _header(f, lambda h: h.update(scale={"dtype": "F4", "shape": [0], "data_offsets": [0, 0]})),
        r"model\.safetensors, tensor scale: has the dtype F4",
    ),
    "shard missing": (
        lambda f: (_sharded(f, "", None), (f / "model-00002-of-00003.safetensors").unlink()),
        r"index\.json: names shards that are missing: model-00002-of-00003\.safetensors",
    ),
    "tensor in another shard": (
        lambda f: _sharded(f, "model.norm.weight", "model-00001-of-00003.safetensors"),
        r"model\.norm\.weight is not in model-00001-of-00003\.safetensors; .*is not in the index",
    ),
    "tensor not in the index": (
        lambda f: _sharded(f, "model.norm.weight", None),
        r"model\.norm\.weight in model-0000\d-of-00003\.safetensors is not in the index",
    ),
    "index reaches outside": (
        lambda f: ((f / WEIGHTS).rename(f.parent / "x.safetensors"), _index(f, {"a": "../x.safetensors"})),
        r"index\.json, tensor a: '\.\./x\.safetensors' is not the name of a file",
    ),
    "index with absolute path": (
        lambda f: ((f / WEIGHTS).unlink(), _index(f, {"a": "/etc/passwd"})),
        r"tensor a: '/etc/passwd' is not the name",
    ),
    "index with a number": (lambda f: ((f / WEIGHTS).unlink(), _index(f, {"a": 3})), "tensor a: 3 is not the name"),
    "index with a name too long for a file": (
        lambda f: ((f / WEIGHTS).unlink(), _index(f, {"a": "x" * 10_000})),
        "names shards that are missing: xxx",
    ),
    "index without a map": (lambda f: ((f / WEIGHTS).unlink(), _index(f, {})), "index.json, field weight_map"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read \(No such file"),
    "config not JSON": (lambda f: _overwrite(f, "config.json", "{"), r"config\.json: is not JSON: .*line 1"),
    "config not UTF-8": (lambda f: _overwrite(f, "config.json", b'{"\xff": 1}'), r"config\.json: is not JSON"),
    "config a list": (lambda f: _overwrite(f, "config.json", "[1]"), "must hold a JSON object, not list"),
    "quantized": (
        lambda f: _config(f, quantization_config={"quant_method": "bitsandbytes"}),
        r"config\.json, field quantization_config: 8-bit weights",
    ),
    "pickle": (
        lambda f: _only(f, "config.json", "pytorch_model.bin"),
        r"only as pickles \(pytorch_model\.bin\).*save_pretrained.*writes model\.safetensors",
    ),
    "torch file": (lambda f: _only(f, "consolidated.00.pth"), r"only as pickles \(consolidated\.00\.pth\)"),
    "no weights": (lambda f: _only(f, "config.json"), r"has neither model\.safetensors nor"),
    "adapter": (lambda f: _only(f, "adapter_config.json"), "is a PEFT adapter, not a model"),
    "empty folder": (lambda f: _only(f), "is an empty folder"),
    "several GGUF": (lambda f: _only(f, "a.gguf", "b.gguf"), r"holds 2 GGUF files: a\.gguf, b\.gguf"),
}


@pytest.mark.parametrize("case", OPENING)
def test_bad_folders_are_refused(case: str, make_tiny_hf: Callable[..., Path], tmp_path: Path):
    change, words = OPENING[case]
    folder = make_tiny_hf(tmp_path / "hf", with_tokenizer=False)
    open_checkpoint(folder)
    change(folder)
    with pytest.raises(JaxftError, match=words):
        open_checkpoint(folder)


def _tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = {name: array.copy() for name, array in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _rename(tensors: dict[str, np.ndarray], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


K = "model.layers.1.self_attn.k_proj.weight"
CHECKING: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "model_type": (lambda f: _config(f, model_type="nonesuch"), ["field model_type: 'nonesuch' is not supported"]),
    "no model_type": (lambda f: _config(f, model_type=None), ["field model_type: None"]),
    "config field": (lambda f: _config(f, logit_cap=30.0), ["unknown config fields: logit_cap = 30.0"]),
    "shapes and names": (
        lambda f: _tensors(
            f,
            lambda t: (
                _rename(t, K, "model.layers.1.self_attn.extra.weight"),
                t.pop("lm_head.weight"),
                t.update({"model.norm.weight": np.zeros(63, np.float32)}),
            ),
        ),
        [
            f"{K} is missing",
            "lm_head.weight is missing",
            "extra.weight is not expected",
            "model.norm.weight has shape [63]",
        ],
    ),
    "integers": (lambda f: _tensors(f, lambda t: t.update({K: t[K].astype(np.int8)})), [f"{K} is int8"]),
    "one bias": (
        lambda f: _tensors(f, lambda t: t.update({K.replace("weight", "bias"): np.zeros(32, np.float32)})),
        ["k_proj.bias is not expected"],
    ),
    "untied after all": (
        lambda f: _config(f, tie_word_embeddings=True),
        ["tensor lm_head.weight: differs from model.embed_tokens.weight"],
    ),
}


@pytest.mark.parametrize("case", CHECKING)
def test_what_is_not_understood_is_refused(case: str, make_tiny_hf: Callable[..., Path], tmp_path: Path):
    change, words = CHECKING[case]
    folder = make_tiny_hf(tmp_path / "hf", with_tokenizer=False)
    check(HFCheckpoint(folder))
    change(folder)
    with pytest.raises(JaxftError) as caught:
        load_decoder(HFCheckpoint(folder), dtype=np.float32)
    assert str(folder) in str(caught.value)
    for part in words:
        assert part in str(caught.value)


def test_harmless_extras_are_accepted(make_tiny_hf: Callable[..., Path], tmp_path: Path):
    folder = make_tiny_hf(tmp_path / "hf", with_tokenizer=False)
    _config(folder, tie_word_embeddings=True)
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _tensors(
        folder,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy(), inv_freq: np.ones(8, np.float32)}),
    )
    source = HFCheckpoint(folder)
    views = tensor_views(load_decoder(source, dtype=np.float32))
    assert set(source.tensors) - set(views) == {"lm_head.weight", inv_freq}
    # They are understood, not lost: conversion carries them on.
    assert_same(HFCheckpoint(write_hf(source, tmp_path / "out")), source)


def test_load_decoder(tiny_hf_dir: Path):
    source = HFCheckpoint(tiny_hf_dir)
    views = tensor_views(load_decoder(source, dtype=np.float32))
    assert set(views) == set(source.tensors)
    for name, array in stream(source):
        np.testing.assert_array_equal(views[name].read(), array)


def test_formats_are_recognised(tiny_hf_dir: Path, tmp_path: Path):
    assert format_of(tiny_hf_dir) == "hf"
    (tmp_path / "one.gguf").touch()
    (tmp_path / "README.md").touch()
    assert format_of(tmp_path) == "gguf"
    assert format_of(tmp_path / "one.gguf") == "gguf"
    with pytest.raises(JaxftError, match=r"README\.md: is not a \.gguf file"):
        open_checkpoint(tmp_path / "README.md")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    assert format_of(tmp_path / "adapter") == "peft"
    assert is_adapter(str(tmp_path / "adapter"))
    assert not is_adapter("owner/name")


def test_names_are_resolved(tiny_hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve(str(tiny_hf_dir)) == tiny_hf_dir
    for missing in (str(tmp_path / "gone"), tmp_path / "gone", "./gone", "a/b/c", "../gone"):
        with pytest.raises(JaxftError, match="does not exist"):
            resolve(missing)
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "owner/gone":
            raise ConnectionError("no route\nto host")
        return str(tiny_hf_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint("owner/name").where == str(tiny_hf_dir)
    assert asked[0][0] == "owner/name"
    assert "*.safetensors" in asked[0][1]
    assert not any("bin" in pattern for pattern in asked[0][1])
    with pytest.raises(
        JaxftError, match=r"owner/gone: .*hub \(no route\)\. Where there is no network, download the files"
    ):
        resolve("owner/gone")


@pytest.mark.slow
@pytest.mark.parametrize("max_shard_size", [10**9, 100_000])
def test_transformers_loads_what_we_write(mixed_dir: Path, tmp_path: Path, max_shard_size: int):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = HFCheckpoint(mixed_dir)
    out = write_hf(source, tmp_path / "out", max_shard_size=max_shard_size)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    assert set(state) == set(source.tensors)
    for name, array in stream(source):
        np.testing.assert_array_equal(state[name].numpy(), array.astype(np.float32))
    assert AutoTokenizer.from_pretrained(out)("2 plus 3")["input_ids"]


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_decoder_is_built_in_place_layers_first(quantization: str | None, tiny_config: DecoderConfig):
    """Live arrays never exceed the finished parameters while tensors are read, and a stack is written in place."""
    rng, order, live = np.random.default_rng(0), [], []
    before = sum(array.nbytes for array in jax.live_arrays())

    def read(name: str) -> np.ndarray:
        order.append(name)
        live.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return rng.standard_normal(expected_tensors(tiny_config)[name], np.float32)

    decoder = build_decoder(tiny_config, read, dtype=jnp.float32, quantization=quantization)
    finished = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(decoder)))
    assert max(live) < finished
    layers = [".layers." in name for name in order]
    assert layers == sorted(layers, reverse=True)
    stacked = jax.ShapeDtypeStruct((3, 64, 64), jnp.uint8)
    layer = jax.ShapeDtypeStruct((64, 64), jnp.uint8)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    analysis = params._set.lower(stacked, layer, index).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == 3 * 64 * 64
    assert analysis.temp_size_in_bytes < layer.size
