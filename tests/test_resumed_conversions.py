"""A conversion to several files that was killed goes on with the finished ones, if it is the same conversion."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters import gguf_export
from converters.bnb import NF4Checkpoint
from converters.checkpoint import Checkpoint, stream
from converters.cli import main
from converters.hf_export import plan_shards, write_hf
from converters.hf_load import WEIGHTS, HFCheckpoint
from converters.merge import CastCheckpoint, DecoderCheckpoint, MergedCheckpoint
from converters.peft_io import Adapter, make_adapter
from converters.resume import origin_of
from jaxft import files
from jaxft.lora import LoraConfig

SHARD = 60_000  # bytes; the tiny checkpoint has 12 shards of them


class KilledError(Exception):
    """Stands for kill -9: nothing is cleaned up."""


class Counting(HFCheckpoint):
    """Counts what is read; with `stop`, is killed at the tensor of that number."""

    def __init__(self, path: Path, stop: int | None = None) -> None:
        super().__init__(path)
        self.names: list[str] = []
        self.stop = stop

    def read(self, name: str) -> np.ndarray:
        if len(self.names) == self.stop:
            raise KilledError
        self.names.append(name)
        return super().read(name)


def killed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a conversion that is killed in its midst: what was read."""
    checkpoint = Counting(source, stop=20)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KilledError):
            write_hf(checkpoint, out, max_shard_size=SHARD)
    assert not out.exists(), "it looks finished"
    (left,) = out.parent.glob(f".{out.name}.*")
    assert 2 < len(list(left.glob("*.safetensors"))) < 10
    return checkpoint.names


@pytest.fixture
def source(tiny_hf_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_hf_dir, tmp_path / "source"))


def test_it_goes_on_with_the_finished_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "to" / "out"
    before = killed(source, out, monkeypatch)
    again = Counting(source)
    write_hf(again, out, max_shard_size=SHARD)
    assert len(again.names) < len(again.tensors) - 15
    twice = set(again.names) & set(before)
    shards = plan_shards(again.tensors, SHARD).values()
    assert len([shard for shard in shards if twice & shard.keys()]) == 1, "only the unfinished shard is read again"
    whole = write_hf(HFCheckpoint(source), tmp_path / "whole", max_shard_size=SHARD)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


OTHERS: dict[str, tuple[Callable[[Path], object], int]] = {
    "source": (lambda source: os.utime(source / WEIGHTS, ns=(1, 1)), SHARD),
    "sharding": (lambda source: None, SHARD + 10_000),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_conversion_begins_again(other: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    killed(source, tmp_path / "to" / "out", monkeypatch)
    change, shard = OTHERS[other]
    change(source)
    again = Counting(source)
    write_hf(again, tmp_path / "to" / "out", max_shard_size=shard)
    assert sorted(again.names) == sorted(again.tensors)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["out"]


def test_what_values_come_from(tiny_hf_dir: Path):
    """Two computations of one base differ; a decoder's values come from nowhere that we know."""

    def merged(value: float) -> MergedCheckpoint:
        shapes = {"A": (2, 64), "B": (160, 2)}
        name = "model.layers.0.mlp.up_proj.lora_{}.weight"
        tensors = {name.format(part): np.full(shape, value, "f4") for part, shape in shapes.items()}
        adapter: Adapter = make_adapter(LoraConfig(r=2), tensors, base_model_name_or_path="x")
        return MergedCheckpoint(base, adapter)

    base = HFCheckpoint(tiny_hf_dir)
    kinds: list[Checkpoint] = [base, merged(1), merged(2), CastCheckpoint(base), NF4Checkpoint(base)]
    assert len({str(origin_of(checkpoint)) for checkpoint in kinds}) == len(kinds)
    assert origin_of(merged(1)) == origin_of(merged(1))

    class OfADecoder(DecoderCheckpoint):
        def __init__(self) -> None:
            super(DecoderCheckpoint, self).__init__(base)

    assert origin_of(OfADecoder()) is None
    assert origin_of(CastCheckpoint(OfADecoder())) is None


@pytest.mark.parametrize("types", [("f16", "q8_0", "q4_0"), ("q8_0",)], ids=len)
def test_gguf_files_go_on_with_the_tensor(
    types: tuple[str, ...], tiny_hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All types are written in one pass and appear together; a cut or finished file is gone on with."""
    out = tmp_path / "out"
    names = [f"model.{name.upper()}.gguf" for name in types]
    command = ["to-gguf", str(tiny_hf_dir), str(out if len(types) > 1 else out / names[0]), "--type", *types]
    read = HFCheckpoint.read
    reads: list[str] = []

    def dies(checkpoint: HFCheckpoint, name: str) -> np.ndarray:
        if len(reads) == 20:
            raise KilledError
        reads.append(name)
        return read(checkpoint, name)

    def again(checkpoint: HFCheckpoint, name: str) -> np.ndarray:
        reads.append(name)
        return read(checkpoint, name)

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(HFCheckpoint, "read", dies)
        with pytest.raises(KilledError):
            main(command)
    assert sorted(set(reads)) == sorted(reads), "a tensor is read once, whatever the number of types"
    (left,) = out.iterdir()
    assert left.name.startswith("."), "it looks finished"
    unfinished = sorted(left.glob("*.unfinished"))
    assert len(unfinished) == len(types)
    with unfinished[-1].open("ab") as file:
        file.truncate(file.tell() - 5)
    unfinished[0].rename(left / unfinished[0].stem)  # killed while they got their names
    monkeypatch.setattr(HFCheckpoint, "read", again)
    before = len(HFCheckpoint(tiny_hf_dir).tensors)
    assert main(command) == 0
    assert before <= len(reads) <= before + 2, "only the last tensors are read again"
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for kind, name in zip(types, names, strict=True):
        alone = gguf_export.write_gguf(HFCheckpoint(tiny_hf_dir), tmp_path / "alone.gguf", kind, overwrite=True)
        assert (out / name).read_bytes() == alone.read_bytes()


@pytest.mark.slow
def test_killed_between_shards(make_tiny_hf: Callable[..., Path], tmp_path: Path):
    """kill -9 of processes, several times in a row: each goes on, and the last one ends."""
    source = make_tiny_hf(tmp_path / "source", hidden_size=256, num_hidden_layers=8, with_tokenizer=False)
    code = (
        "import sys, time; from pathlib import Path; from converters.hf_export import write_hf\n"
        "from converters.hf_load import HFCheckpoint\n"
        "class Slow(HFCheckpoint):\n"
        "    def read(self, name): time.sleep(0.05); print(name, flush=True); return super().read(name)\n"
        f"write_hf(Slow({str(source)!r}), Path({str(tmp_path / 'out')!r}), max_shard_size=600_000)"
    )
    read: list[str] = []
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout
        first = process.stdout.readline()
        time.sleep(1.0)
        process.send_signal(signal.SIGKILL)
        read += [line.decode().strip() for line in (first, *process.stdout.readlines())]
        process.wait()
        process.stdout.close()
        if (tmp_path / "out").exists() and any((tmp_path / "out").iterdir()):
            break
    assert dict(stream(HFCheckpoint(tmp_path / "out"))).keys() == HFCheckpoint(source).tensors.keys()
    for name, array in stream(HFCheckpoint(source)):
        np.testing.assert_array_equal(HFCheckpoint(tmp_path / "out").read(name), array)
    assert len(read) < 3 * len(set(read)), "it began again and again"
