"""Output folders and files: checked first, complete or not there, and an earlier one kept until then."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from jaxft.errors import JaxftError
from jaxft.files import CHECKPOINT_FILES, new_file, new_folder, prepare_output_dir


def below(folder: Path) -> dict[str, str]:
    """Relative path -> text of every file below `folder`, "" for folders; temporary leftovers included."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def write_checkpoint(path: Path, text: str, **settings: bool) -> None:
    with new_folder(path, **settings) as folder:
        (folder / "config.json").write_text(text)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_folder_appears_when_it_is_complete(tmp_path: Path, exists: bool):
    path = tmp_path / "deeper" / "out"
    if exists:
        path.mkdir(parents=True)
    with new_folder(path) as folder:
        (folder / "config.json").write_text("new")
        assert not path.exists() or not any(path.iterdir())
        assert folder.parent == path.parent  # so that renaming stays within one file system
    assert below(tmp_path) == {"deeper": "", "deeper/out": "", "deeper/out/config.json": "new"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def fail_half_way(path: Path, exception: type[BaseException] = ValueError, **settings: bool) -> None:
    with new_folder(path, **settings) as folder:
        (folder / "config.json").write_text("half")
        raise exception


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_no_folder(tmp_path: Path, exception: type[BaseException]):
    with pytest.raises(exception):
        fail_half_way(tmp_path / "out", exception)
    assert below(tmp_path) == {}
    (tmp_path / "out").mkdir()
    with pytest.raises(exception):
        fail_half_way(tmp_path / "out", exception)
    assert below(tmp_path) == {"out": ""}


@pytest.mark.parametrize("marker", CHECKPOINT_FILES)
def test_overwriting_replaces_a_checkpoint_whole(tmp_path: Path, marker: str):
    path = tmp_path / "out"
    path.mkdir()
    (path / marker).write_text("old")
    (path / "shard").write_text("old")
    before = below(tmp_path)
    with pytest.raises(JaxftError, match="out: is not empty"):
        write_checkpoint(path, "new")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(path, ZeroDivisionError, overwrite=True)
    assert below(tmp_path) == before
    write_checkpoint(path, "new", overwrite=True)
    assert below(tmp_path) == {"out": "", "out/config.json": "new"}


def test_overwriting_spares_what_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(JaxftError, match="holds no checkpoint, so it is not replaced"):
        write_checkpoint(tmp_path, "new", overwrite=True)
    assert below(tmp_path) == {"thesis.tex": "years"}


def test_a_link_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "disk"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    write_checkpoint(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (target / "config.json").read_text() == "new"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_checkpoint(Path("."), "new")
    assert (tmp_path / "here" / "config.json").read_text() == "new"


@pytest.mark.parametrize("make", [write_checkpoint, lambda path, _: prepare_output_dir(path)])
def test_folders_that_cannot_be(tmp_path: Path, make):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(JaxftError, match="file: is a file, not a folder"):
        make(tmp_path / "file", "new")
    with pytest.raises(JaxftError, match=r"out: cannot be written to \(Not a directory\)"):
        make(tmp_path / "file" / "out", "new")
    assert below(tmp_path) == {"file": "mine"}


def test_prepare_takes_a_full_folder_only_when_told(tmp_path: Path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(JaxftError, match="is not empty"):
        prepare_output_dir(tmp_path)
    assert prepare_output_dir(tmp_path, overwrite=True) == tmp_path
    assert prepare_output_dir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert below(tmp_path) == {"notes": "mine", "a": "", "a/b": ""}


def test_a_file_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "deeper" / "model.gguf"
    with new_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert below(path.parent) == {"model.gguf": "new"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(JaxftError, match="exists already"), new_file(path):
        pass
    with pytest.raises(ZeroDivisionError), new_file(path, overwrite=True) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert below(path.parent) == {"model.gguf": "new"}
    with new_file(path, overwrite=True) as temporary:
        temporary.write_text("newer")
    assert below(path.parent) == {"model.gguf": "newer"}
    with pytest.raises(JaxftError, match="cannot be written"), new_file(path / "below a file"):
        pass
