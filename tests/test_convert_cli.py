"""`jaxft-convert`: each command on a tiny checkpoint, and exit status 2 with words for what the user has to mend."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters.checkpoint import stream
from converters.cli import main
from converters.hf_load import WEIGHTS, HFCheckpoint
from converters.open import open_checkpoint
from converters.peft_io import make_adapter, write_adapter
from jaxft.errors import EXIT_STATUS
from jaxft.lora import LoraConfig


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def folder(make_tiny_hf: Callable[..., Path], tmp_path: Path) -> Path:
    return make_tiny_hf(tmp_path / "hf", dtype="bfloat16")


def test_hf_to_jax_to_hf(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert run("hf-to-jax", folder, tmp_path / "jax") == 0
    assert run("jax-to-hf", tmp_path / "jax", tmp_path / "back") == 0
    source, back = HFCheckpoint(folder), HFCheckpoint(tmp_path / "back")
    assert back.config == source.config
    assert back.sidecars() == source.sidecars()
    assert {name: array.tobytes() for name, array in stream(back)} == {n: a.tobytes() for n, a in stream(source)}
    output = capfd.readouterr()
    assert output.out == ""
    assert f"wrote {tmp_path / 'jax'} (" in output.err
    assert f"wrote {tmp_path / 'back'} (" in output.err


@pytest.mark.parametrize("to", ["hf", "jax"])
def test_gguf_and_back(to: str, folder: Path, tmp_path: Path):
    assert run("to-gguf", folder, tmp_path / "model.gguf", "--quantization", "bf16") == 0
    assert run("from-gguf", tmp_path / "model.gguf", tmp_path / "back", "--to", to) == 0
    source, back = HFCheckpoint(folder), open_checkpoint(tmp_path / "back")
    assert set(back.tensors) == set(source.tensors)
    for name, array in stream(source):
        np.testing.assert_array_equal(back.read(name).astype(np.float32), array.astype(np.float32))
    tokenizer, original = back.tokenizer(), source.tokenizer()
    assert tokenizer is not None
    assert original is not None
    assert tokenizer("What is 2 plus 3?")["input_ids"] == original("What is 2 plus 3?")["input_ids"]


def test_several_types(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "gguf"
    assert run("to-gguf", folder, out, "--type", "bf16", "q8_0") == 0
    assert sorted(path.name for path in out.iterdir()) == ["model.BF16.gguf", "model.Q8_0.gguf"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capfd.readouterr()
    assert run("to-gguf", folder, out, "--type", "f32", "q8_0") == EXIT_STATUS
    assert "model.Q8_0.gguf: exists already" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert run("to-gguf", folder, out, "--type", "f32", "q8_0", "--overwrite") == 0
    assert len(list(out.iterdir())) == 3


def test_overwrite(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for command, out in (("hf-to-jax", tmp_path / "jax"), ("to-gguf", tmp_path / "model.gguf")):
        assert run(command, folder, out) == 0
        assert run(command, folder, out) == EXIT_STATUS
        assert str(out) in capfd.readouterr().err
        assert run(command, folder, out, "--overwrite") == 0


def test_inspect(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    tensors = {"model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 64), np.float32)}
    tensors["model.layers.0.mlp.up_proj.lora_B.weight"] = np.ones((160, 2), np.float32)
    adapter = make_adapter(LoraConfig(r=2), tensors, base_model_name_or_path="owner/base")
    write_adapter(adapter, tmp_path / "adapter")
    assert run("hf-to-jax", folder, tmp_path / "jax") == 0
    assert run("to-gguf", folder, tmp_path / "model.gguf") == 0
    parameters = sum(array.size for _, array in stream(HFCheckpoint(folder)))
    expected = {
        folder: ("hf", parameters, {"bfloat16"}, "hidden_size"),
        tmp_path / "jax": ("orbax", parameters, {"bfloat16"}, "hidden_size"),
        tmp_path / "model.gguf": ("gguf", parameters, {"Q8_0", "F32"}, "hidden_size"),
        tmp_path / "adapter": ("peft", 2 * 64 + 160 * 2, {"float32"}, "lora_alpha"),
    }
    for path, (kind, size, dtypes, field) in expected.items():
        capfd.readouterr()
        assert run("inspect", path, "--json") == 0
        output = capfd.readouterr()
        found = json.loads(output.out)
        assert (found["format"], found["parameters"], set(found["dtypes"])) == (kind, size, dtypes)
        assert found["config"][field]
        assert sum(tensor["bytes"] for tensor in found["tensors"]) <= found["bytes_on_disk"]
        assert run("inspect", path) == 0
        output = capfd.readouterr()
        assert output.out == ""
        assert f"{size:,} parameters" in output.err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["hf-to-jax", "{hf}/gone", "{out}"], "gone: does not exist"),
        (["jax-to-hf", "{hf}", "{out}"], "jaxft_checkpoint.json: cannot be read"),
        (["from-gguf", "{hf}/config.json", "{out}"], "config.json"),
        (["to-gguf", "{hf}", "{out}", "--quantization", "q9_9"], "q9_9"),
        (["to-gguf", "{hf}", "{out}", "--type", "q8_0", "q9_9"], "q9_9"),
        (
            ["to-gguf", "{hf}", "{out}.gguf", "--type", "q8_0", "q4_0"],
            "out.gguf: is one file, for the types q8_0, q4_0",
        ),
        (["inspect", "{hf}/config.json"], "config.json: is not a .gguf file"),
        (["hf-to-jax", "{cut}", "{out}"], "model.safetensors: is truncated or corrupt"),
        (["to-gguf", "{cut}", "{out}"], "model.safetensors: is truncated or corrupt"),
        (["hf-to-jax", "{field}", "{out}"], "unknown config fields: logit_cap = 30.0"),
        (["to-gguf", "{field}", "{out}"], "unknown config fields: logit_cap = 30.0"),
        (["hf-to-jax", "{hf}", "{hf}"], "is not empty"),
        (["hf-to-jax", "{hf}", "{hf}/config.json/x"], "cannot be written to"),
    ],
)
def test_bad_input(command: list[str], words: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    cut, field = (shutil.copytree(folder, tmp_path / name) for name in ("cut", "field"))
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:1000])
    config = json.loads((field / "config.json").read_text())
    (field / "config.json").write_text(json.dumps({**config, "logit_cap": 30.0}))
    before = sorted(tmp_path.rglob("*"))
    paths = {"hf": folder, "out": tmp_path / "out", "cut": cut, "field": field}
    assert run(*(part.format(**paths) for part in command)) == EXIT_STATUS
    output = capfd.readouterr()
    assert output.out == ""
    # One line, whatever the width of the terminal.
    assert words in output.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [[], ["nonesuch"], ["hf-to-jax", "only one"], ["from-gguf", "a", "b", "--to", "c"]]
)
def test_wrong_arguments(arguments: list[str], capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == EXIT_STATUS
    assert capfd.readouterr().out == ""


def test_import_is_light():
    code = "import converters.cli, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(modules).isdisjoint({"jax", "transformers", "orbax", "gguf", "torch", "safetensors"})
