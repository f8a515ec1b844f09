"""Orbax checkpoints: bit-equal both ways, readable by plain Orbax, and bad folders refused in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from safetensors.numpy import save_file

from converters.checkpoint import TensorInfo, stream
from converters.hf_export import write_hf
from converters.hf_load import WEIGHTS, HFCheckpoint
from converters.load import load_decoder
from converters.open import format_of, open_checkpoint
from converters.orbax_io import PARAMS, OrbaxCheckpoint, write_orbax
from converters.zarr_io import map_array, write_array
from jaxft.errors import JaxftError
from jaxft.models.params import tensor_views
from tiny import hf_config, random_tensors

NORM = "params/model.norm.weight"
NO_NORM = r"params, tensor model\.norm\.weight: cannot be restored"
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


@pytest.fixture(scope="module")
def source(make_tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    """The tiny checkpoint in three dtypes, with a sidecar."""
    folder = make_tiny_hf(tmp_path_factory.mktemp("orbax") / "hf")
    tensors = random_tensors(hf_config())
    mixed = {name: array.astype(DTYPES[i % 3]) for i, (name, array) in enumerate(tensors.items())}
    save_file(mixed, folder / WEIGHTS, {"format": "pt"})
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    return HFCheckpoint(folder)


@pytest.fixture(scope="module")
def orbax_dir(source: HFCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_orbax` makes of it; shared, so read it only."""
    return write_orbax(source, tmp_path_factory.mktemp("orbax") / "new" / "out")


def assert_same(found: Any, expected: Any) -> None:
    assert found.config == expected.config
    assert found.sidecars() == expected.sidecars()
    assert found.tensors == expected.tensors
    for name, array in stream(expected):
        assert found.read(name).dtype == array.dtype
        assert found.read(name).tobytes() == array.tobytes()


def test_hf_to_orbax_to_hf(source: HFCheckpoint, orbax_dir: Path, tmp_path: Path):
    assert format_of(orbax_dir) == "orbax"
    kept = open_checkpoint(orbax_dir)
    assert {info.dtype for info in kept.tensors.values()} == set(map(np.dtype, DTYPES))
    assert_same(kept, source)
    assert_same(HFCheckpoint(write_hf(kept, tmp_path / "hf")), source)


def test_plain_orbax_reads_it(source: HFCheckpoint, orbax_dir: Path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(orbax_dir / PARAMS)
    assert set(tree) == set(source.tensors)
    for name, array in stream(source):
        assert tree[name].dtype == array.dtype
        assert np.asarray(tree[name]).tobytes() == array.tobytes()


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}], ids=["as Orbax writes by itself", "in plain files"])
def test_weights_that_plain_orbax_wrote(options: dict[str, Any], source: HFCheckpoint, orbax_dir: Path, tmp_path: Path):
    """A JAX program may put its own weights into the folder."""
    folder = Path(shutil.copytree(orbax_dir, tmp_path / "copy"))
    negated = {name: -np.asarray(array) for name, array in stream(source)}
    shutil.rmtree(folder / PARAMS)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder / PARAMS, ocp.args.PyTreeSave(negated))
    kept = OrbaxCheckpoint(folder)
    for name, array in negated.items():
        assert kept.read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (3, 1, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_any_array_is_as_tensorstore_has_it(shape: tuple[int, ...], dtype: Any, tmp_path: Path):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    write_array(tmp_path / "a", array)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(tmp_path / "a")}}
    theirs = tensorstore.open(spec, open=True).result()
    assert (theirs.shape, theirs.dtype.numpy_dtype) == (shape, np.dtype(dtype))
    assert theirs.read().result().tobytes() == array.tobytes()
    info = TensorInfo(shape, np.dtype(dtype))
    mine = map_array(tmp_path / "a", info)
    assert mine is None if not array.size else mine.tobytes() == array.tobytes()
    assert map_array(tmp_path / "a", info._replace(dtype=np.dtype(np.int16))) is None


def test_decoder_and_tokenizer_come_from_it(source: HFCheckpoint, orbax_dir: Path):
    kept = OrbaxCheckpoint(orbax_dir)
    for name, view in tensor_views(load_decoder(kept, dtype=np.float32)).items():
        np.testing.assert_array_equal(view.read(), source.read(name).astype(np.float32))
    tokenizer = kept.tokenizer()
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("2 plus 3")["input_ids"]) == "2 plus 3"


def test_nothing_is_half_written(source: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read(name: str) -> np.ndarray:
        raise JaxftError(name, "is broken")

    monkeypatch.setattr(source, "read", read)
    with pytest.raises(JaxftError, match="is broken"):
        write_orbax(source, tmp_path / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_output_folder(source: HFCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(JaxftError, match="is not empty"):
        write_orbax(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    out = write_orbax(source, tmp_path / "out")
    assert not caplog.records, "Orbax says what nobody asked for"
    assert_same(OrbaxCheckpoint(write_orbax(source, out, overwrite=True)), source)


def _manifest(folder: Path, **fields: Any) -> None:
    path = folder / "jaxft_checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _truncate(folder: Path, pattern: str) -> None:
    paths = [path for path in folder.glob(pattern) if path.is_file()]
    assert paths
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "newer version": (
        lambda f: _manifest(f, version=2),
        r"jaxft_checkpoint\.json: says \('jaxft-orbax', 2\), and only \('jaxft-orbax', 1\)",
    ),
    "no manifest": (lambda f: (f / "jaxft_checkpoint.json").unlink(), r"jaxft_checkpoint\.json: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read"),
    "manifest without tensors": (lambda f: _manifest(f, tensors=[]), "field tensors: is corrupt"),
    "manifest with a dtype of its own": (
        lambda f: _manifest(f, tensors={"a": {"dtype": "float12", "shape": [1]}}),
        "field tensors: is corrupt.*float12",
    ),
    "manifest of something else": (
        lambda f: _manifest(f, tensors={"model.norm.weight": {"dtype": "float32", "shape": [63]}}),
        r"tensor model\.norm\.weight: is .*but jaxft_checkpoint\.json says .*63",
    ),
    "a tensor too many": (
        lambda f: _manifest(f, tensors={"a": {"dtype": "int64", "shape": []}}),
        "params, tensor a: is missing",
    ),
    "no params": (lambda f: shutil.rmtree(f / PARAMS), "params, tensor .* cannot be restored"),
    "no data": (lambda f: (f / NORM / "0").unlink(), NO_NORM),
    "cut data": (lambda f: _truncate(f, f"{NORM}/0"), NO_NORM),
    "no header": (lambda f: (f / NORM / ".zarray").unlink(), NO_NORM),
    "cut header": (
        lambda f: _truncate(f, f"{NORM}/.zarray"),
        NO_NORM,
    ),
    "a pipe": (
        lambda f: ((f / NORM / ".zarray").unlink(), os.mkfifo(f / NORM / ".zarray")),
        r"\.zarray: is neither a file nor a folder",
    ),
    "cut manifest": (lambda f: _truncate(f, "jaxft_checkpoint.json"), r"jaxft_checkpoint\.json: is not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(case: str, orbax_dir: Path, tmp_path: Path):
    change, words = BAD[case]
    folder = shutil.copytree(orbax_dir, tmp_path / "copy")
    change(folder)
    with pytest.raises(JaxftError, match=words):
        list(stream(OrbaxCheckpoint(folder)))


def test_missing_path(tmp_path: Path):
    with pytest.raises(JaxftError, match="gone: does not exist"):
        OrbaxCheckpoint(tmp_path / "gone")
